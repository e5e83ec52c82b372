"""A checkpoint is what its manifest says, or it is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pretrain.checkpoint import commit
from pretrain.checkpoint.commit import Manifest, TrainState


def make(root: Path, step: int, contents: bytes = b"weights") -> Path:
    folder = root / commit.tag_name(step)
    folder.mkdir(parents=True)
    (folder / "model.pt").write_bytes(contents)
    (folder / "rng_rank_00000.pt").write_bytes(b"random")
    names = commit.data_files(folder)
    commit.fsync_files(folder, names)
    files = {name: commit.hash_file(folder / name) for name in names}
    commit.commit(root, Manifest(folder.name, TrainState(step=step, tokens=10 * step), {"world_size": 1}, files))
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
    commit.prune(tmp_path, keep=2)
    left = sorted(p.name for p in tmp_path.iterdir() if p.is_dir())
    assert left == [commit.tag_name(step) for step in (3, 4, 9)]


def test_owner_follows_the_file_names() -> None:
    assert commit.owner("bf16_zero_pp_rank_3_mp_rank_00_optim_states.pt", 4) == 3
    assert commit.owner("zero_pp_rank_1_mp_rank_00_model_states.pt", 4) == 1
    assert commit.owner("rng_rank_00002.pt", 4) == 2
    assert commit.owner("mp_rank_00_model_states.pt", 4) == 0
    assert commit.owner("zero_pp_rank_7_mp_rank_00_optim_states.pt", 4) == 0  # left by more processes
