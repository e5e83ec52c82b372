"""Saving a checkpoint survives full disks, lost processes and damaged files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks, values
from striking_case import PLACES, assert_equal_runs, exit_codes, run_settings, status, steps, train, train_struck, wrap
from training_case import events, metrics, settings, write_config


def train_with_failing_saves(config: str, fails: list[int], rank: int) -> int:
    """Runs in the ranks: as :func:`train`, but one of them cannot write files of more than 8 KiB in some saves."""
    import resource

    from pretrain.checkpoint.store import Checkpoints

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    save, count = Checkpoints.save, 0

    def limited(self: Any, *args: Any) -> Any:
        nonlocal count
        count += 1
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        if count in fails and int(os.environ["RANK"]) == rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
        try:
            return save(self, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    Checkpoints.save = limited  # type: ignore[method-assign]
    return train(config)


# --- a disk that does not take it -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_save_that_fails_on_one_process_costs_nothing_but_the_checkpoint(
    corpus: Path, tmp_path: Path, whole: Path, rank: int
) -> None:
    config = write_config(tmp_path / "run.yaml", run_settings(corpus, tmp_path))
    ended = run_ranks(train_with_failing_saves, 2, config=config, fails=[2, 4], rank=rank, timeout=60)
    assert values(ended) == [74, 74]  # the last one was among them
    run, output = tmp_path / "run", ended[0].output
    assert f"step 4: the checkpoint is NOT saved: process {rank}: " in output
    assert "File too large. A checkpoint needs about 1." in output
    assert "free; the newest checkpoint is step000000002.\n" in output
    assert "Training continues; the next checkpoint is tried when it is due." in output
    assert "stopped at step 8 WITHOUT a checkpoint of it: the steps after 6 are lost. Free space in" in output
    assert "Traceback" not in output + ended[1].output
    assert events(run).count("save_failed") == 2
    assert steps(run) == [2, 6]  # nothing torn, nothing pruned for what was not written
    assert (status(run)["state"], status(run)["code"]) == ("not_saved", 74)
    assert values(run_ranks(train, 2, config=config)) == [0, 0]
    assert_equal_runs(run, whole)


def export_cannot_be_written(config: str, times: int) -> int:
    """Runs in the ranks: as :func:`train`, on a disk that has no room for the export."""
    import errno

    def fail() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if times:
        wrap(PLACES["exporting"], fail)
    return train(config)


def test_an_export_that_fails_is_made_by_the_next_start(corpus: Path, tmp_path: Path, whole: Path) -> None:
    config = write_config(tmp_path / "run.yaml", run_settings(corpus, tmp_path))
    ended = run_ranks(export_cannot_be_written, 2, config=config, times=1)
    assert values(ended) == [74, 74]
    assert "the export is NOT written: [Errno 28] No space left on device. Free space, then run" in ended[0].output
    assert status(tmp_path / "run")["state"] == "not_saved"
    assert values(run_ranks(train, 2, config=config)) == [0, 0]
    assert_equal_runs(tmp_path / "run", whole)


def crowded_disk(config: str, room: int) -> int:
    """Runs in the ranks: as :func:`train`, on a disk where checkpoints have ``room`` bytes in all."""
    from pretrain.checkpoint import store

    def free(root: Path) -> int:
        return room - sum(file.stat().st_size for file in root.rglob("*") if file.is_file())

    store.free_bytes = free
    return train(config)


def checkpoint_size(run: Path) -> int:
    """Bytes of the newest checkpoint's files, as its manifest counts them."""
    manifest = json.loads((run / "checkpoints" / "step000000008" / "manifest.json").read_text())
    return sum(entry["bytes"] for entry in manifest["files"].values())


def test_room_for_a_checkpoint_is_made_as_long_as_a_whole_one_stays(corpus: Path, tmp_path: Path, whole: Path) -> None:
    """Room for two checkpoints where keep_last is 2: the older one has to go before the new one, not after it."""
    from pretrain.checkpoint.store import with_margin

    room = checkpoint_size(whole) + with_margin(checkpoint_size(whole)) + 50_000  # manifests, and zero_to_fp32.py
    config = write_config(tmp_path / "run.yaml", run_settings(corpus, tmp_path, zero_stage=1))
    ended = run_ranks(crowded_disk, 2, config=config, room=room)
    assert values(ended) == [0, 0]
    assert events(tmp_path / "run").count("save_failed") == 0
    assert steps(tmp_path / "run") == [6, 8]


