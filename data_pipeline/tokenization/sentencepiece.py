"""SentencePiece's ``.model`` files as tokenizers of the `tokenizers` library, with the ids that SentencePiece gives.

The file is a protocol buffer of few fields (``sentencepiece_model.proto``), read here: the ready-made readers need the
packages sentencepiece or transformers, and what `tokenizers` or transformers make of the fields differs from
SentencePiece in details. A model that cannot be represented exactly is refused, with the reason:

- model types other than BPE and unigram, white space as a suffix or not escaped, pieces marked as unused;
- user-defined symbols where white space is trimmed or put before the text: `tokenizers` cuts them out beforehand;
- rules of normalization of one's own; names of control symbols that could not be kept apart from text.

Unigram adds the scores of pieces along the text: SentencePiece in 32 bits from the beginning of the text, `tokenizers`
in 64 bits from that of the word. Where two ways to cut a word have nearly the same score, the rounding may decide in a
long text. Measured on English books with vocabularies of 4,000: none of 8,000 paragraphs differs, and of 20 texts of
200 paragraphs 0 to 3, in a word each.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.errors import UserError
from data_pipeline.tokenization.charsmap import KNOWN_RULES, MARK

if TYPE_CHECKING:
    import tokenizers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
UNIGRAM, BPE = 1, 2
_TYPES = {3: "word", 4: "char"}
SPACE = "\u2581"


@dataclass(frozen=True)
class SpmPiece:
    """An entry of the vocabulary; its place is its id."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class SpmModel:
    """What decides the ids, as the file has it."""

    pieces: tuple[SpmPiece, ...]
    model_type: int
    byte_fallback: bool
    suffix: bool  # white space belongs to the word before it
    rules: str  # name of the normalization
    charsmap: bytes  # its precompiled replacements of characters, empty for none
    dummy_prefix: bool
    trim: bool  # runs of spaces become one, at both ends none
    escape: bool
    roles: dict[str, str | None]  # bos, eos, unk, pad -> text


def read_model(path: Path) -> SpmModel:
    """Read a ``.model``. Raises :class:`UserError` for a file that is none, or is damaged."""
    try:
        data = path.read_bytes()
        pieces, trainer, normalizer = [], dict[int, Any](), dict[int, Any]()
        for number, value in _fields(data):
            if number == 1:
                piece = dict(_fields(value))
                [score] = struct.unpack("<f", piece.get(2, bytes(4)))
                pieces.append(SpmPiece(piece[1].decode(), score, piece.get(3, NORMAL)))
            elif number in (2, 3):
                (trainer if number == 2 else normalizer).update(_fields(value))
        special = {p.text for p in pieces if p.kind in (UNKNOWN, CONTROL)}
        names = {
            "unk": trainer.get(45, b"<unk>"),
            "bos": trainer.get(46, b"<s>"),
            "eos": trainer.get(47, b"</s>"),
            "pad": trainer.get(48, b"<pad>"),
        }
        found = {role: text for role, name in names.items() if (text := name.decode()) in special}
        model = SpmModel(
            tuple(pieces),
            trainer.get(3, UNIGRAM),
            bool(trainer.get(35, 0)),
            bool(trainer.get(24, 0)),
            normalizer.get(1, b"").decode(),
            normalizer.get(2, b""),
            bool(normalizer.get(3, 1)),
            bool(normalizer.get(4, 1)),
            bool(normalizer.get(5, 1)),
            {role: found.get(role) for role in names},
        )
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, IndexError, KeyError, struct.error, AttributeError, TypeError):
        raise UserError(f"{path} is not a SentencePiece model, or it is damaged") from None
    if not pieces or not any(piece.kind == NORMAL for piece in pieces):
        raise UserError(f"{path} is not a SentencePiece model, or it is damaged: it has no pieces")
    return model


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of the fields of a message: an int for a varint, else bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value
            if shift > 63:
                raise ValueError("varint")

    while at < len(data):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        size = {1: 8, 5: 4}.get(key & 7)
        size = varint() if key & 7 == 2 else size
        if size is None or at + size > len(data):
            raise ValueError("field")
        yield key >> 3, data[at : at + size]
        at += size


def build(path: Path) -> tuple[tokenizers.Tokenizer, dict[str, str | None]]:
    """The tokenizer of a ``.model`` file, and the roles that it names (role -> text, None where it has no such token).

    Raises :class:`UserError` for a model that cannot be represented exactly.
    """
    import tokenizers
    from tokenizers import AddedToken, decoders

    model = read_model(path)
    _refuse(model, path)
    backend = tokenizers.Tokenizer(_bpe(model) if model.model_type == BPE else _unigram(model))
    steps = _normalizers(model)
    if steps is not None:
        backend.normalizer = steps
    split = _split(model, path)
    if split is not None:
        backend.pre_tokenizer = split
    parts = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.dummy_prefix:
        parts.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(parts)
    controls = [p.text for p in model.pieces if p.kind in (UNKNOWN, CONTROL)]
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in controls])
    symbols = [p.text for p in model.pieces if p.kind == USER_DEFINED]
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in symbols])
    return backend, model.roles


def note(path: Path) -> str | None:
    """What a user should know of the ids of the ``.model`` that would be read from ``path``; None for nothing."""
    files = [path] if path.suffix == ".model" else sorted(path.glob("*.model"))
    if len(files) != 1 or (path / "tokenizer.json").is_file() or read_model(files[0]).model_type != UNIGRAM:
        return None
    return (
        f"{files[0]}: SentencePiece adds unigram scores in 32 bits along a text, here it is in 64 bits: where two ways "
        "to cut a word are nearly equal, ids in long documents may differ from those of SentencePiece"
    )


