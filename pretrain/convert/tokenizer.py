"""The tokenizer of a folder for transformers: such that it gives the ids that the model was trained on."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.tokenization.tokenizer import Tokenizer

TOKENIZER, CONFIG = "tokenizer.json", "tokenizer_config.json"
FACTS = "nystrom.json"
"""In a folder for transformers: what it has no place for, such as the tokenizer's changes."""
_ADD_TOKENS = ("TemplateProcessing", "BertProcessing", "RobertaProcessing")


def tokenizer_files(tokenizer: Tokenizer, *, causal: bool, max_length: int) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The files for transformers by name, and what was changed, for :func:`restored`.

    transformers applies post-processors, which this project never does: those that add ``[CLS]`` and ``[SEP]`` are left
    out. The space before a mask belongs to the masked word, as in RoBERTa's tokenizer. Prompts of causal models are
    padded on the left. ``max_length``: the longest sequence that the model was trained on, in tokens.
    """
    files = tokenizer.files()
    body = json.loads(files[TOKENIZER])
    changes: dict[str, Any] = {"hash": tokenizer.hash}
    if _adds_tokens(body.get("post_processor")):
        changes["post_processor"], body["post_processor"] = body["post_processor"], None
    for token in body["added_tokens"]:
        if token["id"] == tokenizer.mask_id and not token["lstrip"]:
            changes["mask"], token["lstrip"] = token["id"], True
    config = json.loads(files[CONFIG])
    config["model_max_length"] = max_length
    config["model_input_names"] = ["input_ids", "attention_mask"]
    config["padding_side"] = "left" if causal else "right"
    written = {TOKENIZER: _text(body), CONFIG: _text(config, indent=1)}
    return written, changes


def restored(files: Mapping[str, bytes], changes: Mapping[str, Any]) -> dict[str, bytes]:
    """The files as they were before :func:`tokenizer_files` changed them."""
    body = json.loads(files[TOKENIZER])
    if "post_processor" in changes:
        body["post_processor"] = changes["post_processor"]
    for token in body["added_tokens"]:
        if token["id"] == changes.get("mask"):
            token["lstrip"] = False
    return {**files, TOKENIZER: _text(body)}


def load_restored(folder: Path) -> Tokenizer:
    """The tokenizer of a folder as it was before it was written there, if it is such a folder; else as it stands.

    A tokenizer that was changed there since is taken as it stands, too. Raises as :meth:`Tokenizer.load`.
    """
    tokenizer = Tokenizer.load(folder)
    try:
        changes = json.loads((folder / FACTS).read_text(encoding="utf-8"))["tokenizer"]
        files = restored({name: (folder / name).read_bytes() for name in (TOKENIZER, CONFIG)}, changes)
    except (OSError, ValueError, TypeError, KeyError):
        return tokenizer
    with tempfile.TemporaryDirectory() as scratch:
        for name, data in files.items():
            (Path(scratch) / name).write_bytes(data)
        before = Tokenizer.load(scratch)
    return before if before.hash == changes.get("hash") else tokenizer


def _adds_tokens(processor: Mapping[str, Any] | None) -> bool:
    if processor is None:
        return False
    return processor["type"] in _ADD_TOKENS or any(_adds_tokens(part) for part in processor.get("processors", ()))


def _text(value: Any, indent: int | None = None) -> bytes:
    separators = (",", ":") if indent is None else None
    return (json.dumps(value, sort_keys=True, ensure_ascii=False, indent=indent, separators=separators) + "\n").encode()
