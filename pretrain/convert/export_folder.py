"""Writes a converted checkpoint as an export folder of ours, which says where it came from.

``config.yaml`` of an export is a run's. Of a converted model only ``model`` and its length are known; the rest has the
values that a run cannot be without, and a comment at the top says so. ``converted.json`` has the fate of every tensor.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.errors import UserError
from data_pipeline.files import check_writable, write_atomic
from data_pipeline.tokenization.roles import check_objective
from data_pipeline.tokenization.tokenizer import Tokenizer
from pretrain.config import RunConfig, parse_config
from pretrain.convert.source import Converted
from pretrain.convert.taking import shapes_of
from pretrain.convert.tokenizer import load_restored

if TYPE_CHECKING:
    import torch

ACCOUNT = "converted.json"
"""In the written folder: the source, notes, and what became of each tensor."""
NO_DATA = "unknown-data-of-a-converted-model"
"""What ``data.train`` says."""


def check_out(out: Path) -> None:
    """Refuse a folder that is there and has files, or that cannot be made: before the weights are read."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"{out} is there already: give the name of a new folder")
    check_writable(out / "x")


def read_tokenizer(converted: Converted, source: Path, given: Path | None) -> Tokenizer:
    """The tokenizer at ``given``, else the source's own; raises :class:`UserError` if it does not fit the model."""
    folder = given or converted.tokenizer
    if folder is None:
        raise UserError(f"{source} has no tokenizer: give the one that it was trained with as --tokenizer FOLDER")
    try:
        tokenizer = load_restored(folder)
    except UserError as error:
        raise UserError(f"{error}; or give the tokenizer of the weights as --tokenizer FOLDER") from None
    rows = converted.model.vocab_size or 0
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"the tokenizer at {folder} has {tokenizer.vocab_size:,} tokens, and the word table of {source} has "
            f"{rows:,} rows: it belongs to another model"
        )
    check_objective(tokenizer.roles.as_dict(), converted.model.objective, str(folder))
    return tokenizer


def run_config(converted: Converted, name: str) -> RunConfig:
    """A run's configuration with what is known of the model, and one stage of its length."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("._-") or "converted"
    raw: dict[str, Any] = {
        "name": plain,
        "model": converted.model.model_dump(exclude={"trained_positions"}),
        "data": {"train": NO_DATA},
        "curriculum": [{"until_tokens": converted.length, "seq_len": converted.length, "micro_batch": 1}],
        "batch_tokens": converted.length,
    }
    return parse_config(raw, where=name)


def write_folder(converted: Converted, tokenizer: Tokenizer, source: Path, kind: str, out: Path) -> str:
    """Write ``out``, and return the hash of the weights. Raises ``OSError``."""
    from pretrain.checkpoint.commit import make_folder
    from pretrain.checkpoint.export import write_export
    from pretrain.checkpoint.load import weights_hash
    from pretrain.curriculum.stages import model_at

    config = run_config(converted, source.resolve().name)
    weights = whole_weights(converted, config.seed)
    stage = model_at(config, converted.tokens)
    if shapes_of(stage) != {name: tuple(value.shape) for name, value in weights.items()}:
        raise ValueError(f"{kind}: the weights have other shapes than the model of {converted.length} tokens")
    comment = (
        f"# Converted from {source} ({kind}). What is known of it is the model and its length, seq_len.\n"
        "# The other keys hold what a run cannot be without.\n"
    )
    digest = weights_hash(weights)
    origin = {"kind": kind, "path": str(source)}
    info = {"weights_hash": digest, "tokens": converted.tokens, "step": 0, "converted_from": origin}
    account = {
        **origin,
        "notes": list(converted.notes),
        "tensors": [
            {
                "name": entry.name,
                "fate": entry.fate,
                "shape": list(entry.shape),
                **({"from": converted.origin[entry.name]} if entry.fate == "taken" else {}),
                **({"why": entry.why} if entry.why else {}),
            }
            for entry in converted.entries
        ],
    }
    make_folder(out)
    write_atomic(out / ACCOUNT, (json.dumps(account, indent=1) + "\n").encode())
    write_export(out, weights, comment + config.to_yaml(), tokenizer, info)
    return digest


def whole_weights(converted: Converted, seed: int) -> dict[str, torch.Tensor]:
    """The model's weights in its own order; what the source has not is drawn by ``seed``, as a new model is."""
    import torch

    from pretrain.checkpoint.load import unique_weights
    from pretrain.model.transformer import build_model

    wanted = shapes_of(converted.model)
    if wanted.keys() == converted.weights.keys():
        return {name: converted.weights[name] for name in wanted}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drawn = unique_weights(build_model(converted.model))
    return {name: converted.weights.get(name, drawn[name]) for name in drawn}
