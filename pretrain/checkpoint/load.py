"""From a run, a sharded checkpoint of it or its export to a model for evaluation."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.errors import UserError
from data_pipeline.tokenization.roles import check_objective
from data_pipeline.tokenization.tokenizer import Tokenizer
from pretrain.checkpoint import commit
from pretrain.config import RunConfig, load_config, parse_config
from pretrain.curriculum.stages import model_at
from pretrain.model.config import ModelConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

MOST_TRIES = 5
"""Times that a reader begins anew because a run removes its checkpoint faster than it can be read."""
MOST_NAMED = 8
"""Models in the message that refuses a folder of them."""
CONFIG, WEIGHTS, INFO, TOKENIZER = "config.yaml", "model.safetensors", "export.json", "tokenizer.json"


class CheckpointRemoved(UserError):
    """A checkpoint without a manifest: its run has removed it, as it does with old ones, perhaps while it was read."""

    def __init__(self, folder: Path) -> None:
        super().__init__(
            f"checkpoint {folder} has no manifest: its save did not finish, or the run has removed it since "
            "(checkpoint.keep_last). Give the run folder, which means its newest one, or a copy"
        )


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be evaluated: float32, evaluation mode, on the CPU."""

    model: nn.Module
    model_config: ModelConfig  # as of the stage it was trained to
    run_config: RunConfig
    tokenizer: Tokenizer
    weights_hash: str  # SHA-256 over names, shapes and bytes
    tokens: int  # that it was trained on
    path: Path  # of what was loaded
    run_dir: Path | None  # the run it belongs to, if it lies in one


def load_model(path: str | Path) -> LoadedModel:
    """Load a run folder, one of its checkpoints (``checkpoints/stepN``) or an ``export`` folder, in a single process.

    A run folder means its newest whole checkpoint, through ``export/`` if that is of the same step. Raises
    :class:`UserError` if there is nothing whole to load.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path} does not exist: give a run folder, a checkpoint in it, or an export folder")
    if (path / INFO).is_file():
        return _load_export(path)
    if (path / commit.MANIFEST).is_file():
        return load_checkpoint(path)
    if (path / "checkpoints").is_dir():
        return _load_newest(path)
    raise UserError(f"{path} is neither a run folder, nor a checkpoint, nor an export folder{_instead(path)}")


def _instead(path: Path) -> str:
    """What to give in place of a folder that is no model: what lies in it, or what it is part of; "" if unknown."""
    if (path / "config.json").is_file():
        return f": `nystrom convert from-hf {path} OUT` makes an export of a folder of transformers"
    marks = ("checkpoints", INFO, commit.MANIFEST)
    inside = sorted(entry for entry in path.iterdir() if entry.is_dir() and any((entry / m).exists() for m in marks))
    if inside:
        more = f" and {len(inside) - MOST_NAMED} more" if len(inside) > MOST_NAMED else ""
        return f": it holds {', '.join(map(str, inside[:MOST_NAMED]))}{more}, give one of these"
    if (path.parent / "checkpoints").is_dir():
        return f": give its run, {path.parent}"
    return ""


def _load_newest(run_dir: Path) -> LoadedModel:
    """The newest checkpoint of a run, which may be training: the next one if rotation takes it meanwhile."""
    for _ in range(MOST_TRIES):
        found = commit.newest(run_dir / "checkpoints")
        if found is None:
            raise UserError(f"run {run_dir} has no whole checkpoint yet")
        folder, manifest = found
        exported = read_info(run_dir / "export")
        if exported is not None and exported["step"] == manifest.state.step:
            return _load_export(run_dir / "export")
        try:
            return load_checkpoint(folder)
        except CheckpointRemoved as error:
            removed = error
    raise removed


def read_info(folder: Path) -> dict[str, Any] | None:
    """The contents of ``export.json``, or None if the export is not there or not finished."""
    try:
        info = json.loads((folder / INFO).read_text())
        return info if {"weights_hash", "tokens", "step"} <= set(info) else None
    except (OSError, ValueError):
        return None


def unique_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name, float32, on the CPU; a tied weight once, under its first name."""
    seen: set[int] = set()
    out: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            value = tensor.detach().cpu()
            out[name] = (value.float() if value.is_floating_point() else value).contiguous()
    return out


