"""The programs of docs/fine-tuning.md run, on tiny folders in place of the ones that it names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hf_folder_case import _own_cache_of_modules, export, loaded_model  # noqa: F401
from tuning_case import CLASSIFIER, HEADS, load

pytestmark = pytest.mark.slow
PAGE = Path(__file__).resolve().parents[3] / "docs" / "fine-tuning.md"
PROGRAMS = dict(re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S))
"""Python source by the heading that it stands under."""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the program under a heading beside ``hf/``; gives its variables, and what it printed."""
    monkeypatch.chdir(tmp_path)
    for objective in ("mlm", "clm"):
        export(loaded_model(objective=objective), tmp_path / "hf" / f"demo-{objective}")

    def start(heading: str) -> tuple[dict[str, Any], str]:
        variables: dict[str, Any] = {"__name__": "__main__"}
        exec(compile(PROGRAMS[heading], f"{PAGE.name}: {heading}", "exec"), variables)
        return variables, capsys.readouterr().out

    return start


def test_every_section_with_a_program_is_run_here() -> None:
    assert list(PROGRAMS) == ["Trainer", "LoRA", "sentence-transformers"]
    assert PAGE.read_text().count("```python") == len(PROGRAMS)


def test_trainer(run: Any, tmp_path: Path) -> None:
    variables, printed = run("Trainer")
    found = variables["classify"](variables["texts"][:4])
    assert [answer["label"] for answer in found] == ["good", "bad", "good", "bad"]
    assert re.search(r"\[\{'label': '(good|bad)', 'score': 0\.\d+\}, \{'label'", printed)
    assert load(tmp_path / "tuned" / "reviews", CLASSIFIER).config.id2label == {0: "bad", 1: "good"}


def test_lora(run: Any, tmp_path: Path) -> None:
    variables, printed = run("LoRA")
    assert "trainable params: " in printed
    assert "The ship" in printed
    losses = [line["train_loss"] for line in variables["trainer"].state.log_history if "train_loss" in line]
    assert len(losses) == 1
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        f.name for f in (tmp_path / "tuned/adapter").iterdir()
    }
    assert load(tmp_path / "tuned" / "merged", HEADS["clm"]).config.objective == "clm"


def test_sentence_transformers(run: Any) -> None:
    variables, printed = run("sentence-transformers")
    model, questions, answers = (variables[name] for name in ("model", "questions", "answers"))
    similarities = model.similarity(model.encode(questions), model.encode(answers))
    assert similarities.argmax(1).tolist() == [0, 1, 2, 3]
    assert "tensor([[" in printed
