"""A checkpoint is what its manifest says, or it is none."""

from __future__ import annotations

import errno
import itertools
import json
import random
from pathlib import Path

import pytest

from data_pipeline.files import hash_file
from pretrain.checkpoint import commit
from pretrain.checkpoint.commit import Manifest, TrainState


def make(root: Path, step: int, contents: bytes = b"weights") -> Path:
    folder = root / commit.tag_name(step)
    folder.mkdir(parents=True)
    (folder / "model.pt").write_bytes(contents)
    (folder / "rng_rank_00000.pt").write_bytes(b"random")
    names = commit.data_files(folder)
    commit.fsync_files(folder, names)
    files = {name: hash_file(folder, name) for name in names}
    commit.commit(root, Manifest(folder.name, TrainState(step=step, tokens=10 * step), {"world_size": 1}, files))
    commit.write_latest(root, folder.name)
    return folder


def test_round_trip(tmp_path: Path) -> None:
    folder = make(tmp_path, 7)
    manifest = Manifest.read(folder)
    assert manifest.state == TrainState(step=7, tokens=70)
    assert set(manifest.files) == {"model.pt", "rng_rank_00000.pt"}
    assert commit.problem_with(folder, manifest, manifest.files) is None
    assert (tmp_path / "latest").read_text() == folder.name
    assert commit.newest(tmp_path) == (folder, manifest)


def test_without_a_manifest_it_is_no_checkpoint(tmp_path: Path) -> None:
    older, newer = make(tmp_path, 1), make(tmp_path, 2)
    (newer / commit.MANIFEST).unlink()
    found = list(commit.candidates(tmp_path))
    assert found[0] == (newer, "it has no manifest: the save did not finish")
    newest = commit.newest(tmp_path)
    assert newest is not None
    assert newest[0] == older


def test_a_truncated_file_is_seen_by_size(tmp_path: Path) -> None:
    make(tmp_path, 1)
    newer = make(tmp_path, 2)
    (newer / "model.pt").write_bytes(b"weigh")
    folder, problem = next(commit.candidates(tmp_path))
    assert (folder, problem) == (newer, "model.pt has 5 bytes, the manifest says 7")


def test_a_flipped_bit_is_seen_by_checksum(tmp_path: Path) -> None:
    folder = make(tmp_path, 1)
    (folder / "model.pt").write_bytes(b"weightz")
    manifest = Manifest.read(folder)
    assert commit.problem_with(folder, manifest, manifest.files) == "model.pt does not match its checksum"


def test_a_missing_file_is_seen(tmp_path: Path) -> None:
    folder = make(tmp_path, 1)
    (folder / "model.pt").unlink()
    assert next(commit.candidates(tmp_path)) == (folder, "model.pt is missing")


@pytest.mark.parametrize("damage", ["{", "[]", "null", "\xff"])
def test_a_damaged_manifest_is_seen(tmp_path: Path, damage: str) -> None:
    folder = make(tmp_path, 1)
    (folder / commit.MANIFEST).write_bytes(damage.encode("latin-1"))
    with pytest.raises(ValueError, match="manifest is damaged"):
        Manifest.read(folder)


def test_a_changed_number_in_the_manifest_is_seen(tmp_path: Path) -> None:
    folder = make(tmp_path, 1)
    body = json.loads((folder / commit.MANIFEST).read_text())
    body["state"]["tokens"] += 1
    (folder / commit.MANIFEST).write_text(json.dumps(body))
    with pytest.raises(ValueError, match="manifest is damaged"):
        Manifest.read(folder)


