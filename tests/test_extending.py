"""docs/extending.md as a user would follow it: one new file each, and the rest of the project picks it up."""

from __future__ import annotations

import gzip
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import extending_case as extending
import form_case
import pytest
from ranks import run_ranks, values
from training_case import EPS, metrics, write_config

from data_pipeline.errors import UserError
from data_pipeline.shards.shardset import ShardSet
from data_pipeline.sources.records import read_records
from launch import program
from pretrain.callbacks import StopRun, Validated
from pretrain.config import load_config
from pretrain.optim.optimizer import most_values_kept
from tools.quote import MARKED, quoted

REPOSITORY = Path(__file__).resolve().parent.parent
SHARDS = REPOSITORY / "tests" / "fixtures" / "v1" / "shards"
DEMO = str(REPOSITORY / "configs" / "demo-clm.yaml")


@pytest.fixture
def added() -> Iterator[Callable[[str], None]]:
    """Adds the files of a folder for the time of a test."""
    with extending.FORMS.registered(), extending.KINDS.registered(), extending.FORMATS.registered():
        before = {package: package.__path__ for package, _ in extending.PLACES.values()}
        yield extending.add
        for package, path in before.items():
            package.__path__ = path
    for package, _ in extending.PLACES.values():
        for module in ("sink", "sgd", "bars"):
            sys.modules.pop(f"{package.__name__}.{module}", None)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the new form and the new optimizer, ended by the new callback at its first validation."""
    folder = tmp_path_factory.mktemp("extending")
    config: dict[str, Any] = {
        "name": "run",
        "output_dir": str(folder),
        "model": {"objective": "clm", "attention": "sink", "hidden_size": 16, "num_layers": 2, "num_heads": 2},
        "data": {"train": str(SHARDS), "valid": str(SHARDS)},
        "curriculum": [{"until_tokens": 1024, "seq_len": 64, "micro_batch": 2}],
        "batch_tokens": 128,
        "precision": "fp32",
        "optimizer": {"kind": "sgd", "lr": 0.05, "eps": EPS, "settings": {"friction": 0.05}},
        "validation": {"every_tokens": 384, "tokens": 512, "samples": 0},
        "telemetry": {"wandb": "disabled", "log_every_steps": 1},
    }
    patience = [{"call": "patience:Patience", "settings": {"validations": -1}}]  # the first one is one too many
    stopped = write_config(folder / "stopped.yaml", {**config, "callbacks": patience})
    ended = run_ranks(extending.train, 1, config=stopped)
    assert values(ended) == [75]
    assert "patience:Patience.on_validation ends the run: not below" in ended[0].output
    assert len(metrics(folder / "run")) == 3
    assert values(run_ranks(extending.train, 1, config=write_config(folder / "whole.yaml", config))) == [0]
    return folder / "run"


def test_the_page_shows_the_files_that_are_tested_here() -> None:
    page = (REPOSITORY / "docs" / "extending.md").read_text(encoding="utf-8")
    assert quoted(page) == page, "run `python -m tools.quote`"
    shown = {REPOSITORY / path for _, path in MARKED.findall(page)}
    assert set(extending.FOLDER.glob("*/*.py")) <= shown


def test_quoting_replaces_the_marked_block_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n\ny = 2\n")
    page = "```python\nkept\n```\n<!-- file: a.py -->\n```python\nold\n\nold\n```\nrest\n"
    assert quoted(page, tmp_path) == (
        "```python\nkept\n```\n<!-- file: a.py -->\n```python\nx = 1\n\ny = 2\n```\nrest\n"
    )


def test_a_form_has_every_property(added: Callable[[str], None]) -> None:
    added("forms")
    assert "sink" in extending.FORMS.names()
    for objective in extending.FORMS.get("sink").objectives:
        model = form_case.model_of(attention="sink", objective=objective)
        form_case.padding_does_not_matter(model)
        form_case.packed_equals_separate(model)
        form_case.flops_are_sane(model.config)
    form_case.no_gradient_from_the_future(model, "documents")
    form_case.decoding_equals_the_forward_pass(model)


def test_an_optimizer_is_known_by_its_states_and_settings(added: Callable[[str], None]) -> None:
    added("kinds")
    assert most_values_kept(load_config(DEMO, ["optimizer.kind=sgd"]).optimizer) == 1
    with pytest.raises(UserError, match=r"sgd has no hyper-parameter 'fricton': did you mean 'friction'\?"):
        load_config(DEMO, ["optimizer.kind=sgd", "optimizer.settings.fricton=0.1"])


def test_form_and_optimizer_are_planned(added: Callable[[str], None], capsys: pytest.CaptureFixture[str]) -> None:
    added("forms")
    added("kinds")
    words = ["--config", DEMO, "--set", "model.attention=sink", "optimizer.kind=sgd", "model.vocab_size=4096"]
    assert not program.main(["plan", *words])
    assert "a causal sink model" in capsys.readouterr().out


def test_form_and_optimizer_train_and_the_model_passes_the_gate(
    run: Path, added: Callable[[str], None], tmp_path: Path
) -> None:
    added("forms")
    added("kinds")
    losses = [row["loss"] for row in metrics(run)]
    assert len(losses) == 8
    assert losses[-1] < losses[0]
    assert program.main(["eval", "validity", "--checkpoint", str(run), "--out", str(tmp_path)]) == 0


def test_a_format_is_prepared_and_evaluated(
    added: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    added("formats")
    texts = [f"the {word} note {i}" for i in range(40) for word in ("first", "other")]
    lines = "".join(f"{i % 2}|{text}\n" for i, text in enumerate(texts))
    (tmp_path / "notes.bars").write_text(lines)
    (tmp_path / "more.bars.gz").write_bytes(gzip.compress(lines.encode()))
    monkeypatch.chdir(tmp_path)
    command = [
        "data",
        "prepare",
        "--input",
        "notes.bars",
        "more.bars.gz",
        "--tokenizer",
        str(SHARDS / "tokenizer.json"),
    ]
    assert program.main([*command, "--workers", "1", "--out", "shards"]) == 0
    opened = ShardSet.open("shards")
    assert [opened.tokenizer().decode(ids) for ids in opened.documents()] == texts + texts
    # The one reader of labelled data, held-out text and prompts.
    records = [record for record, _ in read_records("more.bars.gz", ("label", "text"))]
    assert records == [{"label": str(i % 2), "text": text} for i, text in enumerate(texts)]


def test_a_callback_waits_as_long_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(extending.FOLDER / "callbacks"))
    from patience import Patience  # type: ignore[import-not-found]

    def validated(loss: float) -> Validated:
        return Validated(1, 1, 0, 64, loss, 1.0, None, None, (), 0.0)

    patience = Patience(validations=1)
    for loss in (3.0, 2.0, 2.0, 1.0, 1.5):
        patience.on_validation(validated(loss))
    with pytest.raises(StopRun, match=r"not below 1\.000 for 2 validations"):
        patience.on_validation(validated(1.0))
