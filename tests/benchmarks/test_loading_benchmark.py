"""The loading benchmark: it runs small, everybody reads the same rows, and mistakes are named."""

from __future__ import annotations

import importlib.util
import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.loading import __main__ as cli
from benchmarks.loading.contenders import CONTENDERS, loader
from benchmarks.loading.corpus import Corpus, write_corpus
from data_pipeline.errors import UserError, run_cli
from data_pipeline.shards.shardset import ShardSet, verify_shards

SMALL = ["--rows", "64", "--seq-len", "16", "--batch-rows", "4", "--batches", "8", "--rounds", "2"]
SMALL += ["--seconds", "0.1"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp("loading"), 64, 16, 4, shard_tokens=500)


def test_the_tokens_are_proper_shards(corpus: Corpus) -> None:
    for folder in (corpus.shards, *corpus.sources):
        assert verify_shards(folder) == []
    shards = ShardSet.open(corpus.shards)
    assert shards.num_tokens == 64 * 16 + 1
    np.testing.assert_array_equal(np.fromfile(corpus.flat, dtype="<u2"), np.concatenate(list(shards.chunks())))


def rows_of(batch: Any) -> list[bytes]:
    tokens = batch.input_ids if hasattr(batch, "input_ids") else batch
    tokens = np.asarray(tokens)
    assert (tokens.shape, tokens.dtype) == ((4, 16), np.int64)
    return [row.tobytes() for row in tokens]


@pytest.mark.parametrize("name", ["bare", "clm", "datasets", "datatrove", "grain", "litdata", "streaming"])
def test_an_epoch_of_every_contender_is_the_same_rows(corpus: Corpus, name: str) -> None:
    needs = CONTENDERS[name].needs
    if needs is not None and importlib.util.find_spec(needs) is None:
        pytest.skip(f"{needs} is not installed")
    stream = np.fromfile(corpus.flat, dtype="<u2").astype(np.int64)
    expected = sorted(row.tobytes() for row in stream[: 64 * 16].reshape(64, 16))
    batches = CONTENDERS[name].batches(corpus)
    assert sorted(row for batch in islice(batches, 16) for row in rows_of(batch)) == expected


@pytest.mark.parametrize("name", ["mlm", "packed", "mixture"])
def test_other_forms_of_ours_go_on_without_end(corpus: Corpus, name: str) -> None:
    batches = list(islice(CONTENDERS[name].batches(corpus), 100))
    assert len(batches) == 100
    assert (batches[-1].document_ids is not None) == (name == "packed")
    assert ((batches[-1].labels == -100).sum() > 32) == (name == "mlm")


def test_a_run_that_goes_on_begins_where_it_says(corpus: Corpus) -> None:
    assert loader(corpus, samples=10_000_000).batch_at(160_000_000).sample_ids[0] == 160_000_000
    assert next(iter(loader(corpus, samples=10_000_000))).tokens_before == 160_000_000


@pytest.mark.slow
def test_it_measures_prints_and_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "POSITIONS", (0, 1000))  # of so small a corpus 10,000,000 rows are many epochs
    out = tmp_path / "loading.json"
    assert cli.main([*SMALL, "--contenders", "bare,clm,packed,grain", "--work", str(tmp_path), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "| ours, packed documents |" in printed
    found = json.loads(out.read_text())
    assert found["provenance"]["command"].startswith("python -m benchmarks.loading --rows 64")
    by_name = {row["contender"]: row for row in found["rows"]}
    assert by_name["bare"]["ratio_to_bare"] == 1.0
    assert len(by_name["clm"]["all_million_tokens_per_second"]) == 2
    assert ("grain" in found["skipped"]) == (importlib.util.find_spec("grain") is None)
    assert {(row["contender"], row["after_rows"]) for row in found["first_batch"]} == {
        (name, rows) for name in ("clm", "packed") for rows in (0, 1000)
    }
    assert len(found["goals"]) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["loading.json"]  # the scratch folder is gone


def test_goals_decide_the_exit_status(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = [*SMALL, "--contenders", "bare,clm", "--check"]
    monkeypatch.setattr(cli, "GOAL_RATIO", 1e9)
    assert cli.main(arguments) == 1
    monkeypatch.setattr(cli, "GOAL_RATIO", 0.0)
    monkeypatch.setattr(cli, "GOAL_FIRST_BATCH", 60.0)
    assert cli.main(arguments) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--contenders", "bare,fast"], "--contenders: no 'fast'; there are bare, clm"),
        (["--rounds", "0"], "--rounds 0: must be at least 1"),
        (["--rows", "8", "--batch-rows", "16"], "--rows at least --batch-rows"),
        (["--seconds", "0"], "--seconds 0.0: must be a positive number"),
        (["--out", "/nowhere/at/all.json"], "must be a file in a folder that is there"),
    ],
)
def test_mistakes_are_named(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        cli.main(arguments)


def test_it_is_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(cli.main, "benchmarks.loading", ["--contenders", "nobody"]) == 2
    assert "benchmarks.loading: error: --contenders: no 'nobody'" in capsys.readouterr().err
