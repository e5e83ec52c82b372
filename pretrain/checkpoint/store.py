"""Saving and loading a run's state, by all processes together; the files' protocol is ``commit.py``'s."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from data_pipeline.errors import UserError
from pretrain.checkpoint import commit
from pretrain.checkpoint.commit import Manifest, TrainState
from pretrain.checkpoint.export import LoadedModel, load_model
from pretrain.distributed import randomness
from pretrain.distributed.world import World

if TYPE_CHECKING:
    from pretrain.engine.training import TrainingEngine

__all__ = ["Checkpoints", "LoadedModel", "load_model"]


class Checkpoints:
    """The folder ``checkpoints`` of a run."""

    def __init__(self, root: Path, world: World, keep_last: int) -> None:
        self.root = root
        self._world = world
        self._keep_last = keep_last

    def save(self, engine: TrainingEngine, state: TrainState, identity: dict[str, Any]) -> Path:
        """Write and commit a checkpoint; returns its folder. All processes call it; none returns before the commit."""
        world = self._world
        tag = commit.tag_name(state.step)
        folder = self.root / tag
        if world.is_first:
            shutil.rmtree(folder, ignore_errors=True)  # a torn one of the same step
            folder.mkdir(parents=True)
        world.barrier()
        engine.save(self.root, tag)
        torch.save(randomness.get_state(), folder / _rng_file(world.rank))
        names = commit.data_files(folder)
        commit.fsync_files(folder, [name for name in names if commit.owner(name, world.world_size) == world.rank])
        world.barrier()
        # The listing again, now that all have written; each process hashes its share.
        names = commit.data_files(folder)
        mine = {name: commit.hash_file(folder / name) for name in names[world.rank :: world.world_size]}
        files = {name: entry for part in world.gather(mine) for name, entry in part.items()}
        if world.is_first:
            commit.commit(self.root, Manifest(tag, state, identity, files))
            commit.prune(self.root, self._keep_last)
        world.barrier()
        return folder

    def find(self) -> tuple[tuple[Path, Manifest] | None, list[str]]:
        """The newest checkpoint whose contents match its manifest (or None), and a line about each passed over.

        All processes must call it; each reads a share of the files, and all get the same answer. Raises
        :class:`UserError` if there are checkpoints but none is whole.
        """
        world = self._world
        found = world.broadcast(list(commit.candidates(self.root)))
        passed_over: list[str] = []
        for folder, manifest in found:
            problem: str | None
            if isinstance(manifest, Manifest):
                share = sorted(manifest.files)[world.rank :: world.world_size]
                problems = world.gather(commit.problem_with(folder, manifest, share))
                problem = next((p for p in problems if p), None)
                if problem is None:
                    return (folder, manifest), passed_over
            else:
                problem = manifest
            passed_over.append(f"checkpoint {folder} is not used: {problem}")
        if any(isinstance(manifest, Manifest) for _, manifest in found):
            raise UserError("no whole checkpoint is left:\n  " + "\n  ".join(passed_over))
        return None, passed_over

    def load(self, engine: TrainingEngine, folder: Path, manifest: Manifest) -> list[str]:
        """Put weights, optimizer and this process's generators back; returns what is to be said about it.

        Other processes than those that wrote the checkpoint draw from new streams, decided by seed, position and rank.
        """
        lines = []
        if engine.load(folder.parent, folder.name):
            lines.append("The states of the checkpoint were cut anew for these processes and this ZeRO stage.")
        rank, world_size = self._world.rank, self._world.world_size
        if manifest.identity["world_size"] == world_size:
            randomness.set_state(torch.load(folder / _rng_file(rank), weights_only=True))
        else:
            randomness.seed_everything(randomness.derived_seed(engine.config.seed, manifest.state.tokens, rank))
            lines.append("Other processes than before: each draws (for dropout) from a new stream of random numbers.")
        return lines


def _rng_file(rank: int) -> str:
    return f"rng_rank_{rank:05d}.pt"
