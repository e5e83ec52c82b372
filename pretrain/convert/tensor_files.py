"""Tensors by name from the files that others write: safetensors, whole or in shards, and PyTorch's pickles.

A pickle can run any program. It is read with ``torch.load(weights_only=True)`` alone, which builds tensors and plain
containers and refuses the rest.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.errors import UserError

if TYPE_CHECKING:
    import torch

SAFE, PICKLE = "model.safetensors", "pytorch_model.bin"
FILES = (SAFE, SAFE + ".index.json", PICKLE, PICKLE + ".index.json")
"""What a folder of transformers may hold its weights in, in the order in which transformers looks."""


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder of transformers, by name, on the CPU, in the types on disk.

    Raises :class:`UserError` for a folder without weights, a shard that is missing, and a damaged file.
    """
    file = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if file is None:
        raise UserError(f"{folder} has no weights: expected one of {', '.join(FILES)}")
    if file.suffix != ".json":
        return _read(file)
    placed = _index(file)
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(set(placed.values())):
        if not (folder / shard).is_file():
            raise UserError(f"{folder / shard} is missing, and {file.name} lists it: copy the whole folder")
        tensors |= _read(folder / shard)
    missing = sorted(placed.keys() - tensors.keys())
    if missing:
        raise UserError(
            f"{folder} lacks {', '.join(missing[:3])}, which {file.name} lists: copy the whole folder again"
        )
    return tensors


def _index(file: Path) -> dict[str, str]:
    """Tensor -> file of an index."""
    try:
        placed = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file} is no index of shards: {type(error).__name__}: {error}") from None
    if not isinstance(placed, dict) or not placed:
        raise UserError(f"{file} is no index of shards: weight_map must give a file for each tensor")
    for name in placed.values():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
            raise UserError(f"{file} names the shard {name!r}: it must be a file in the same folder")
    return placed


def _read(file: Path) -> dict[str, torch.Tensor]:
    if file.suffix == ".safetensors":
        _refuse_pointer(file)
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(file)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} cannot be read: {error}: it is damaged or only partly copied") from None
    return only_tensors(load_pickle(file), file)


def load_pickle(file: Path) -> Any:
    """What a file of ``torch.save`` holds, as far as tensors and plain containers go.

    Raises :class:`UserError` for a file that needs more than that, is damaged, or is none.
    """
    import torch

    _refuse_pointer(file)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # UnpicklingError, RuntimeError, EOFError, KeyError and others, by what is wrong
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if found:
            raise UserError(
                f"{file} is refused: it holds {found[1]}, which is no tensor, and loading it could run a program. In "
                "the environment that wrote it, save the tensors alone: "
                "torch.save({'model_state_dict': model.state_dict()}, FILE)"
            ) from None
        words = next(iter(re.findall(r"(?:WeightsUnpickler error:\s*)([^\n]+)", str(error))), str(error).split("\n")[0])
        raise UserError(
            f"{file} cannot be read as tensors of torch.save ({type(error).__name__}: {words}): it is damaged, only "
            "partly copied, or another kind of file"
        ) from None


def _refuse_pointer(file: Path) -> None:
    """What `git clone` leaves in place of a large file if Git LFS is not installed."""
    with open(file, "rb") as opened:
        if opened.read(40).startswith(b"version https://git-lfs"):
            raise UserError(f"{file} is a pointer of Git LFS and not the file itself: run `git lfs pull` in its folder")


def only_tensors(found: Any, file: Path) -> dict[str, torch.Tensor]:
    """``found`` if it is a mapping of names to tensors; else :class:`UserError`."""
    import torch

    if not isinstance(found, dict) or not found:
        raise UserError(f"{file} holds no tensors by name, but {type(found).__name__}")
    other = [name for name, value in found.items() if not isinstance(name, str) or not isinstance(value, torch.Tensor)]
    if other:
        raise UserError(f"{file} holds no tensors by name: {other[0]!r} is {type(found[other[0]]).__name__}")
    return dict(found)
