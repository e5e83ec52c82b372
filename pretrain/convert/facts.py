"""What a folder for transformers says of its run, beside what transformers reads: ``nystrom.json``."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.errors import UserError
from data_pipeline.tokenization.tokenizer import TOKENIZER_FILES, Tokenizer
from pretrain.convert.tokenizer import restored

if TYPE_CHECKING:
    from pretrain.checkpoint.load import LoadedModel

FACTS = "nystrom.json"


def facts(loaded: LoadedModel, tokenizer_changes: Mapping[str, Any]) -> dict[str, Any]:
    """The run's configuration, tokens seen, hash of the float32 weights, and what was changed of the tokenizer."""
    return {
        "weights_hash": loaded.weights_hash,
        "tokens": loaded.tokens,
        "run": json.loads(loaded.run_config.model_dump_json(exclude_unset=True)),
        "tokenizer": dict(tokenizer_changes),
    }


def read_facts(folder: Path) -> dict[str, Any] | None:
    """What :func:`facts` wrote into a folder; None where there is nothing. Raises :class:`UserError` if damaged."""
    file = folder / FACTS
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if {"weights_hash", "tokens", "run", "tokenizer"} <= set(found):
            return dict(found)
    except (OSError, ValueError, TypeError):
        pass
    raise UserError(f"{file} is damaged: convert the checkpoint again, or remove the file to do without it")


def original_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a folder as it was before it was changed for transformers; one that was changed since, or is
    from elsewhere, as it stands. Raises :class:`UserError`."""
    tokenizer, found = Tokenizer.load(folder), read_facts(folder)
    if found is None or not all((folder / name).is_file() for name in TOKENIZER_FILES):
        return tokenizer
    changes = found["tokenizer"]
    try:
        files = restored({name: (folder / name).read_bytes() for name in TOKENIZER_FILES}, changes)
    except (ValueError, TypeError, KeyError):
        return tokenizer
    with tempfile.TemporaryDirectory() as scratch:
        for name, data in files.items():
            (Path(scratch) / name).write_bytes(data)
        before = Tokenizer.load(scratch)
    return before if before.hash == changes.get("hash") else tokenizer
