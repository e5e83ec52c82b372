"""Callbacks see what happened, and training is the same as without them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks, values
from striking_case import train
from training_case import events, metrics, numbers, settings, weights_hash, write_config

from data_pipeline.errors import UserError
from pretrain.callbacks import check_callbacks
from pretrain.config import CallbackConfig, load_config, parse_config

REPOSITORY = Path(__file__).resolve().parents[2]


def run(corpus: Path, runs: Path, callbacks: list[Any], **changes: Any) -> str:
    """A run whose every draw shows: dropout, masks, held-out losses, checkpoints."""
    base: dict[str, Any] = {
        "model": {"dropout": 0.2},
        "data": {"valid": str(corpus / "valid")},
        "validation": {"tokens": 512},
        "checkpoint": {"every_tokens": 1024},
        "zero_stage": 2,
    }
    case = settings(corpus, runs, **{**base, **changes})
    return write_config(runs / "run.yaml", {**case, "callbacks": callbacks})


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"call": f"callback_case:{name}", "settings": arguments}


def recorded(folder: Path, rank: int) -> list[tuple[str, dict[str, Any]]]:
    return [tuple(json.loads(line)) for line in (folder / f"{rank}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def without(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("without")
    assert values(run_ranks(train, 2, config=run(corpus, folder, []))) == [0, 0]
    return folder / "run"


def test_they_see_the_run_and_leave_it_equal_to_the_bit(corpus: Path, without: Path, tmp_path: Path) -> None:
    folder = str(tmp_path)
    callbacks = [call("Recorder", folder=folder), "callback_case:Faulty", call("First", folder=folder)]
    ended = run_ranks(train, 2, config=run(corpus, tmp_path, callbacks))
    assert values(ended) == [0, 0]
    assert numbers(tmp_path / "run") == numbers(without)
    assert weights_hash(tmp_path / "run") == weights_hash(without)
    assert [path.name for path in tmp_path.glob("first-*")] == ["first-0-of-2"]
    told = [line for line in ended[0].output.splitlines() if "Faulty" in line]
    assert len(told) == 1
    assert "callback_case:Faulty.on_step failed and is not called again: SystemExit: cannot count to 2" in told[0]
    assert "callback_case.py" in told[0]
    assert "Faulty" not in ended[1].output

    seen = recorded(tmp_path, 0)
    steps = [facts for method, facts in seen if method == "on_step"]
    logged = metrics(tmp_path / "run")
    for key in ("step", "tokens", "loss", "lr", "grad_norm", "seq_len", "stage"):
        assert [facts[key] for facts in steps] == [row[key] for row in logged], key
    assert all(facts["applied"] for facts in steps)
    held_out = [facts for method, facts in seen if method == "on_validation"]
    assert [facts["loss"] for facts in held_out] == [row["loss"] for row in metrics(tmp_path / "run", "valid")]
    assert [Path(facts["folder"]).name for method, facts in seen if method == "on_checkpoint"] == [
        "step000000004",
        "step000000008",
    ]
    assert all((Path(facts["folder"]) / "manifest.json").is_file() for m, facts in seen if m == "on_checkpoint")
    assert [method for method, _ in seen[:3]] == ["made", "on_start", "on_step"]
    assert seen[1][1]["total_tokens"] == 2048
    assert (seen[-1][0], seen[-1][1]["status"], seen[-1][1]["code"]) == ("on_end", "done", 0)
    assert [method for method, _ in recorded(tmp_path, 1)] == [method for method, _ in seen]


def test_stop_run_ends_all_processes_and_the_run_resumes_without_it(
    corpus: Path, without: Path, tmp_path: Path
) -> None:
    ended = run_ranks(train, 2, config=run(corpus, tmp_path, [call("Stopper", step=3, rank=1)]))
    assert values(ended) == [75, 75]
    assert "callback_case:Stopper.on_step ends the run: enough" in ended[1].output
    assert events(tmp_path / "run")[-1] == "preempted"
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2, 3]
    ended = run_ranks(train, 2, config=run(corpus, tmp_path, []))
    assert values(ended) == [0, 0]
    assert "changed since: callbacks from" in ended[0].output
    assert numbers(tmp_path / "run") == numbers(without)
    assert weights_hash(tmp_path / "run") == weights_hash(without)


@pytest.mark.slow  # the others give the first process 10 s to speak
def test_one_that_cannot_be_made_on_a_process_ends_all_at_the_start(corpus: Path, tmp_path: Path) -> None:
    ended = run_ranks(train, 2, config=run(corpus, tmp_path, ["callback_case:Unmakeable"]))
    assert values(ended) == [2, 2]
    for end in ended:
        assert "the callbacks cannot be made: process 1: OSError: no such device" in end.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("no_such_module:Some", r"the module no_such_module cannot be imported from here \(ModuleNotFoundError"),
        ("callback_case:Recoder", r"callback_case has no class Recoder: did you mean Recorder\?"),
        ("callback_case:function", "function is a builtin_function_or_method and not a class"),
        ("callback_case:Misspelt", r"nothing calls on_steps: did you mean on_step\?"),
        ("callback_case:TwoArguments", "on_step must take one argument, the event: missing a required argument"),
        ("callback_case:Async", "on_step is async"),
        ("callback_case:Idle", "it has none of on_start, on_step"),
        ("callback_case:Recorder", "Recorder does not take these settings: missing a required argument: 'folder'"),
        (call("Faulty", depth=3), "Faulty does not take these settings: .*'depth'"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(entry: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_callbacks([CallbackConfig.model_validate(entry)])


def test_the_configuration_takes_both_forms(corpus: Path, tmp_path: Path) -> None:
    config = load_config(run(corpus, tmp_path, ["callback_case:Idle", call("First", folder="x")]))
    assert [(entry.call, entry.settings) for entry in config.callbacks] == [
        ("callback_case:Idle", {}),
        ("callback_case:First", {"folder": "x"}),
    ]
    assert parse_config(settings(corpus, tmp_path)).callbacks == ()
    with pytest.raises(UserError, match=r"callbacks\.0\.call: .*got 'callback_case'"):
        load_config(run(corpus, tmp_path, ["callback_case"]))


def train_here(config: str, folder: str) -> int:
    """Runs in the ranks: the command in the working directory ``folder``."""
    import os

    os.chdir(folder)
    return train(config)


def test_the_example_of_the_documentation(corpus: Path, tmp_path: Path) -> None:
    text = (REPOSITORY / "docs" / "training.md").read_text(encoding="utf-8")
    section = text.partition("\n## Callbacks\n")[2].partition("\n## ")[0]
    (source,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (tmp_path / "watch.py").write_text(source)
    callbacks = [{"call": "watch:StopWhenGood", "settings": {"perplexity": 1e9}}, "watch:Journal"]
    assert "watch:StopWhenGood, settings: {perplexity:" in section
    ended = run_ranks(train_here, 1, config=run(corpus, tmp_path, callbacks), folder=str(tmp_path))
    assert values(ended) == [75]
    assert re.search(r"watch:StopWhenGood.on_validation ends the run: perplexity [\d.]+ at step 4", ended[0].output)
    (line,) = (tmp_path / "run" / "journal.txt").read_text().splitlines()
    assert line.split()[0] == "4"
