"""Reads a tokenizer as it lies on disk: ``tokenizer.json``, a folder of transformers, or plain vocabulary files.

Built with the `tokenizers` library alone; transformers need not be installed.
"""

from __future__ import annotations

import json
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.errors import UserError
from data_pipeline.tokenization.roles import WELL_KNOWN, declared_roles

if TYPE_CHECKING:
    import tokenizers

# Tokenizers of transformers whose vocabulary files have the names of GPT-2's or BERT's and another meaning.
_NOT_BYTE_LEVEL = frozenset(
    name + "Tokenizer"
    for name in (
        *("Bertweet", "BioGpt", "BlenderbotSmall", "CLIP", "CTRL", "FSMT", "Flaubert", "Herbert", "M2M100"),
        *("Marian", "OpenAIGPT", "Phobert", "Speech2Text", "Vits", "Wav2Vec2CTC", "XLM"),
    )
)
_NOT_BERT = frozenset(
    name + "Tokenizer" for name in ("BertGeneration", "BertJapanese", "Bertweet", "CpmAnt", "Esm", "Phobert")
)

TOKENIZER_FILE, CONFIG_FILE, MAP_FILE = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
_VOCAB_TXT, _VOCAB_JSON, _MERGES, _ADDED = "vocab.txt", "vocab.json", "merges.txt", "added_tokens.json"


def read_tokenizer(path: Path) -> tuple[tokenizers.Tokenizer, dict[str, str | None], str]:
    """The tokenizer at ``path``, the roles its configuration declares (role -> text), and the file it came from.

    ``path`` is a folder, a ``tokenizer.json`` (the configuration files beside it count) or a SentencePiece ``.model``.
    A folder holds, in this order of preference, ``tokenizer.json``; ``vocab.json`` with ``merges.txt`` (GPT-2,
    RoBERTa); ``vocab.txt`` (BERT); one ``.model``.
    ``tokenizer_config.json`` wins over ``special_tokens_map.json``.

    Raises :class:`UserError` if there is none of these, for a file that cannot be read, and for vocabulary files of
    another kind of tokenizer, as ``tokenizer_class`` or the merges tell.
    """
    folder, file = (path, path / TOKENIZER_FILE) if path.is_dir() else (path.parent, path)
    config: dict[str, Any] = {}
    declared: dict[str, str | None] = {}
    for name in (MAP_FILE, CONFIG_FILE):
        if (folder / name).is_file():
            config = _read_object(folder / name)
            try:
                declared |= declared_roles(config)
            except UserError as error:
                raise UserError(f"{folder / name}: {error}") from None
    if file.is_file() and file.suffix == ".model":
        return _sentencepiece(file, declared)
    if file.is_file():
        return _from_json(file), declared, str(file)
    if path.is_dir() and (path / _VOCAB_JSON).is_file() and (path / _MERGES).is_file():
        return _with_added(_byte_level(path, config), path, declared), declared, str(path / _VOCAB_JSON)
    if path.is_dir() and (path / _VOCAB_TXT).is_file():
        return _with_added(_bert(path, config), path, declared), declared, str(path / _VOCAB_TXT)
    found = sorted(path.glob("*.model")) if path.is_dir() else []
    if len(found) > 1:
        raise UserError(
            f"{path} holds several SentencePiece models ({found[0].name}, {found[1].name}): name one of them"
        )
    if found:
        return _sentencepiece(found[0], declared)
    raise UserError(
        f"no tokenizer at {path}: expected {file}, or {_VOCAB_JSON} and {_MERGES}, or {_VOCAB_TXT}, or a SentencePiece "
        ".model; `nystrom data tokenizer` trains one"
    )


def _sentencepiece(
    file: Path, declared: dict[str, str | None]
) -> tuple[tokenizers.Tokenizer, dict[str, str | None], str]:
    """SentencePiece's own file; what lies beside it may name other roles."""
    from data_pipeline.tokenization.sentencepiece import build

    backend, roles = build(file)
    return backend, {role: text for role, text in roles.items() if text is not None} | declared, str(file)