def test_prune_keeps_the_newest_and_drops_torn_ones(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        make(tmp_path, step)
    (tmp_path / commit.tag_name(2) / commit.MANIFEST).unlink()
    torn_and_newer = tmp_path / commit.tag_name(9)
    torn_and_newer.mkdir()
    assert commit.prune(tmp_path, 2) == []
    assert left(tmp_path) == [3, 4, 9]


def left(root: Path) -> list[int]:
    return sorted(int(folder.name.removeprefix("step")) for folder in root.iterdir() if folder.is_dir())


def test_prune_keeps_the_first_after_each_multiple(tmp_path: Path) -> None:
    for step in range(3, 20, 2):  # tokens 30, 50, ... 190; multiples of 60 are passed at 70, 130, 190
        make(tmp_path, step)
        commit.prune(tmp_path, 1, 60)
    assert left(tmp_path) == [7, 13, 19]


def test_what_cannot_be_removed_is_said_and_does_not_look_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        make(tmp_path, step)

    def fail(path: Path) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(commit.shutil, "rmtree", fail)
    assert commit.prune(tmp_path, 1) == ["old checkpoint step000000001 could not be removed: Device or resource busy"]
    assert list(commit.candidates(tmp_path))[1][1] == "it has no manifest: the save did not finish"
    monkeypatch.undo()
    assert commit.prune(tmp_path, 1) == []
    assert left(tmp_path) == [2]


def kept_by_a_plain_loop(tokens: list[int], keep_last: int, every: int) -> set[int]:
    stay = set(tokens[-keep_last:])
    for multiple in range(every, max(tokens) + 1, every):
        stay.add(min(position for position in tokens if position >= multiple))
    return stay


def test_pruning_after_every_save_keeps_what_the_rule_says_of_all() -> None:
    for seed in range(300):
        draw = random.Random(seed)
        tokens = list(itertools.accumulate(draw.choices(range(1, 40), k=draw.randint(1, 30))))
        keep_last, every = draw.randint(1, 4), draw.randint(1, 90)
        there: list[int] = []
        for position in tokens:
            there = sorted(commit.kept([*there, position], keep_last, every))
        assert set(there) == kept_by_a_plain_loop(tokens, keep_last, every), (seed, tokens, keep_last, every)
        assert commit.kept(tokens, keep_last, None) == set(tokens[-keep_last:])


def test_a_folder_is_created_with_those_above_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    durable: list[Path] = []
    monkeypatch.setattr(commit, "fsync_folder", durable.append)
    commit.make_folder(tmp_path / "a" / "b" / "c")
    assert durable == [tmp_path, tmp_path / "a", tmp_path / "a" / "b"]
    commit.make_folder(tmp_path / "a")
    assert len(durable) == 3
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        commit.make_folder(tmp_path / "file")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(bytes(data))


def test_a_damaged_newest_one_costs_no_good_one(tmp_path: Path) -> None:
    """It was counted as the newest: with keep_last 1 each new checkpoint went as soon as it was committed."""
    for step in (1, 2, 3):
        make(tmp_path, step)
    flip(tmp_path / commit.tag_name(3) / "model.pt")
    assert commit.prune(tmp_path, 1, verified=commit.tag_name(2)) == []
    assert left(tmp_path) == [2, 3]
    make(tmp_path, 1)
    assert commit.prune(tmp_path, 1) == []  # asked for none, it looks for one that is whole
    assert left(tmp_path) == [2, 3]


def test_a_copy_of_the_users_is_no_checkpoint(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        make(tmp_path, step)
    for name in ("step000000001-best", "step000000009", "step1", "step0000000001"):
        (tmp_path / commit.tag_name(1)).rename(tmp_path / name)
        make(tmp_path, 1)
    assert commit.prune(tmp_path, 1) == []
    names = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert names == {"step000000001-best", "step000000009", "step1", "step0000000001", "step000000003"}
    assert [folder.name for folder, _ in commit.candidates(tmp_path)] == ["step000000003"]
    commit.vacate(tmp_path / "step000000009")  # in the way of a save
    assert (tmp_path / "replaced-step000000009" / "model.pt").exists()


def test_a_streak_of_suspect_steps_takes_no_good_one(tmp_path: Path) -> None:
    def state(step: int, suspect: int, sound: int) -> None:
        folder = make(tmp_path, step)
        manifest = Manifest.read(folder)
        changed = TrainState(step=step, tokens=10 * step, suspect_in_row=suspect, sound_step=sound)
        commit.commit(tmp_path, Manifest(folder.name, changed, {}, manifest.files))
        assert commit.prune(tmp_path, 1, verified=folder.name) == []

    state(1, 0, 0)
    state(2, 0, 1)
    assert left(tmp_path) == [1, 2]  # 2 is whole, but nothing tells yet that its weights are any good
    for step in (3, 4, 5):
        state(step, step - 2, 1)
        assert left(tmp_path) == [1, 2, step]
    state(6, 0, 5)
    assert left(tmp_path) == [5, 6]
