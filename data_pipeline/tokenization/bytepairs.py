"""Expresses a byte-level BPE tokenizer of the `tokenizers` library as a tiktoken encoding.

Both apply merges in the order in which they were learned to the pieces that a regular expression cuts text into. The
library writes bytes as printable characters (Radford et al. 2019) and numbers tokens freely; tiktoken's tokens are
bytes and its numbers are the order of the merges.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipeline.tokenization.tokenizer import Tokenizer

# The expression inside the ByteLevel pre-tokenizer (GPT-2's).
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class NotExpressible(Exception):
    """This tokenizer is not a plain byte-level BPE; the message says why."""


@dataclass(frozen=True)
class BytePairs:
    """A vocabulary in tiktoken's terms. ``ids[rank]`` is the token id of the token with that rank."""

    pattern: str
    ranks: dict[bytes, int]
    ids: np.ndarray  # (tokens,) uint32


def byte_pairs(tokenizer: Tokenizer) -> BytePairs:
    """The pattern and the ranks of ``tokenizer``; raises :class:`NotExpressible`."""
    data = json.loads(tokenizer.to_json())
    model = data["model"]
    if model["type"] != "BPE":
        raise NotExpressible(f"the model is {model['type']}, not byte-level BPE")
    if data["normalizer"] is not None:
        raise NotExpressible(f"text is normalised first ({data['normalizer']['type']})")
    plain = [token["content"] for token in data["added_tokens"] if not token["special"]]
    if plain:
        raise NotExpressible(f"tokens were added that are found in raw text ({plain[0]!r})")
    for setting in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(setting):
            raise NotExpressible(f"the model has {setting}")
    pattern = _pattern(data["pre_tokenizer"])
    ranks, ids = _ranks(model["vocab"], model["merges"])
    unmade = set(model["vocab"].values()) - set(ids.tolist()) - {token["id"] for token in data["added_tokens"]}
    if model["ignore_merges"] and unmade:
        raise NotExpressible("the model takes whole words that no merges make (ignore_merges)")
    return BytePairs(pattern, ranks, ids)


def _pattern(pre: dict[str, Any] | None) -> str:
    steps = [] if pre is None else pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    if not steps or steps[-1]["type"] != "ByteLevel":
        raise NotExpressible("text is not cut by a ByteLevel pre-tokenizer")
    *splits, byte_level = steps
    if byte_level["add_prefix_space"]:
        raise NotExpressible("a space is put before each text (add_prefix_space)")
    if byte_level["use_regex"] and not splits:
        return GPT2_PATTERN
    if not byte_level["use_regex"] and len(splits) == 1 and splits[0]["type"] == "Split":
        split = splits[0]
        # Pieces between the matches: the patterns in use match everything, and the parity check sees others.
        if "Regex" in split["pattern"] and split["behavior"] in ("Isolated", "Removed") and _keeps(split):
            return str(split["pattern"]["Regex"])
    raise NotExpressible("text is cut by other pre-tokenizers than one regular expression")


def _keeps(split: dict[str, Any]) -> bool:
    """Is what matches kept, as one piece each? Inverted and "removed", as GPT-4's tokenizer is written, it is too."""
    return bool(split["invert"]) == (split["behavior"] == "Removed")


def _ranks(vocabulary: dict[str, int], merges: list[list[str]]) -> tuple[dict[bytes, int], np.ndarray]:
    alphabet = byte_alphabet()
    absent = [byte for character, byte in alphabet.items() if character not in vocabulary]
    if absent:
        raise NotExpressible(f"the byte 0x{absent[0]:02X} is not in the vocabulary")
    ranks = {bytes([byte]): rank for rank, byte in enumerate(alphabet.values())}
    ids = [vocabulary[character] for character in alphabet]
    for left, right in merges:
        try:
            token = bytes(alphabet[character] for character in left + right)
        except KeyError as error:
            raise NotExpressible(f"a merge has the character {error} that stands for no byte") from None
        # tiktoken knows a token by its bytes alone. Files converted from tiktoken's list all ways to a token in a row.
        if ranks.setdefault(token, len(ids)) == len(ids):
            ids.append(vocabulary[left + right])
        elif ranks[token] != len(ids) - 1:
            raise NotExpressible(f"two merges of different rank make the same token {left + right!r}")
    return ranks, np.array(ids, dtype=np.uint32)


def byte_alphabet() -> dict[str, int]:
    """The 256 printable characters that stand for bytes in a byte-level vocabulary: printable Latin-1 for itself, the
    other bytes, in order, by the characters from U+0100."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in set(kept)]
    return {chr(byte): byte for byte in kept} | {chr(0x100 + i): byte for i, byte in enumerate(rest)}