def _from_json(file: Path) -> tokenizers.Tokenizer:
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # the Rust library raises bare Exception
        raise UserError(f"{file} is not a tokenizer.json of the tokenizers library: {error}") from None


def _byte_level(folder: Path, config: dict[str, Any]) -> tokenizers.Tokenizer:
    """GPT-2 and RoBERTa: byte-level BPE (Radford et al. 2019), as their transformers classes build it."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    try:
        vocabulary, merges = models.BPE.read_file(str(folder / _VOCAB_JSON), str(folder / _MERGES))
        backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    except Exception as error:
        raise UserError(f"{folder / _VOCAB_JSON} and {_MERGES} are not a BPE vocabulary: {error}") from None
    _refuse_class(folder, config, _VOCAB_JSON, "GPT-2", _NOT_BYTE_LEVEL)
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    for left, right in merges:
        if "</w>" in left + right or not alphabet.issuperset(left + right):
            raise _other_kind(folder, _MERGES, "GPT-2", f"{left!r} and {right!r} are no bytes as it writes them")
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space", False)))
    backend.decoder = decoders.ByteLevel()
    return backend


def _refuse_class(folder: Path, config: dict[str, Any], name: str, kind: str, others: frozenset[str]) -> None:
    declared = str(config.get("tokenizer_class") or "")
    if declared.removesuffix("Fast") in others:
        raise _other_kind(folder, name, kind, f"{CONFIG_FILE} says that it belongs to {declared}")


def _other_kind(folder: Path, name: str, kind: str, reason: str) -> UserError:
    return UserError(
        f"{folder / name} is not the vocabulary of a tokenizer like {kind}'s, the only kind that is read from such "
        f"files: {reason}; transformers writes a tokenizer.json, which is read: "
        f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained(...)"
    )


def _bert(folder: Path, config: dict[str, Any]) -> tokenizers.Tokenizer:
    """BERT: WordPiece with its normaliser (Devlin et al. 2019), by default the uncased one, as in transformers."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    try:
        vocabulary = models.WordPiece.read_file(str(folder / _VOCAB_TXT))
        backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token=str(config.get("unk_token", "[UNK]"))))
    except Exception as error:
        raise UserError(f"{folder / _VOCAB_TXT} is not a WordPiece vocabulary: {error}") from None
    _refuse_class(folder, config, _VOCAB_TXT, "BERT", _NOT_BERT)
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=bool(config.get("tokenize_chinese_chars", True)),
        strip_accents=config.get("strip_accents"),
        lowercase=bool(config.get("do_lower_case", True)),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    return backend


def _with_added(backend: tokenizers.Tokenizer, folder: Path, declared: dict[str, str | None]) -> tokenizers.Tokenizer:
    """Plain vocabulary files do not say which tokens are special: those with a role, by declaration or name."""
    from tokenizers import AddedToken

    if (folder / _ADDED).is_file():
        added = _read_object(folder / _ADDED)
        if not all(isinstance(id_, int) for id_ in added.values()):
            raise UserError(f"{folder / _ADDED} must map texts to ids")
        for text, id_ in sorted(added.items(), key=itemgetter(1)):
            backend.add_tokens([AddedToken(text, special=False, normalized=False)])
            if backend.token_to_id(text) != id_:
                raise UserError(
                    f"{folder / _ADDED}: {text!r} should have id {id_}, after the other tokens it gets "
                    f"{backend.token_to_id(text)}; save the tokenizer as tokenizer.json with transformers"
                )
    vocabulary = backend.get_vocab(with_added_tokens=True)
    known = [next((name for name in names if name in vocabulary), None) for names in WELL_KNOWN.values()]
    texts = sorted({text for text in (*declared.values(), *known) if text in vocabulary}, key=vocabulary.__getitem__)
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in texts])
    return backend


def _read_object(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{file} must hold a JSON object")
    return data
