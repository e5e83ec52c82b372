"""Saving and loading a run's state, by all processes together; the files' protocol is ``commit.py``'s."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from data_pipeline.errors import UserError
from data_pipeline.files import FileEntry, fsync_folder, hash_file
from data_pipeline.moved import moved
from data_pipeline.units import format_bytes
from pretrain.checkpoint import commit
from pretrain.checkpoint.commit import Manifest, TrainState
from pretrain.distributed import randomness
from pretrain.distributed.world import World
from pretrain.engine.state.writing import Writes

if TYPE_CHECKING:
    from pretrain.engine.training import TrainingEngine

__all__ = ["Checkpoints", "SaveFailed"]
__getattr__ = moved(__name__, "pretrain.checkpoint.load", "LoadedModel", "load_model")

T = TypeVar("T")

MARGIN_BYTES = 1 << 20
"""Beside a checkpoint: its manifest, the metrics and logs until the next one."""
MARGIN_SHARE = 0.02
"""Pickled names and padding, by which files are larger than their tensors (1.5% for 300,000 parameters)."""


class SaveFailed(Exception):
    """No checkpoint of this step, on any process; those before it are as they were.

    The message says why, how many bytes a checkpoint needs, how many the folder has free, and what is left.
    """

    def __init__(self, reasons: Sequence[str], folder: Path, needed: int, free: int | None, newest: str | None) -> None:
        self.needed, self.free, self.newest = needed, free, newest
        space = "unknown" if free is None else format_bytes(free)
        left = f"the newest checkpoint is {newest}" if newest else "there is no checkpoint yet"
        super().__init__(
            f"{'; '.join(reasons)}. A checkpoint needs about {format_bytes(needed)}, {folder} has {space} free; {left}"
        )


class _NotAll(Exception):
    """Some process failed; the reasons are the same list on all."""

    def __init__(self, reasons: list[str]) -> None:
        self.reasons = reasons


class Checkpoints:
    """The folder ``checkpoints`` of a run."""

    def __init__(self, root: Path, world: World, keep_last: int, keep_every_tokens: int | None = None) -> None:
        self.root = root
        self._world = world
        self._keep_last, self._keep_every_tokens = keep_last, keep_every_tokens
        self._unconfirmed: int | None = None  # step of a checkpoint beside which the sound one before it stays

    def save(
        self, engine: TrainingEngine, state: TrainState, identity: dict[str, Any], last: bool = False
    ) -> list[str]:
        """Write and commit a checkpoint; all processes call it, and none returns before the commit.

        ``last``: no step follows that could tell whether this one is sound. Returns lines about what went wrong beside
        it (an old checkpoint that cannot be removed). Raises :class:`SaveFailed`, on all processes alike, if there is
        no space or one of them cannot write: the checkpoints before are then as they were, and what was written of this
        one is removed.
        """
        world, tag = self._world, commit.tag_name(state.step)
        folder, needed, begun = self.root / tag, 0, False
        try:
            needed = self._needed(engine)
            self._on_first(lambda: commit.vacate(folder))  # of a torn one of the same step
            self._free_space(needed, state)
            begun = True
            self._on_first(lambda: commit.make_folder(folder))
            self._together(lambda: self._write(engine, folder))
            # Now that all have written; each process hashes its share.
            files = {name: entry for part in self._together(lambda: self._hash(folder)) for name, entry in part.items()}
            self._on_first(lambda: commit.commit(self.root, Manifest(tag, state, identity, files)))
        except _NotAll as failed:
            raise self._give_up(folder if begun else None, needed, failed.reasons) from None
        # What this process wrote and hashed is known to be whole: it is what rotation holds on to.
        sound = state.step if last and not state.suspect_in_row else state.sound_step
        self._unconfirmed = state.step if sound != state.step else None
        return world.broadcast(self._tidy(tag, sound) if world.is_first else [])

    def confirm(self, step: int) -> list[str]:
        """The checkpoint of ``step`` is sound, for a step after it went well: one that stayed for its sake may go.

        Returns lines as :meth:`save` does; only the first process does anything.
        """
        if self._unconfirmed != step:
            return []
        self._unconfirmed = None
        if not self._world.is_first or self._keep_last > 1:  # of several the one before is among the last ones
            return []
        return commit.prune(
            self.root, self._keep_last, self._keep_every_tokens, verified=commit.tag_name(step), sound_step=step
        )

    def _needed(self, engine: TrainingEngine) -> int:
        """Bytes to ask for: the newest checkpoint's size, before the first one an estimate from the engine."""

        def size() -> int | None:
            found = commit.newest(self.root)
            return None if found is None else sum(entry.bytes for entry in found[1].files.values())

        last = self._on_first(size)
        return with_margin(int(self._world.sum([engine.checkpoint_bytes()])[0]) if last is None else last)

    def _free_space(self, needed: int, state: TrainState) -> None:
        """Refuse a save that cannot fit: a disk filled to the brim takes metrics and logs down too.

        Checkpoints that this save would supersede are removed before it if that frees enough, unless the one to stay is
        damaged. Those that were set aside are removed in any case, torn ones only beside a whole one.
        """
        if self._fits(needed):
            return
        found = self._on_first(lambda: list(commit.candidates(self.root)))
        whole = next(((folder, entry) for folder, entry in found if isinstance(entry, Manifest)), None)
        spare = self._on_first(lambda: commit.spares(self.root))
        if whole is not None and self.problem(*whole) is None:
            # A damaged one may be all that is left of a run, so it goes only where there is a whole one.
            spare += [folder for folder, entry in found if isinstance(entry, str)]
            rule: dict[str, Any] = {"verified": whole[0].name, "sound_step": state.sound_step}
            rule["suspect"] = state.suspect_in_row > 0
            keep = max(1, self._keep_last - 1)
            spare += self._on_first(lambda: commit.removable(self.root, keep, self._keep_every_tokens, **rule))
        for folder in dict.fromkeys(spare):
            self._on_first(partial(commit.remove, folder))
            if self._fits(needed):
                return
        raise _NotAll(["not enough free space, so nothing was written"])

    def _fits(self, needed: int) -> bool:
        """Whether every machine, asked once, sees so many bytes free."""
        free = self._together(lambda: free_bytes(self.root) if self._world.local_rank == 0 else None)
        return min((size for size in free if size is not None), default=needed) >= needed

    def _write(self, engine: TrainingEngine, folder: Path) -> None:
        engine.save(folder.parent, folder.name)
        writes = Writes()
        writes.save(randomness.get_state(), folder / _rng_file(self._world.rank))
        writes.check()
        fsync_folder(folder)

    def _hash(self, folder: Path) -> dict[str, FileEntry]:
        names = commit.data_files(folder)
        return {name: hash_file(folder, name) for name in names[self._world.rank :: self._world.world_size]}

    def _tidy(self, tag: str, sound_step: int) -> list[str]:
        """After the commit; a failure here costs nothing but order."""
        try:
            commit.write_latest(self.root, tag)
        except OSError as error:
            return [f"{self.root / commit.LATEST} could not be written: {error.strerror or error}"]
        return commit.prune(self.root, self._keep_last, self._keep_every_tokens, verified=tag, sound_step=sound_step)

    def _give_up(self, folder: Path | None, needed: int, reasons: list[str]) -> SaveFailed:
        """What to raise, the same on all processes, once the torn folder is gone (None: nothing was written)."""
        found: tuple[int | None, str | None] = None, None
        if self._world.is_first:
            try:
                if folder is not None:
                    commit.remove(folder)
            except OSError as error:
                reasons = [*reasons, f"{folder} could not be removed: {error.strerror or error}"]
            try:
                newest = commit.newest(self.root)
                found = free_bytes(self.root), None if newest is None else newest[0].name
            except OSError as error:
                reasons = [*reasons, str(error)]
        reasons, found = self._world.broadcast((reasons, found))
        return SaveFailed(reasons, self.root, needed, *found)

    def _on_first(self, action: Callable[[], T]) -> T:
        """``action()`` on the first process; everybody gets its result, or :class:`_NotAll`."""
        return cast("T", self._together(lambda: action() if self._world.is_first else None)[0])

    def _together(self, action: Callable[[], T]) -> list[T]:
        """``action()`` on every process; everybody gets all results, by rank, or :class:`_NotAll` if one failed.

        It ends with a barrier: nobody continues before all are done.
        """
        value, failure = None, None
        try:
            value = action()
        except OSError as error:
            failure = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        results = self._world.gather((value, failure))
        failures = {failure: rank for rank, (_, failure) in reversed(list(enumerate(results))) if failure}
        if failures:
            raise _NotAll([f"process {rank}: {failure}" for failure, rank in reversed(failures.items())])
        return [cast("T", value) for value, _ in results]

    def problem(self, folder: Path, manifest: Manifest) -> str | None:
        """What is wrong with a checkpoint's contents, or None; all processes call it and read a share of it each."""
        world = self._world
        share = sorted(manifest.files)[world.rank :: world.world_size]
        return next((p for p in world.gather(commit.problem_with(folder, manifest, share)) if p), None)

    def find(self) -> tuple[tuple[Path, Manifest] | None, list[str]]:
        """The newest checkpoint whose contents match its manifest (or None), and a line about each passed over.

        All processes must call it; each reads a share of the files, and all get the same answer. Those passed over that
        have a manifest are set aside, so that they never count again. Raises :class:`UserError`, and changes nothing,
        if there are or were checkpoints but none is whole.
        """
        world = self._world
        found, had_any = world.broadcast((list(commit.candidates(self.root)), commit.had_any(self.root)))
        damaged: list[tuple[Path, str]] = []
        problem: Manifest | str | None
        for folder, manifest in found:
            problem = manifest
            if isinstance(manifest, Manifest):
                problem = self.problem(folder, manifest)
                if problem is None:
                    return (folder, manifest), self._set_aside(damaged, commit.DAMAGED)
            damaged.append((folder, f"checkpoint {folder} is not used: {problem}"))
        lines = [line for _, line in damaged]
        if had_any:
            raise UserError(
                "no whole checkpoint is left:\n  "
                + "\n  ".join(lines or [f"there was one in {self.root}, and there is none any more"])
                + "\nNothing was changed. Put a whole checkpoint back (give one that was set aside its old name, once "
                "it is mended), or start over with --resume never (the old folder is moved aside)"
            )
        return None, lines

    def go_back(self, state: TrainState) -> tuple[tuple[Path, Manifest], list[str]] | None:
        """Set aside what is newer than the newest sound checkpoint that ``state`` knows of; None if there is none.

        If rotation has removed that one, it is the newest that is not from a streak of suspect steps.
        Returns the checkpoint, and lines as :meth:`find`. All processes must call it.
        """
        found = self._world.broadcast(list(commit.candidates(self.root)) if state.sound_step else [])
        whole = [(folder, manifest) for folder, manifest in found if isinstance(manifest, Manifest)]
        sound = [entry for entry in whole if entry[1].state.step == state.sound_step]
        for folder, manifest in sound + [entry for entry in whole if not entry[1].state.suspect_in_row]:
            if self.problem(folder, manifest) is None:
                why = "it is from a streak of suspect steps"
                newer = [(path, f"checkpoint {path} is not used: {why}") for path, _ in found if path > folder]
                return (folder, manifest), self._set_aside(newer, commit.SUSPECT)
        return None

    def _set_aside(self, folders: list[tuple[Path, str]], why: str) -> list[str]:
        """Rename those of the folders that have a manifest; returns their lines, each with what became of it."""

        def rename() -> list[str]:
            lines = []
            for folder, line in folders:
                try:
                    if (folder / commit.MANIFEST).exists():
                        line += f"; it is set aside as {commit.set_aside(folder, why).name}"
                except OSError as error:
                    line += f"; it cannot be set aside: {error.strerror or error}"
                lines.append(line)
            return lines

        return self._world.broadcast(rename() if self._world.is_first else [])

    def load(self, engine: TrainingEngine, folder: Path, manifest: Manifest) -> list[str]:
        """Put weights, optimizer and this process's generators back; returns what is to be said about it.

        Other processes than those that wrote the checkpoint draw from new streams, decided by seed, position and rank.
        """
        lines = []
        if engine.load(folder.parent, folder.name):
            lines.append("The states of the checkpoint were cut anew for these processes, ZeRO stage and precision.")
        rank, world_size = self._world.rank, self._world.world_size
        if manifest.identity["world_size"] == world_size:
            randomness.set_state(torch.load(folder / _rng_file(rank), weights_only=True))
        else:
            randomness.seed_everything(randomness.derived_seed(engine.config.seed, manifest.state.tokens, rank))
            lines.append("Other processes than before: each draws (for dropout) from a new stream of random numbers.")
        return lines


def _rng_file(rank: int) -> str:
    return f"rng_rank_{rank:05d}.pt"


def with_margin(size: int) -> int:
    """Free bytes to ask for before writing a checkpoint of ``size`` bytes."""
    return int(size * (1 + MARGIN_SHARE)) + MARGIN_BYTES


def free_bytes(folder: Path) -> int | None:
    """Bytes that this user may still write below ``folder``, which need not exist; None where the system cannot tell
    (some network file systems report a size of 0)."""
    usage = shutil.disk_usage(next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir()))
    return usage.free if usage.total else None
