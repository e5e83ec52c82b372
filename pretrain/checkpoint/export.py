"""From a sharded training checkpoint to one file of float32 weights."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.files import apply_umask, write_atomic
from data_pipeline.moved import moved
from data_pipeline.tokenization.tokenizer import Tokenizer
from pretrain.checkpoint import commit
from pretrain.checkpoint.load import CONFIG, INFO, WEIGHTS, load_checkpoint, unique_weights

if TYPE_CHECKING:
    import torch

__getattr__ = moved(__name__, "pretrain.checkpoint.load", "LoadedModel", "consolidate", "load_model", "weights_hash")


def export(folder: Path, out: Path, state: str = "fp32") -> str:
    """Consolidate the checkpoint ``folder`` into ``out`` (replaced if there); returns the weights' hash.

    ``state``: ``fp32`` for the weights, ``ema`` for their average, if the run kept one (see :func:`consolidate`).
    ``out`` gets ``model.safetensors``, ``config.yaml``, the tokenizer's files and, last, ``export.json``. Raises
    ``OSError`` if that cannot be written.
    """
    loaded = load_checkpoint(folder, state)
    manifest = commit.Manifest.read(folder)
    (out / INFO).unlink(missing_ok=True)  # the marker first: what an interruption leaves must not look finished
    shutil.rmtree(out, ignore_errors=True)
    info = {"weights_hash": loaded.weights_hash, "tokens": loaded.tokens, "step": manifest.state.step}
    write_export(out, unique_weights(loaded.model), loaded.run_config.to_yaml(), loaded.tokenizer, info)
    return loaded.weights_hash


def write_export(
    out: Path, weights: dict[str, torch.Tensor], config: str, tokenizer: Tokenizer, info: dict[str, Any]
) -> None:
    """Write the files of an export into the folder ``out``, ``export.json`` last.

    ``weights``: as :func:`unique_weights` gives them. ``config``: the run's YAML. ``info``: what ``export.json`` says,
    with ``weights_hash``, ``tokens`` and ``step`` at least. Raises ``OSError``.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    commit.make_folder(out)
    tmp = out / (WEIGHTS + ".tmp")
    try:
        save_file(weights, tmp, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{tmp}: {error}") from None
    apply_umask(tmp)
    commit.fsync_files(out, [tmp.name])
    os.replace(tmp, out / WEIGHTS)
    write_atomic(out / CONFIG, config.encode())
    tokenizer.save(out)
    write_atomic(out / INFO, (json.dumps({**info, "dtype": "float32"}, indent=1) + "\n").encode())