def weights_hash(weights: dict[str, torch.Tensor]) -> str:
    """SHA-256 (hex) over the sorted names, shapes, types and bytes: equal weights, equal hash, however stored."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name]
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def consolidate(folder: Path, state: str = "fp32") -> dict[str, torch.Tensor]:
    """Weights of a checkpoint by name and the model's buffers, float32 on the CPU, whatever ZeRO stage wrote it.

    ``state``: ``fp32``, the master weights, or a state of the optimizer that has the shape of the weights, such as
    ``ema``. A tied weight is there once, under its first name. Raises :class:`UserError` if the checkpoint has no such
    state.
    """
    from pretrain.engine.training import import_deepspeed

    import_deepspeed()  # whose classes are in the files
    from pretrain.engine.state.saved import SavedStates

    saved = SavedStates(folder)
    for name in saved.shapes:
        if state not in saved.state_names(name):
            there = ", ".join(saved.state_names(name))
            raise UserError(f"checkpoint {folder} has no '{state}' of {name}: there are {there}")
    weights = {name: saved.full(name, state) for name in saved.shapes}
    buffers = {k: v.float() if v.is_floating_point() else v.clone() for k, v in saved.buffers.items()}
    return {**weights, **buffers}


def load_checkpoint(folder: Path, state: str = "fp32") -> LoadedModel:
    """The weights of one checkpoint, or another state of theirs; see :func:`consolidate`.

    Raises :class:`CheckpointRemoved` if it is not there any more, :class:`UserError` if it is damaged.
    """
    try:
        return _load_checkpoint(folder, state)
    except Exception:
        # A removal takes the manifest first, so that whatever else is missing then is no damage.
        if not (folder / commit.MANIFEST).is_file():
            raise CheckpointRemoved(folder) from None
        raise


def _load_checkpoint(folder: Path, state: str) -> LoadedModel:
    try:
        manifest = commit.Manifest.read(folder)
    except ValueError as error:
        raise UserError(f"checkpoint {folder} cannot be used: {error}") from None
    problem = commit.problem_with(folder, manifest, manifest.files)
    if problem:
        raise UserError(f"checkpoint {folder} cannot be used: {problem}")
    run_dir = folder.resolve().parent.parent
    config = parse_config(manifest.identity["config"], where=str(folder / commit.MANIFEST))
    return _loaded(consolidate(folder, state), config, run_dir / "tokenizer", manifest.state.tokens, folder, run_dir)


def _load_export(folder: Path) -> LoadedModel:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    info = read_info(folder)
    if info is None:
        raise UserError(f"{folder / INFO} is damaged: export the checkpoint again")
    try:
        weights = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / WEIGHTS} cannot be read: {error}") from None
    parent = folder.resolve().parent
    run_dir = parent if (parent / "checkpoints").is_dir() else None
    loaded = _loaded(weights, load_config(folder / CONFIG), folder, info["tokens"], folder, run_dir)
    if loaded.weights_hash != info["weights_hash"]:
        raise UserError(f"{folder / WEIGHTS} is not what {INFO} says: it was changed or damaged")
    return loaded


def _loaded(
    weights: dict[str, torch.Tensor], config: RunConfig, folder: Path, tokens: int, path: Path, run_dir: Path | None
) -> LoadedModel:
    """``folder`` holds the tokenizer."""
    from pretrain.model.transformer import build_model

    tokenizer = Tokenizer.load(folder)
    check_objective(tokenizer.roles.as_dict(), config.model.objective, str(folder))
    model_config = model_at(config, tokens)
    model = build_model(model_config).float().eval()
    wanted = unique_weights(model)
    missing = sorted(set(wanted) - set(weights))
    if missing:
        raise UserError(f"{path} lacks the weights {', '.join(missing[:3])}: it belongs to another model or version")
    extra = sorted(set(weights) - set(model.state_dict()))
    if extra:
        raise UserError(
            f"{path} has weights this model does not know ({', '.join(extra[:3])}): it belongs to another version"
        )
    for name, tensor in wanted.items():
        if tuple(weights[name].shape) != tuple(tensor.shape):
            raise UserError(
                f"{path}: {name} has the shape {tuple(weights[name].shape)}, the model's is {tuple(tensor.shape)}"
            )
    model.load_state_dict({name: weights[name] for name in wanted}, strict=False)
    digest = weights_hash(unique_weights(model))
    return LoadedModel(model, model_config, config, tokenizer, digest, tokens, path, run_dir)
