"""What earlier versions wrote is read by this one: the folders ``tests/fixtures/v*``, made by ``make_v*.py`` there."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import make_v1
import pytest
import torch
from old_formats_case import first_batch_hash, logits_of, losses, resume
from pydantic import ValidationError
from ranks import run_ranks, values

from pretrain.model.config import REMOVED, ModelConfig

REPOSITORY = Path(__file__).resolve().parent.parent
VERSIONS = sorted(path.name for path in (REPOSITORY / "tests" / "fixtures").glob("v*") if path.is_dir())
MAKERS = {"v1": make_v1}
"""The module that made each folder: it has the configurations of the runs."""
CHANGED = {("v1", "masked"): {"masked_loss": 5.865864891754954, "masked_perplexity": 352.7871121868276}}
"""Metrics that today's code gives otherwise. v1 had segments of ceil(n / m) tokens: masked loss 5.865587."""
RUNS = [(version, name) for version in VERSIONS for name in MAKERS[version].RUNS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Gives a copy of a version's folder: what is read may be written beside."""
    copies: dict[str, Path] = {}

    def copy(version: str) -> Path:
        if version not in copies:
            copies[version] = tmp_path_factory.mktemp("old") / version
            shutil.copytree(REPOSITORY / "tests" / "fixtures" / version, copies[version])
        return copies[version]

    return copy


def expected(version: str) -> dict[str, Any]:
    return json.loads((REPOSITORY / "tests" / "fixtures" / version / "expected.json").read_text())


def test_there_is_a_folder_of_every_version() -> None:
    assert sorted(MAKERS) == VERSIONS


def test_the_repository_has_every_file_of_them() -> None:
    """A pattern of .gitignore may match a name that a run's folder happens to use."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "tests/fixtures"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout: nothing says which files belong to it")
    tracked = set(listed.stdout.split("\0"))
    there = [path for version in VERSIONS for path in (REPOSITORY / "tests" / "fixtures" / version).rglob("*")]
    assert [str(path) for path in there if path.is_file() and str(path.relative_to(REPOSITORY)) not in tracked] == []


@pytest.mark.parametrize("version", VERSIONS)
def test_shards_are_whole_and_give_the_same_batch(folder: Any, version: str) -> None:
    from data_pipeline.cli import main
    from data_pipeline.shards.shardset import ShardSet

    shards = folder(version) / "shards"
    assert not main(["verify", str(shards)])
    assert first_batch_hash(shards) == expected(version)["first_batch"]
    opened = ShardSet.open(shards)
    text = "".join(opened.tokenizer().decode(ids) for ids in opened.documents())
    assert "Licensed under the Apache License, Version 2.0" in text


@pytest.mark.parametrize(("version", "name"), RUNS)
def test_a_checkpoint_gives_the_same_logits(folder: Any, version: str, name: str) -> None:
    run = folder(version) / "runs" / name
    want = torch.tensor(expected(version)[name]["logits"])
    newest = run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()
    for path in (run, newest):  # the export, and the sharded checkpoint
        torch.testing.assert_close(torch.tensor(logits_of(path)), want, rtol=0, atol=1e-5)
    averaged = run / "export-ema"
    if averaged.is_dir():
        assert not torch.allclose(torch.tensor(logits_of(averaged)), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("version", "name"), RUNS)
def test_a_run_resumes(folder: Any, tmp_path: Path, version: str, name: str) -> None:
    maker, home = MAKERS[version], tmp_path / version
    shutil.copytree(folder(version), home)
    maker.write_config(home / "run.yaml", name, maker.STEPS + maker.MORE)
    processes = maker.PROCESSES[name]
    assert values(run_ranks(resume, processes, config="run.yaml", folder=str(home))) == [0] * processes
    # Weights, moments, masks and order of the rows are in these. Without the moments the last is off by 3e-3 of itself.
    assert losses(home / "runs" / name)[maker.STEPS :] == pytest.approx(expected(version)[name]["losses"], rel=1e-5)


@pytest.mark.parametrize(("version", "name"), RUNS)
def test_a_result_is_read_and_compared_with_one_of_today(
    folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, name: str
) -> None:
    from eval.cli import main
    from eval.results.records import read_records
    from eval.results.schema import read_result

    monkeypatch.chdir(folder(version))  # the run's configuration names its data relative to it
    run = Path("runs", name)
    old = read_result(run / "eval" / "lm.json")
    assert read_records(run / "eval" / "lm.json")
    assert main(["lm", "--checkpoint", str(run), "--max-tokens", "512", "--out", str(tmp_path)]) == 0
    new = read_result(tmp_path / "lm.json")
    # The unigram entropy was of the scored tokens alone, and is of the whole text.
    then, now = ({k: m.value for k, m in r.metrics.items() if k != "unigram_entropy"} for r in (old, new))
    assert now == pytest.approx(then | CHANGED.get((version, name), {}), rel=1e-5)
    out = tmp_path / "compared.json"
    status = main(["compare", str(run), str(tmp_path), "--out", str(out)])
    (suite,) = json.loads(out.read_text())["suites"]
    if old.version != new.version:  # another way to the interval or the ids of items: told, and not compared
        assert status == 1
        assert f"versions {old.version} and {new.version} of the task" in suite["refused"]
        return
    assert status == 0
    assert not suite["refused"]
    for metric in suite["metrics"]:
        assert math.isclose(metric["a"], then[metric["metric"]], rel_tol=1e-5)
        assert math.isclose(metric["b"], now[metric["metric"]], rel_tol=1e-5)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_report_shows_them(folder: Any, tmp_path: Path, version: str) -> None:
    from eval.report.cli import main

    runs = [folder(version) / "runs" / name for name in MAKERS[version].RUNS]
    main([*map(str, runs), "--out", str(tmp_path / "report.html")])
    page = (tmp_path / "report.html").read_text()
    for run in runs:
        loss = json.loads((run / "eval" / "lm.json").read_text())["metrics"]
        assert f"{next(iter(loss.values()))['value']:.4g}"[:5] in page
        assert run.name in page


@pytest.mark.parametrize(("key", "value"), REMOVED.items())
def test_a_removed_key_is_read_where_it_meant_nothing(key: str, value: Any) -> None:
    given = {"objective": "clm", "vocab_size": 48}
    assert ModelConfig.model_validate(given | {key: value}) == ModelConfig.model_validate(given)
    with pytest.raises(ValidationError, match=key):
        ModelConfig.model_validate(given | {key: 8})