def _refuse(model: SpmModel, path: Path) -> None:
    kinds = {piece.kind for piece in model.pieces}
    texts = [piece.text for piece in model.pieces]
    reason = None
    if model.model_type not in (UNIGRAM, BPE):
        reason = f"its type is {_TYPES.get(model.model_type, model.model_type)}, and BPE and unigram are read"
    elif model.suffix or not model.escape:
        reason = "it keeps white space behind words (treat_whitespace_as_suffix) or does not escape it"
    elif UNUSED in kinds:
        reason = "it has pieces that are marked as unused"
    elif model.charsmap and model.rules not in KNOWN_RULES:
        reason = f"its normalization {model.rules!r} is none of {', '.join(KNOWN_RULES)} and identity"
    elif len(set(texts)) != len(texts):
        reason = "it has a piece twice"
    elif sum(piece.kind == UNKNOWN for piece in model.pieces) != 1:
        reason = "it does not have one piece for what it does not know"
    elif USER_DEFINED in kinds and model.model_type == UNIGRAM:
        reason = "it is of type unigram and has user-defined symbols"
    elif USER_DEFINED in kinds and (model.dummy_prefix or model.trim):
        reason = "it has user-defined symbols, and adds or removes white space around them"
    elif any(SPACE in p.text or " " in p.text for p in model.pieces if p.kind == USER_DEFINED):
        reason = "it has a user-defined symbol with white space"
    if reason is not None:
        raise _refusal(path, reason)


def _refusal(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path}: this SentencePiece model cannot be read with the very ids that SentencePiece gives: {reason}; if the "
        "ids of transformers' conversion are meant, convert it there (AutoTokenizer...save_pretrained) and give the "
        "tokenizer.json"
    )


def _bpe(model: SpmModel) -> Any:
    """BPE with the merges that the scores imply: SentencePiece merges the pair whose union has the best score, the
    first of equals in the text."""
    from tokenizers import models

    ids = {piece.text: number for number, piece in enumerate(model.pieces)}
    ordinary = {piece.text for piece in model.pieces if piece.kind == NORMAL}
    merges = []
    for piece in sorted((p for p in model.pieces if p.kind == NORMAL), key=lambda p: (-p.score, ids[p.text])):
        text = piece.text
        merges += [
            (text[:at], text[at:]) for at in range(1, len(text)) if text[:at] in ordinary and text[at:] in ordinary
        ]
    unknown = next(piece.text for piece in model.pieces if piece.kind == UNKNOWN)
    return models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=model.byte_fallback)


def _unigram(model: SpmModel) -> Any:
    from tokenizers import models

    # Scores of what is never found in text do not matter: `_split` cuts such names.
    scores = [(p.text, p.score if p.kind == NORMAL else 0.0) for p in model.pieces]
    unknown = next(number for number, piece in enumerate(model.pieces) if piece.kind == UNKNOWN)
    return models.Unigram(scores, unknown, model.byte_fallback)


def _normalizers(model: SpmModel) -> Any:
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if model.charsmap:
        steps += [normalizers.Precompiled(model.charsmap), normalizers.Replace(Regex(MARK), "")]
    if model.trim:
        # Spaces only, and the ends of the text only: Strip takes all white space, ^ and $ those of lines. SentencePiece
        # trims the end when spaces are escaped already.
        ends = Regex(rf"\A +|[ {SPACE}]+\z")
        steps += [normalizers.Replace(ends, ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def _split(model: SpmModel, path: Path) -> Any:
    """A cut before each run of spaces, where no piece reaches across one; else the model sees the text whole. In
    unigram models also cuts in the names of pieces that text never has."""
    from tokenizers import Regex, pre_tokenizers

    cuts = (
        []
        if model.model_type == BPE
        else [pre_tokenizers.Split(Regex(p), "merged_with_previous") for p in _names(model, path)]
    )
    if not any(SPACE in piece.text.lstrip(SPACE) for piece in model.pieces if piece.kind == NORMAL):
        cuts = [pre_tokenizers.Split(Regex(f"{SPACE}*[^{SPACE}]+|{SPACE}+"), "isolated"), *cuts]
    return pre_tokenizers.Sequence(cuts) if cuts else None


def _names(model: SpmModel, path: Path) -> list[str]:
    """Where to cut the names of control and byte pieces, which the library would find in text: between two characters
    that no piece has side by side and of which one is known, since neighbouring unknown ones give one id."""
    ordinary = {piece.text for piece in model.pieces if piece.kind == NORMAL}
    pairs = {piece[at : at + 2] for piece in ordinary for at in range(len(piece) - 1)}

    def harmless(left: str, right: str) -> bool:
        return left + right not in pairs and (left in ordinary or right in ordinary or model.byte_fallback)

    patterns = []
    for name in (piece.text for piece in model.pieces if piece.kind in (UNKNOWN, CONTROL) and len(piece.text) > 1):
        at = next((at for at in range(1, len(name)) if harmless(name[at - 1], name[at])), None)
        if at is None:
            raise _refusal(path, f"the text {name!r} would be taken for the control symbol of that name")
        patterns.append(f"{re.escape(name[:at])}(?={re.escape(name[at:])})")
    if any(piece.kind == BYTE for piece in model.pieces):
        digits = "[0-9A-F]"
        if harmless("<", "0"):
            patterns.append(f"<(?=0x{digits}{{2}}>)")
        elif harmless("0", "x"):
            patterns.append(f"<0(?=x{digits}{{2}}>)")
        elif all(harmless("x", digit) for digit in "0123456789ABCDEF"):
            patterns.append(f"<0x(?={digits}{{2}}>)")
        else:
            raise _refusal(path, "the text '<0x41>' would be taken for the byte of that name")
    return patterns
