"""Random walks through the life of a folder of checkpoints: what docs/checkpoints.md promises holds after each step.

No training: an engine that writes a few bytes. The truth is kept beside the code under test, as copies of every file.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import UserError
from pretrain.checkpoint import commit, store
from pretrain.checkpoint.commit import Manifest, TrainState, tag_name
from pretrain.checkpoint.store import Checkpoints, SaveFailed

WALKS, STEPS = 60, 40
PLENTY = 1 << 40
Files = dict[str, bytes]


class Killed(BaseException):
    """The process is gone: nothing after this line runs, and no error handler either."""


class Alone:
    """One process, and no process group."""

    rank, local_rank, world_size, is_first = 0, 0, 1, True

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def broadcast(self, value: Any) -> Any:
        return value

    def sum(self, values: list[float]) -> list[float]:
        return values


class Engine:
    """Writes a payload that no other checkpoint has."""

    def __init__(self, walk: Walk) -> None:
        self._walk = walk

    def checkpoint_bytes(self) -> int:
        return 100

    def save(self, root: Path, tag: str) -> None:
        for name in ("model.pt", "optim.pt"):
            (root / tag / name).write_bytes(f"{name} of {tag}, {self._walk.draw.random()}".encode())
            self._walk.tick()


def contents(folder: Path) -> Files:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


class Walk:
    """A run that is saved, damaged, killed and restarted, and what must be true of its folder."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.draw = root, random.Random(seed)
        self.free, self.stuck = PLENTY, False
        self.until_kill: int | None = None
        self.committed: dict[str, Files] = {}  # by tag, as the last save left it
        self.damaged: set[str] = set()  # of them, by this walk
        self.mine: list[Files] = []  # the user's own folders
        self.must_stay: set[str] = set()  # tags that no rotation may take
        self.log: list[str] = []
        self.restart()

    def tick(self, *_: Any) -> None:
        """A point at which the process may be killed."""
        if self.until_kill is not None:
            self.until_kill -= 1
            if self.until_kill < 0:
                raise Killed

    def rename(self, path: Path, to: Path) -> Path:
        if self.stuck:
            raise OSError(errno.EBUSY, "Device or resource busy")
        self.tick()
        os.replace(path, to)
        self.tick()
        return to

    def rmtree(self, folder: Path) -> None:
        for path in sorted(folder.rglob("*"), reverse=True):
            self.tick()
            path.unlink()
        self.tick()
        folder.rmdir()

    def is_whole(self, tag: str) -> bool:
        folder = self.root / tag
        return tag in self.committed and folder.is_dir() and contents(folder) == self.committed[tag]

    def whole(self) -> list[str]:
        return [tag for tag in sorted(self.committed) if self.is_whole(tag)]

    # --- what happens ---------------------------------------------------------------------------------------------

    def act(self) -> None:
        weights = {"train": 6, "save": 6, "damage": 2, "copy": 1, "restart": 2}
        kill = self.draw.random() < 0.3
        self.until_kill = self.draw.randint(0, 40) if kill else None
        self.free = 0 if self.draw.random() < 0.1 else PLENTY
        self.stuck = self.draw.random() < 0.1
        name = self.draw.choices(list(weights), list(weights.values()))[0]
        where = f"at step {self.step}, suspect {self.suspect}, sound {self.sound}, keep {self.keep}"
        self.log.append(f"{name}{' with a kill' if kill else ''} {where}: {sorted(os.listdir(self.root))}")
        self.there_before = {p.name: contents(p) for p in self.root.iterdir() if p.is_dir()}
        try:
            getattr(self, name)()
            self.until_kill = None
        except Killed:
            self.until_kill, self.free, self.stuck = None, PLENTY, False
            self.take_note_of_a_commit()
            self.restart()
        self.check()

    def train(self) -> None:
        is_good = self.draw.random() < 0.6
        self.step += 1
        self.suspect = 0 if is_good else self.suspect + 1
        if is_good and 0 < self.saved < self.step and self.sound != self.saved:
            self.sound = self.saved
            self.must_stay = {tag_name(self.sound)}
            assert self.store.confirm(self.saved) == []

    def save(self) -> None:
        if self.step in (0, self.saved):
            return
        was_whole, tag = set(self.whole()), tag_name(self.step)
        state = TrainState(step=self.step, tokens=10 * self.step, suspect_in_row=self.suspect, sound_step=self.sound)
        good = {t for t in was_whole if not Manifest.read(self.root / t).state.suspect_in_row}
        stay = {tag_name(self.sound)} & was_whole | (good if self.suspect else set())  # a streak takes no good one
        self.must_stay = stay | {tag_name(self.saved)}  # until the new one is whole
        try:
            assert self.store.save(Engine(self), state, {"world_size": 1}) == []  # type: ignore[arg-type]
        except SaveFailed:
            assert self.free == 0 or self.stuck
            assert self.whole() or not was_whole, "the last one went to make room"
            assert tag not in self.whole()
            return
        self.committed[tag] = contents(self.root / tag)
        self.damaged.discard(tag)
        self.saved = self.step
        self.must_stay = stay | {tag}
        streaks = any(Manifest.read(self.root / t).state.suspect_in_row for t in self.whole())
        if not streaks and not self.damaged and self.keep[1] is None and self.free:
            there = {t for t in was_whole if t < tag} | {tag}
            kept = set(sorted(there)[-self.keep[0] :]) | {tag_name(self.sound)} & there
            assert {t for t in self.whole() if t <= tag} == kept

    def damage(self) -> None:
        tags = [
            p
            for p in sorted(self.root.glob("step*"))
            if commit.step_of(p.name) is not None and p.name in self.committed
        ]
        if not tags:
            return
        folder = self.draw.choice(tags)
        path = self.draw.choice([p for p in sorted(folder.iterdir()) if p.is_file()] or [folder])
        if path == folder:
            return
        data, how = bytearray(path.read_bytes()), self.draw.choice(("flip", "truncate", "delete"))
        if how == "delete" and path.name != commit.MANIFEST:  # without it nothing tells that there was a checkpoint
            path.unlink()
        elif how == "flip" and data:
            data[self.draw.randrange(len(data))] ^= 1 << self.draw.randrange(8)
            path.write_bytes(bytes(data))
        else:
            path.write_bytes(bytes(data[: len(data) // 2]))
        self.damaged.add(folder.name)
        self.log.append(f"  {how} {path}")

    def copy(self) -> None:
        """The user keeps a copy, under a name of his own or under another checkpoint's."""
        tags = self.whole()
        if not tags:
            return
        source = self.draw.choice(tags)
        name = self.draw.choice((f"{source}-best", "best", tag_name(self.step + 1), "step12"))
        if not (self.root / name).exists():
            shutil.copytree(self.root / source, self.root / name)
            self.mine.append(contents(self.root / name))

    def restart(self) -> None:
        self.keep = (self.draw.randint(1, 3), self.draw.choice((None, None, 60)))
        self.store = Checkpoints(self.root, Alone(), *self.keep)  # type: ignore[arg-type]
        expected = self.whole()
        before = {p.name: contents(p) for p in self.root.glob("*") if p.is_dir()}
        self.step, self.saved, self.sound, self.suspect = 0, -1, 0, 0
        self.must_stay = set()
        try:
            found, lines = self.store.find()
        except UserError:
            assert not expected, "a whole one was refused"
            assert self.committed, "nothing was lost, and it refused"
            assert before == {p.name: contents(p) for p in self.root.glob("*") if p.is_dir()}
            self.start_over()
            return
        if found is None:
            assert not self.committed, "it started over in silence"
            return
        assert found[0].name == expected[-1], "not the newest whole one"
        assert all("is not used: " in line for line in lines)
        for name, files in before.items():
            if not self.stuck and name in self.committed and name > found[0].name and commit.MANIFEST in files:
                assert not (self.root / name).exists(), f"{name} is damaged and was not set aside"
        state = found[1].state
        if state.suspect_in_row and self.draw.random() < 0.5:  # with another rate
            back = self.store.go_back(state)
            if back is not None:
                assert self.is_whole(back[0][0].name)
                state = back[0][1].state
        self.step = self.saved = state.step
        self.suspect, self.sound = state.suspect_in_row, state.sound_step
        self.must_stay = {tag_name(state.step)}
        if self.is_whole(tag_name(self.sound)):
            self.must_stay.add(tag_name(self.sound))
        self.forget_what_is_aside()

    def start_over(self) -> None:
        """``--resume never``: the folder is moved aside, the user's own with it."""
        self.until_kill, self.stuck = None, False
        self.root.rename(self.root.with_name(f"old-{len(list(self.root.parent.iterdir()))}"))
        self.root.mkdir()
        self.committed, self.mine = {}, []

    # --- what must be true ----------------------------------------------------------------------------------------

    def take_note_of_a_commit(self) -> None:
        """The process was killed: if it was in a save, and the manifest is there, all of it must be."""
        tag = tag_name(self.step)
        folder = self.root / tag
        if (folder / commit.MANIFEST).exists() and contents(folder) != self.there_before.get(tag):
            manifest = Manifest.read(folder)
            assert commit.problem_with(folder, manifest, manifest.files) is None
            assert set(manifest.files) == {"model.pt", "optim.pt", "rng_rank_00000.pt"}
            self.committed[tag] = contents(folder)
            self.damaged.discard(tag)

    def forget_what_is_aside(self) -> None:
        self.damaged = {tag for tag in self.damaged if (self.root / tag).is_dir()}
        for tag in list(self.committed):
            if not (self.root / tag).is_dir() and len(self.committed) > 1:
                del self.committed[tag]

    def check(self) -> None:
        there = {p.name: contents(p) for p in self.root.iterdir() if p.is_dir()}
        for own in self.mine:
            assert own in there.values(), "a folder of the user's is gone"
        for tag in self.must_stay - self.damaged:
            assert tag not in self.committed or self.is_whole(tag), f"{tag} was rotated out"
        for name, files in there.items():
            if commit.step_of(name) is not None and commit.MANIFEST in files and name not in self.committed:
                assert files in self.mine, f"{name} looks like a checkpoint and is none"


def test_random_walks_keep_what_is_promised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    walk: Walk
    monkeypatch.setattr(os, "fsync", lambda _: walk.tick())
    monkeypatch.setattr(commit.shutil, "rmtree", lambda folder: walk.rmtree(folder))
    monkeypatch.setattr(Path, "rename", lambda path, to: walk.rename(path, to))
    monkeypatch.setattr(store, "free_bytes", lambda _: walk.free)
    seen: set[str] = set()
    for seed in range(WALKS):
        root = tmp_path / str(seed) / "checkpoints"
        root.mkdir(parents=True)
        walk = Walk.__new__(Walk)
        walk.__init__(root, seed)  # type: ignore[misc]  # its first find() may tick already
        try:
            for _ in range(STEPS):
                walk.act()
        except BaseException:
            print(f"seed {seed}:", *walk.log, sep="\n")
            raise
        seen |= {name.split("-")[0] for p in root.parent.glob("*") for name in os.listdir(p) if "-step" in name}
        seen |= {"old" for p in root.parent.glob("old-*")}
    assert seen >= {"damaged", "suspect", "replaced", "old"}  # the walks come by all of it
