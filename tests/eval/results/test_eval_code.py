"""A result is of the code, the torch and the kind of device that computed it, and no other is served."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from eval.results import code, store
from eval.results.code import ROOT, changes, code_files, code_hash, provenance
from eval.results.parts import Parts
from eval.results.records import read_records
from eval.results.schema import Metric, ModelInfo, Outcome, read_result
from eval.results.store import obtain
from eval.task import TASKS, tasks

TOY = Path(__file__).parents[1] / "toy_task.py"
FORM = "pretrain/model/attention/causal_nystrom.py"


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the project's folders that is hashed in their place."""
    tasks()
    place = tmp_path / "project"
    for folder in code.FOLDERS:
        shutil.copytree(ROOT / folder, place / folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(code, "ROOT", place)
    monkeypatch.setattr(code, "_own_files", lambda task: {f"eval.tasks.{task}": str(place / "eval" / "tasks" / task)})
    return place


def hashed(place: Path, *modules: str) -> str:
    """The hash anew, as a second process has it."""
    for cache in (code._source, code._modules, code._code_hash):
        cache.cache_clear()
    known = code._modules(place)
    return code._code_hash(tuple((name, str(known[name])) for name in modules))


def test_what_a_task_reaches_is_hashed_and_nothing_that_reads_results() -> None:
    found = set(code_files("lm"))
    assert {
        "eval.tasks.language_modeling.task",  # named in a string
        "eval.tasks.language_modeling.causal",
        "eval.shared.scoring",
        "pretrain.model.attention.forms.nystrom",  # found by name
        "pretrain.model.attention.causal_nystrom",
        "pretrain.checkpoint.load",
        "data_pipeline.shards.shardset",
    } <= found
    apart = ("eval.report", "eval.cli", "eval.compare", "eval.tasks.lra")
    assert not [name for name in found if name.startswith(apart)]
    assert "eval.tasks.classification.finetune" in code_files("classify")
    assert code_hash("lm") != code_hash("classify")


def test_code_counts_and_prose_does_not(copy: Path) -> None:
    task = "eval.tasks.language_modeling.task"
    first = hashed(copy, task)
    form = copy / FORM
    text = form.read_text(encoding="utf-8")
    form.write_text(text.replace('"""', '"""Other words. ', 1) + "\n# another comment\n", encoding="utf-8")
    assert hashed(copy, task) == first
    form.write_text(text + "\n_ANOTHER = 1\n", encoding="utf-8")
    assert hashed(copy, task) != first
    form.write_text(text, encoding="utf-8")
    for elsewhere in ("eval/report/page.py", "eval/cli.py", "eval/tasks/lra/train.py"):
        path = copy / elsewhere
        path.write_text(path.read_text(encoding="utf-8") + "\n_ANOTHER = 1\n", encoding="utf-8")
    assert hashed(copy, task) == first
    assert hashed(copy, "eval.tasks.lra.task") != first
    scoring = copy / "eval/shared/scoring.py"
    scoring.write_text(scoring.read_text(encoding="utf-8").replace("float64", "float32"), encoding="utf-8")
    assert hashed(copy, task) != first


def test_a_form_of_attention_that_is_added_counts(copy: Path) -> None:
    first = hashed(copy)
    (copy / "pretrain/model/attention/forms/another.py").write_text("X = 1\n")
    assert hashed(copy) != first


def test_a_task_of_the_users_own_counts_with_what_it_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util
    import sys

    def load(text: str) -> str:
        path = tmp_path / "guesses.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location("guesses_own", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "guesses_own", module)
        code._source.cache_clear()
        code._code_hash.cache_clear()
        with TASKS.registered():
            spec.loader.exec_module(module)
            assert {"guesses_own", "eval.results.statistics"} <= set(code_files("guesses"))
            return code_hash("guesses")

    text = TOY.read_text(encoding="utf-8")
    first = load(text)
    assert load(text + "# a comment\n") == first
    assert load(text.replace("settings.windows", "(settings.windows + 0)", 1)) != first


def test_the_hash_is_quick() -> None:
    for cache in (code._source, code._modules, code._code_hash):
        cache.cache_clear()
    started = time.process_time()
    code_hash("lm")
    assert time.process_time() - started < 3  # 0.4 s on an idle core of 2023


def ask(folder: Path, value: float, rerun: bool = False, **model: Any) -> tuple[float, bool]:
    def compute(_: Parts) -> Outcome:
        return Outcome({"loss": Metric(value, False)}, records=[{"id": "1", "nats": value}])

    result, fresh = obtain(
        folder, "lm", task="lm", version=1, model=ModelInfo("w", **model), settings={"length": 8}, data={"hash": "d"},
        gate="passed", compute=compute, rerun=rerun,
    )  # fmt: skip
    return result.metrics["loss"].value, fresh


def test_a_result_of_other_code_torch_or_device_is_computed_again_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A leaking loss of broken code must not be served once the code is mended."""
    own = provenance("lm", "cpu")

    def now(**other: str) -> None:
        monkeypatch.setattr(store, "provenance", lambda task, device: own | {"device": device or "cpu"} | other)

    now(code="broken" * 10)
    assert ask(tmp_path, 6.428) == (6.428, True)
    assert ask(tmp_path, 9.0) == (6.428, False)
    assert capsys.readouterr().out == ""
    now()
    assert ask(tmp_path, 6.504) == (6.504, True)
    assert f"the code of the model or the task has changed (brokenbr, now {own['code'][:8]})" in capsys.readouterr().out
    now(torch="9.9")
    assert ask(tmp_path, 6.505) == (6.505, True)
    assert f"it was computed with torch {own['torch']}, this is 9.9" in capsys.readouterr().out
    now()
    assert ask(tmp_path, 1.0, device="cuda") == (1.0, True)
    assert "it was computed on cpu, this is cuda" in capsys.readouterr().out
    now()
    assert ask(tmp_path, 2.0) == (6.504, False)  # kept, and of this code
    assert capsys.readouterr().out == ""


def test_a_file_of_an_older_version_is_read_and_not_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask(tmp_path, 1.0)
    path = tmp_path / "lm.json"
    raw = json.loads(path.read_text())
    assert {"code", "commit", "torch", "device_kind"} <= set(raw["environment"])
    for name in ("code", "commit", "device_kind"):
        del raw["environment"][name]
    del raw["model"]["device"]
    path.write_text(json.dumps(raw | {"key": "0" * 64}))
    shutil.rmtree(tmp_path / "finished")
    assert read_result(path).metrics["loss"].value == 1.0
    assert len(read_records(path)) == 1
    assert ask(tmp_path, 2.0) == (2.0, True)
    assert "it does not say which code computed it" in capsys.readouterr().out


def test_what_changed_is_named_gravest_first() -> None:
    now = {"code": "b" * 64, "torch": "2", "device": "cpu"}
    assert changes({"code": "b" * 64, "torch": "2", "device_kind": "cpu"}, now) == []
    assert [line.split(" ")[0] for line in changes({"code": "a" * 64, "torch": "1", "device_kind": "cuda"}, now)] == [
        "the", "it", "it",
    ]  # fmt: skip
