"""docs/notebook.ipynb runs in a real Jupyter kernel; an interrupt of a cell and the kernel's end leave a saved run."""

from __future__ import annotations

import importlib.util
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs" / "notebook.ipynb"
LONG = """nystrom.train(config, name="long", **{"curriculum.0.until_tokens": 10**8}, telemetry__log_every_steps=1)"""


def cells() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return found


def test_the_notebook_has_no_outputs_and_links_that_lead_somewhere() -> None:
    for cell in cells():
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
    text = "".join("".join(cell["source"]) for cell in cells() if cell["cell_type"] == "markdown")
    pages = re.findall(r"\]\((\w+\.md)\)", text)
    assert pages
    assert [page for page in pages if not (NOTEBOOK.parent / page).is_file()] == []


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 150
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


class Session:
    """A kernel that runs cells of a notebook. What they printed, and what they showed, is text."""

    def __init__(self, folder: Path) -> None:
        nbclient = pytest.importorskip("nbclient", reason="nbclient, which runs notebooks, is not installed")
        pytest.importorskip("ipykernel", reason="ipykernel, the kernel of notebooks, is not installed")
        import nbformat
        from jupyter_client.manager import KernelManager

        self.notebook = nbformat.read(NOTEBOOK, as_version=4)
        self.client = nbclient.NotebookClient(
            self.notebook,
            timeout=300,
            kernel_name="python3",
            kernel_manager_class=KernelManager,
            coalesce_streams=True,
            resources={"metadata": {"path": str(folder)}},
        )
        self.error = nbclient.exceptions.CellExecutionError

    def run(self, cell: Any) -> None:
        self.notebook.cells.append(cell)
        self.client.execute_cell(cell, len(self.notebook.cells) - 1)

    @property
    def kernel(self) -> psutil.Process:
        return psutil.Process(self.client.km.provisioner.pid)


def printed(cell: Any, name: str = "stdout") -> str:
    return "".join(out["text"] for out in cell["outputs"] if out["output_type"] == "stream" and out["name"] == name)


def shown(cell: Any, kind: str) -> list[str]:
    return [out["data"][kind] for out in cell["outputs"] if kind in out.get("data", {})]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("notebook")


@pytest.fixture(scope="module")
def session(folder: Path) -> Iterator[Session]:
    """The kernel after all cells of the notebook; a cell that raises is an error here."""
    session = Session(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]))
        patch.setenv("IPYTHONDIR", str(folder / "ipython"))
        with session.client.setup_kernel():
            for number, cell in enumerate(session.notebook.cells):
                session.client.execute_cell(cell, number)
            yield session


@pytest.mark.slow
def test_every_cell_runs_and_shows_what_it_should(session: Session) -> None:
    code = [cell for cell in session.notebook.cells if cell["cell_type"] == "code"]
    by_start = {cell["source"].splitlines()[-1]: cell for cell in code}
    trained, evaluated = by_start["run"], by_start["results"]
    assert "Done. Weights for use: notebook/runs/causal/export" in printed(trained)
    lines = [line for line in printed(trained).splitlines() if line]
    assert len(lines) == len(set(lines))  # none is there twice
    assert not [line for line in lines if line.startswith("step ")]  # the bar shows those
    assert "<th" in shown(trained, "text/html")[-1]
    if importlib.util.find_spec("ipywidgets") is not None:
        assert shown(trained, "application/vnd.jupyter.widget-view+json")
    assert ">done<" in shown(trained, "text/html")[-1]
    assert "pppl" in shown(evaluated, "text/html")[-1]
    assert "not run: pppl" in printed(evaluated, "stderr")
    silent = [cell for cell in code if cell is not evaluated]
    assert [printed(cell, "stderr") for cell in silent] == [""] * len(silent)  # no warnings, no logs
    assert sum(len(shown(cell, "image/png")) for cell in code) >= 2


@pytest.mark.slow
def test_an_interrupt_saves_and_the_cell_resumes_until_the_kernel_ends(session: Session, folder: Path) -> None:
    import nbformat

    run = folder / "notebook" / "runs" / "long"

    def steps() -> list[int]:
        lines = (run / "metrics.jsonl").read_text().splitlines(True) if (run / "metrics.jsonl").is_file() else []
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        return [row["step"] for row in rows if row["kind"] == "train"]

    def interrupt() -> None:
        wait_for(steps)
        session.client.km.interrupt_kernel()

    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    cell = nbformat.v4.new_code_cell(LONG)
    with pytest.raises(session.error, match="KeyboardInterrupt"):
        session.run(cell)
    interrupter.join()
    assert json.loads((run / "status.json").read_text())["state"] == "preempted"
    saved = steps()[-1]
    assert f"step {saved}" in printed(cell)

    session.client.kc.execute(LONG)
    wait_for(lambda: steps()[-1] > saved)
    children = session.kernel.children(recursive=True)
    assert children
    session.client.km.shutdown_kernel()  # as Jupyter does: it asks, and kills a few seconds later
    wait_for(lambda: not [child for child in children if child.is_running()])
    assert steps() == list(range(1, len(steps()) + 1))  # none again, none left out
    assert json.loads((run / "status.json").read_text())["state"] == "preempted"