def test_a_checkpoint_that_cannot_fit_is_not_begun(corpus: Path, tmp_path: Path) -> None:
    """The estimate before the first checkpoint, then the size of the last one; the one that is there stays."""
    config = write_config(
        tmp_path / "run.yaml", run_settings(corpus, tmp_path, checkpoint={"every_tokens": 512, "keep_last": 1})
    )
    ended = run_ranks(crowded_disk, 2, config=config, room=1 << 20)
    assert values(ended) == [74, 74]
    output = ended[0].output
    assert (
        "step 2: the checkpoint is NOT saved: not enough free space, so nothing was written. A checkpoint needs"
        in output
    )
    assert "has 1.0 MiB free; there is no checkpoint yet." in output
    assert "all steps so far are lost" in output
    assert [row["needed"] > row["free"] > 0 for row in metrics(tmp_path / "run", "event") if "needed" in row] == [
        True
    ] * 4
    ended = run_ranks(crowded_disk, 2, config=config, room=(1 << 20) + 200_000)
    assert values(ended) == [74, 74]
    assert steps(tmp_path / "run") == [2]


def size_and_estimate(config: str) -> tuple[float, float]:
    """Runs in the ranks: bytes of a checkpoint after a step, and what the engine expected."""
    import torch

    from pretrain.config import load_config
    from pretrain.distributed.world import World, read_rank
    from pretrain.engine.training import TrainingEngine

    run = load_config(config)
    world = World(read_rank())
    engine = TrainingEngine(run, world)
    engine.train()
    ids = torch.ones(1, 32, dtype=torch.int64)
    engine.backward(ids, ids, 1.0)
    engine.step(1e-3)
    (expected,) = world.sum([engine.checkpoint_bytes()])
    run.run_dir.mkdir(parents=True, exist_ok=True)
    engine.save(run.run_dir, "here")
    world.barrier()
    size = sum(file.stat().st_size for file in (run.run_dir / "here").iterdir())
    world.close()
    return size, expected


@pytest.mark.parametrize(
    ("zero_stage", "precision"),
    [
        (2, "bf16"),
        *[
            pytest.param(stage, precision, marks=pytest.mark.slow)
            for stage, precision in [(0, "fp32"), (1, "bf16"), (1, "fp32"), (2, "fp32"), (3, "bf16"), (3, "fp32")]
        ],
    ],
)
def test_the_estimate_of_a_first_checkpoint_s_size(
    corpus: Path, tmp_path: Path, zero_stage: int, precision: str
) -> None:
    changes = {"zero_stage": zero_stage, "precision": precision, "model": {"vocab_size": 3000, "hidden_size": 64}}
    config = write_config(tmp_path / "run.yaml", settings(corpus, tmp_path, **changes))
    for size, expected in values(run_ranks(size_and_estimate, 2, config=config)):
        assert expected == pytest.approx(size, rel=0.03)


# --- a process that is gone -------------------------------------------------------------------------------------------

KILLS = [
    # (place, rank, arrival at that place, step of the newest whole checkpoint afterwards)
    ("writing", 1, 3, 2),  # of the second checkpoint: each process writes its shard and its generators
    ("writing", 0, 4, 2),
    ("hashing", 0, 2, 2),
    ("hashing", 1, 2, 2),
    ("pointing", 0, 2, 4),
    ("pruning", 0, 1, 6),
    ("exporting", 0, 1, 8),
]


@pytest.mark.parametrize(
    ("place", "rank", "call", "left"),
    [KILLS[1], *[pytest.param(*kill, marks=pytest.mark.slow) for kill in KILLS if kill != KILLS[1]]],
)
def test_a_process_killed_in_a_save_costs_the_steps_since_the_last_one(
    corpus: Path, tmp_path: Path, whole: Path, place: str, rank: int, call: int, left: int
) -> None:
    from pretrain.checkpoint import commit

    config = write_config(tmp_path / "run.yaml", run_settings(corpus, tmp_path))
    clock = tmp_path / "clock"
    struck: dict[str, Any] = {"number": signal.SIGKILL, "ranks": [rank], "clock": str(clock), "call": call}
    ended = run_ranks(train_struck, 2, config=config, place=place, timeout=90, **struck)
    assert time.time() - clock.stat().st_mtime < 60
    assert ended[rank].code == -9
    assert exit_codes(ended)[1 - rank] == 1
    assert "another process of this run went away" in ended[1 - rank].output
    assert "Traceback" not in ended[1 - rank].output
    found = commit.newest(tmp_path / "run" / "checkpoints")
    assert found is not None
    assert found[1].state.step == left
    ended = run_ranks(train, 2, config=config)
    assert values(ended) == [0, 0]
    assert f"Resumes from {found[0]}: step {left}" in ended[0].output
    assert_equal_runs(tmp_path / "run", whole)
    assert steps(tmp_path / "run") == [6, 8]


# --- files that are not what they were --------------------------------------------------------------------------------

