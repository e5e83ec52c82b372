"""A folder that transformers loads: configuration, weights in shards, tokenizer; whole or not there at all."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.errors import UserError
from data_pipeline.files import apply_umask

if TYPE_CHECKING:
    import torch

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Names of ``--dtype``, and torch's."""
CONFIG = "config.json"
SHARD_SIZE = "5GB"
"""Of a file of weights, at most; more weights are divided among several, with an index."""


def write_folder(out: Path, fill: Callable[[Path], None], *, overwrite: bool) -> None:
    """Have ``fill`` write into a new folder beside ``out``, which takes its place when it is whole.

    Raises :class:`UserError` if ``out`` is there already, unless ``overwrite`` is given and it is such a folder, and
    if the files cannot be written.
    """
    if out.exists() and not (overwrite and out.is_dir() and (not any(out.iterdir()) or (out / CONFIG).is_file())):
        hint = "--overwrite replaces a folder made before" if not overwrite else "it is no folder of a model"
        raise UserError(f"{out} exists already ({hint}): give another folder")
    tmp = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        tmp.mkdir(parents=True)
        fill(tmp)
        if out.exists():
            shutil.rmtree(out)
        tmp.rename(out)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error}") from None
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a configuration as transformers does: sorted keys, two spaces."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def write_weights(weights: Mapping[str, torch.Tensor], out: Path, max_shard_size: int | str = SHARD_SIZE) -> None:
    """Write ``model.safetensors``, or shards and ``model.safetensors.index.json``, as huggingface_hub divides them."""
    from huggingface_hub import save_torch_state_dict
    from safetensors import SafetensorError

    try:
        save_torch_state_dict(
            {name: tensor.contiguous() for name, tensor in weights.items()}, out, max_shard_size=max_shard_size
        )
    except SafetensorError as error:  # of a disk that is full, for one
        raise OSError(f"{out}: {error}") from None
    except ValueError as error:
        raise UserError(f"--max-shard-size {max_shard_size}: {error}") from None
    for path in out.glob("*.safetensors"):
        apply_umask(path)


def cast(weights: Mapping[str, torch.Tensor], dtype: str) -> dict[str, torch.Tensor]:
    """Floating-point weights in ``dtype`` (a key of :data:`DTYPES`), rounded to nearest.

    Raises :class:`UserError` for a weight that float16 cannot hold.
    """
    import torch

    to = getattr(torch, DTYPES[dtype])
    found = {name: tensor.to(to) if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    for name, tensor in found.items():
        if tensor.is_floating_point() and not tensor.isfinite().all() and weights[name].isfinite().all():
            raise UserError(f"{name} has values that {dtype} cannot hold: use --dtype bf16 or fp32")
    return found
