"""The batch of a step that went wrong, kept so that it can be looked at again: ``nystrom replay`` reads it.

``bad_steps/step000000012/`` holds a batch whose loss or gradient was not finite, ``spikes/step000000012/`` one whose
loss was out of line. Each process whose rows are suspect has a file ``rank_00001.safetensors``: ``input_ids`` and
``labels`` (rows, seq_len) int32, ``sample_ids`` (rows,) int64 and, for packed documents, ``document_ids`` (rows,
seq_len) int32. ``step.json`` is written last; without it a folder is not whole.

Of either kind the ``MOST_SAVED`` newest stay: for those a checkpoint from before is most likely to be there still. A
batch takes 8 bytes a token (12 if packed), so that a million tokens and both kinds of trouble cost at most 320 MB (480
MB).
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.errors import UserError
from data_pipeline.files import apply_umask, write_atomic
from pretrain.checkpoint import commit
from pretrain.checkpoint.commit import Manifest, tag_name

if TYPE_CHECKING:
    import torch

    from data_pipeline.batches.loader import Batch
    from pretrain.distributed.world import World

BAD_STEPS, SPIKES = "bad_steps", "spikes"
STEP = "step.json"
MOST_SAVED = 20


@dataclass(frozen=True)
class SavedBatch:
    """Whose rows are suspect, and where they were saved."""

    processes: list[int]
    samples: list[int]  # sample ids of their rows
    folder: Path | None  # None if nothing could be written: ``problem`` says why
    problem: str | None


def save_batch(root: Path, world: World, batch: Batch, suspect: bool, facts: dict[str, Any]) -> SavedBatch:
    """Save this step's rows of the processes that are ``suspect``, or of all if none is, below ``root``.

    All processes must call it; ``facts`` (with ``step``) go into ``step.json``. A disk that is full or gone does not
    end the run: it is reported.
    """
    folder = root / tag_name(facts["step"])
    problem = _attempt(lambda: _remove_old(root, folder)) if world.is_first else None
    # Nobody writes before the first process has removed old batches.
    everyone = world.gather((suspect, batch.sample_ids.tolist(), problem))
    flagged = [rank for rank, (own, _, _) in enumerate(everyone) if own]
    processes = flagged or list(range(len(everyone)))
    samples = [sample for rank in processes for sample in everyone[rank][1]]
    problem = everyone[0][2]
    if problem is None:
        mine = _attempt(lambda: _write_rows(folder, world.rank, batch)) if world.rank in processes else None
        problem = next((p for p in world.gather(mine) if p), None)
    if problem is None and world.is_first:
        facts = {**facts, "processes": processes, "world_size": world.world_size}
        checkpoint = checkpoint_at(root.parent / "checkpoints", facts["step"] - 1)
        facts["checkpoint"] = None if checkpoint is None else checkpoint[0].name
        problem = _attempt(lambda: write_atomic(folder / STEP, (json.dumps(facts, indent=2) + "\n").encode()))
    return SavedBatch(processes, samples, folder if problem is None else None, problem)


def checkpoint_at(root: Path, step: int) -> tuple[Path, Manifest] | None:
    """The newest whole checkpoint below ``root`` of this step or one before it, or None."""
    for folder, manifest in commit.candidates(root):
        if isinstance(manifest, Manifest) and manifest.state.step <= step:
            return folder, manifest
    return None


def read_batch(folder: Path) -> tuple[dict[str, Any], list[tuple[int, dict[str, torch.Tensor]]]]:
    """What :func:`save_batch` wrote: the facts, and by process its tensors (ids as int64).

    Raises :class:`UserError` for a folder that is not whole.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not (folder / STEP).is_file():
        raise UserError(
            f"{folder} is not a saved batch (it has no {STEP}): give a folder below {BAD_STEPS}/ or {SPIKES}/ of a run"
        )
    try:
        facts = json.loads((folder / STEP).read_text())
        parts = [(rank, load_file(_rows_file(folder, rank))) for rank in facts["processes"]]
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"the batch saved in {folder} cannot be read: {error}") from None
    return facts, [(rank, {k: v.to(torch.int64) for k, v in tensors.items()}) for rank, tensors in parts]


def _remove_old(root: Path, folder: Path) -> None:
    root.mkdir(exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)  # of the same step, before a resume
    ours = [path for path in root.glob("step*") if commit.step_of(path.name) is not None]  # a copy is the user's
    for old in sorted(ours, reverse=True)[MOST_SAVED - 1 :]:
        shutil.rmtree(old)
    folder.mkdir()


def _write_rows(folder: Path, rank: int, batch: Batch) -> None:
    import torch
    from safetensors.torch import save_file

    # int32 copies: the tensors of a batch may share memory, which the format has no way to say.
    rows = {
        "input_ids": batch.input_ids.to(torch.int32),
        "labels": batch.labels.to(torch.int32),
        "sample_ids": batch.sample_ids.clone(),
    }
    if batch.document_ids is not None:
        rows["document_ids"] = batch.document_ids.to(torch.int32, copy=True)
    save_file({name: tensor.contiguous() for name, tensor in rows.items()}, _rows_file(folder, rank))
    apply_umask(_rows_file(folder, rank))


def _rows_file(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank:05d}.safetensors"


def _attempt(work: Any) -> str | None:
    """Do it; what went wrong with the disk, if anything, in words."""
    from safetensors import SafetensorError

    try:
        work()
    except (OSError, SafetensorError) as error:
        return str(error)
    return None