FILES = (
    "mp_rank_00_model_states.pt",
    "zero_pp_rank_1_mp_rank_00_optim_states.pt",
    "rng_rank_00001.pt",
    "manifest.json",
)


def damage(path: Path, how: str) -> None:
    contents = path.read_bytes()
    if how == "truncated":
        path.write_bytes(contents[: len(contents) // 2])
    elif how == "emptied":
        path.write_bytes(b"")
    else:
        middle = len(contents) // 2
        path.write_bytes(contents[:middle] + bytes([contents[middle] ^ 1]) + contents[middle + 1 :])


@pytest.mark.parametrize("how", ["truncated", "flipped", "emptied"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_found_and_the_checkpoint_before_used(
    tmp_path: Path, whole: Path, name: str, how: str
) -> None:
    from pretrain.checkpoint.store import Checkpoints
    from pretrain.distributed.world import Rank, World

    root = tmp_path / "checkpoints"
    shutil.copytree(whole / "checkpoints", root)
    damage(root / "step000000008" / name, how)
    alone = World.__new__(World)  # without a process group, which one process does not need to read files
    alone.rank, alone.world_size, alone.is_first = Rank().rank, Rank().world_size, Rank().is_first
    found, passed_over = Checkpoints(root, alone, 2).find()
    assert found is not None
    assert found[0].name == "step000000006"
    (line,) = passed_over
    assert f"checkpoint {root / 'step000000008'} is not used: " in line
    what = "its manifest is damaged" if name == "manifest.json" else name
    assert what in line


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_run_with_a_damaged_checkpoint_goes_on_from_the_one_before(
    corpus: Path, tmp_path: Path, whole: Path, name: str
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "export" / "export.json").unlink()
    damage(tmp_path / "run" / "checkpoints" / "step000000008" / name, "flipped")
    ended = run_ranks(train, 2, config=write_config(tmp_path / "run.yaml", run_settings(corpus, tmp_path)))
    assert values(ended) == [0, 0]
    assert "step000000008 is not used: " in ended[0].output
    assert "step000000006: step 6" in ended[0].output
    assert_equal_runs(tmp_path / "run", whole)


@pytest.mark.parametrize("contents", ["step000000099", "", None])
def test_latest_is_for_people_only(corpus: Path, tmp_path: Path, whole: Path, contents: str | None) -> None:
    from pretrain.checkpoint import commit

    root = tmp_path / "checkpoints"
    shutil.copytree(whole / "checkpoints", root)
    (root / "latest").unlink()
    if contents is not None:
        (root / "latest").write_text(contents)
    found = commit.newest(root)
    assert found is not None
    assert found[1].state.step == 8


# --- by the clock -----------------------------------------------------------------------------------------------------


def train_killed(config: str) -> int:
    """Runs in the ranks: the last one is killed in the fifth step."""
    from test_run import train_until

    return train_until(config, 5, "kill")


def test_without_a_word_about_it_a_checkpoint_is_saved_by_the_clock() -> None:
    from pretrain.config.outputs import CheckpointConfig

    assert CheckpointConfig().minutes == 30
    assert CheckpointConfig(every_tokens=100).minutes is None
    assert CheckpointConfig(every_tokens=100, every_minutes=5).minutes == 5
    assert CheckpointConfig(every_minutes=0).minutes is None
    said = "Checkpoints: every 30 minutes (checkpoint.every_minutes) and at the end; the last 2 stay."
    assert CheckpointConfig().describe() == said
    both = CheckpointConfig(every_tokens=1000, every_minutes=5, keep_last=3).describe()
    assert both == "Checkpoints: every 1,000 tokens and every 5 minutes and at the end; the last 3 stay."


@pytest.mark.slow
def test_one_that_the_clock_asked_for_resumes_to_the_bit(corpus: Path, tmp_path: Path, whole: Path) -> None:
    """The first process's clock decides for all; here one is due at each step."""
    changes: dict[str, Any] = {"checkpoint": {"every_tokens": None, "every_minutes": 1e-6}}
    config = write_config(tmp_path / "run.yaml", run_settings(corpus, tmp_path, **changes))
    ended = run_ranks(train_killed, 2, config=config, timeout=60)
    assert ended[1].code == -9
    assert "Checkpoints: every 1e-06 minutes and at the end; the last 2 stay." in ended[0].output
    assert steps(tmp_path / "run") == [3, 4]
    assert values(run_ranks(train, 2, config=config)) == [0, 0]
    assert_equal_runs(tmp_path / "run", whole)
    assert [row["step"] for row in metrics(tmp_path / "run", "event") if row["event"] == "checkpoint"][-3:] == [6, 7, 8]
