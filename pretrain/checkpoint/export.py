"""From a sharded training checkpoint to one file of float32 weights."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from data_pipeline.files import apply_umask, write_atomic
from data_pipeline.moved import moved
from pretrain.checkpoint import commit
from pretrain.checkpoint.load import CONFIG, INFO, WEIGHTS, load_checkpoint, unique_weights

__getattr__ = moved(__name__, "pretrain.checkpoint.load", "LoadedModel", "consolidate", "load_model", "weights_hash")


def export(folder: Path, out: Path, state: str = "fp32") -> str:
    """Consolidate the checkpoint ``folder`` into ``out`` (replaced if there); returns the weights' hash.

    ``state``: ``fp32`` for the weights, ``ema`` for their average, if the run kept one (see :func:`consolidate`).
    ``out`` gets ``model.safetensors``, ``config.yaml``, the tokenizer's files and, last, ``export.json``. Raises
    ``OSError`` if that cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    loaded = load_checkpoint(folder, state)
    manifest = commit.Manifest.read(folder)
    (out / INFO).unlink(missing_ok=True)  # the marker first: what an interruption leaves must not look finished
    shutil.rmtree(out, ignore_errors=True)
    commit.make_folder(out)
    tmp = out / (WEIGHTS + ".tmp")
    try:
        save_file(unique_weights(loaded.model), tmp, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{tmp}: {error}") from None
    apply_umask(tmp)
    commit.fsync_files(out, [tmp.name])
    os.replace(tmp, out / WEIGHTS)
    write_atomic(out / CONFIG, loaded.run_config.to_yaml().encode())
    loaded.tokenizer.save(out)
    info = {
        "weights_hash": loaded.weights_hash,
        "tokens": loaded.tokens,
        "step": manifest.state.step,
        "dtype": "float32",
    }
    write_atomic(out / INFO, (json.dumps(info, indent=1) + "\n").encode())
    return loaded.weights_hash
