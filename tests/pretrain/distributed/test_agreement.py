"""Processes of one run that were started differently are told apart before anything is built."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from ranks import run_ranks, values
from training_case import settings, write_config

from data_pipeline.errors import run_cli
from pretrain.distributed.agreement import differences, flat


def start(config: str, overrides: list[str], code: str) -> int:
    """Runs in the ranks: the second one gets other words, or has other code."""
    from pretrain import machine
    from pretrain.cli import main

    mine = os.environ["RANK"] == "1"
    if mine and code:
        versions = machine._version
        machine._version = lambda name: code if name == "torch" else versions(name)
    return run_cli(main, "nystrom train", ["--config", config, *(["--set", *overrides] if mine and overrides else [])])


@pytest.mark.slow
def test_another_setting_on_one_process_is_named(corpus: Path, tmp_path: Path) -> None:
    """It trained on, each process with a learning rate of its own, and ended with status 0."""
    config = write_config(tmp_path / "run.yaml", settings(corpus, tmp_path))
    ended = run_ranks(start, 2, config=config, overrides=["optimizer.lr=0.02"], code="", timeout=60)
    assert [end.value for end in ended] == [2, 2]
    for end in ended:
        assert "process 1 (host " in end.output
        assert "was started differently from process 0 (host " in end.output
        assert "optimizer.lr is 0.02 instead of 0.01. All processes" in end.output
        assert "Traceback" not in end.output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_another_package_on_one_process_is_named(corpus: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", settings(corpus, tmp_path))
    ended = run_ranks(start, 2, config=config, overrides=[], code="1.0", timeout=60)
    assert [end.value for end in ended] == [2, 2]
    assert 'package torch is "1.0" instead of "' in ended[0].output
    assert values(run_ranks(start, 2, config=config, overrides=["optimizer.lr=0.01"], code="")) == [0, 0]


def test_differences_are_named_by_key_and_counted() -> None:
    first = flat({"a": {"b": 1, "c": [1, 2]}, "d": None, "e": {}})
    assert first == {"a.b": "1", "a.c": "[1, 2]", "d": "null", "e": "{}"}
    assert differences(first, first) == []
    assert differences(first, {**first, "a.b": "2"}) == ["a.b is 2 instead of 1"]
    assert differences(first, {"a.b": "1", "a.c": "[1, 2]", "e": "{}"}) == ["d is absent instead of null"]
    many = differences({}, {str(number): "1" for number in range(8)})
    assert len(many) == 6
    assert many[-1] == "and 3 more"
