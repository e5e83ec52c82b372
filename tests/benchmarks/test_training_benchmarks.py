"""The benchmarks of training: what they compute from times, and one short run of each."""

from __future__ import annotations

import json
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
from training_case import settings, write_config, write_corpus

from benchmarks.curriculum import __main__ as curriculum
from benchmarks.curriculum.curves import curve, reached, summary
from benchmarks.training import __main__ as training
from benchmarks.turns import TurnTaker
from data_pipeline.errors import UserError
from pretrain.callbacks import find_class
from pretrain.config import CallbackConfig


def points(*pairs: tuple[float, float]) -> list[dict[str, float]]:
    return [{"tokens": 0, "seconds": seconds, "loss": loss} for seconds, loss in pairs]


def test_a_loss_is_reached_between_two_points() -> None:
    line = points((10, 5.0), (20, 4.0), (30, 4.5), (40, 3.0))
    assert reached(line, 4.25) == 17.5
    assert reached(line, 4.0) == 20
    assert reached(line, 3.5) == pytest.approx(30 + 10 * 1.0 / 1.5)
    assert reached(line, 6.0) == 10
    assert reached(line, 2.9) is None


def test_the_ratio_is_of_the_fixed_runs_time() -> None:
    curves = {"fixed": points((50, 4.5), (100, 4.0)), "curriculum": points((40, 4.2), (80, 3.8))}
    assert summary(curves)["ratio"] == pytest.approx(0.6)
    assert summary({**curves, "curriculum": points((40, 4.2))})["ratio"] is None


def test_validation_does_not_count_as_training(tmp_path: Path) -> None:
    lines = [
        {"kind": "train", "step": 2},
        {"kind": "valid", "step": 2, "tokens": 20, "loss": 5.0, "longest_loss": 6.0, "took": 7.0},
        {"kind": "valid", "step": 3, "tokens": 30, "loss": None, "took": 0.0},  # not finite: no point
        {"kind": "valid", "step": 4, "tokens": 40, "loss": 4.0, "took": 3.0},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    # The validation after the second step falls into the third one's time; behind the last there is none.
    assert curve(path, [1.0, 1.5, 8.0, 3.0]) == [
        {"tokens": 20, "seconds": 2.5, "loss": 6.0},
        {"tokens": 40, "seconds": 6.5, "loss": 4.0},
    ]


def test_a_process_steps_when_it_is_its_turn() -> None:
    """Both ends in one process: turns are sent before they are waited for."""
    ours, theirs = Pipe()
    taker = TurnTaker(theirs)
    ours.send(2)
    taker.begin()
    assert ours.recv() == []
    ours.send(3)
    taker.step_done()
    taker.step_done()
    first = ours.recv()
    taker.step_done()
    taker.report()  # the training ended within its turn
    assert (len(first), len(ours.recv())) == (2, 1)
    assert all(seconds > 0 for seconds in first)


def test_the_callback_is_one_that_a_run_accepts() -> None:
    find_class(CallbackConfig(call="benchmarks.turns:StepInTurn"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": {}}, "has no data.valid"),
        ({"curriculum": [{"until_tokens": 2048, "seq_len": 64, "micro_batch": 2}]}, "has one length only, 64"),
    ],
)
def test_nothing_to_compare_is_said(corpus: Path, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    base = {"data": {"valid": str(corpus / "valid")}, **changes}
    path = write_config(tmp_path / "run.yaml", settings(corpus, tmp_path, **base))
    with pytest.raises(UserError, match=words):
        curriculum.main(["--config", path])


def test_contenders_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no 'zero4'; there are plain-fp32"):
        training.main(["--contenders", "zero4"])
    with pytest.raises(UserError, match="must be a file"):
        training.main(["--out", str(tmp_path)])


@pytest.mark.slow
def test_both_run(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "training.json"
    sizes = ["--hidden-size", "64", "--layers", "1", "--seq-len", "64", "--steps", "2", "--rounds", "2"]
    assert training.main([*sizes, "--contenders", "zero1-fp32", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["contender"] for row in rows] == ["plain-fp32", "zero1-fp32"]
    assert rows[0]["ratio_to_plain"] == 1.0
    assert all(len(row["all_seconds_per_step"]) == 2 for row in rows)

    config = write_config(
        tmp_path / "run.yaml", settings(corpus, tmp_path, zero_stage=1, data={"valid": str(corpus / "valid")})
    )
    out, picture = tmp_path / "curriculum.json", tmp_path / "curriculum.svg"
    assert curriculum.main(["--config", config, "--points", "4", "--out", str(out), "--picture", str(picture)]) == 0
    (pair,) = json.loads(out.read_text())["pairs"]
    for points_of_run in pair["curves"].values():
        assert [point["tokens"] for point in points_of_run] == [512, 1024, 1536, 2048]
        seconds = [point["seconds"] for point in points_of_run]
        assert seconds == sorted(seconds)
        assert seconds[0] > 0
    assert picture.read_text().count("<svg") == 1
    assert "of its time" in capsys.readouterr().out
