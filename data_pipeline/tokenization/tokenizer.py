"""A tokenizer as shards, models and evaluation see it: ids, roles, and the hash by which they recognise it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.errors import UserError
from data_pipeline.files import write_atomic
from data_pipeline.tokenization.folder import CONFIG_FILE, TOKENIZER_FILE, read_tokenizer
from data_pipeline.tokenization.long_texts import cut, is_long
from data_pipeline.tokenization.roles import ROLES, find_roles

if TYPE_CHECKING:
    import tokenizers

TOKENIZER_FILES = (TOKENIZER_FILE, CONFIG_FILE)  # what `save` writes and `load` needs


class Tokenizer:
    """Any tokenizer of the `tokenizers` library, used for pretraining.

    - **Raw text stays text**: a literal ``<mask>`` or ``</s>`` in a document is encoded like any other text and never
      becomes the special id.
    - **Nothing is added or cut**: post-processors (``[CLS]``, ``[SEP]``) are not applied, and padding and truncation
      that a ``tokenizer.json`` carries are switched off; a stored limit of 512 would cut documents without a word.

    ``bos_id``, ``pad_id``, ``eos_id``, ``unk_id`` and ``mask_id`` are token ids, or None for a role that the vocabulary
    does not have; ``pad_id`` (``eos_id`` where there is no padding token) and ``eos_id`` always exist. ``special_ids``
    are the ids of all special tokens, sorted. ``vocab_size`` is the largest id plus one. ``hash`` (SHA-256, hex) covers
    everything that decides ids and roles, not the spelling of the files.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, declared: Mapping[str, str | None] | None = None, where: str = "tokenizer"
    ) -> None:
        """Take over ``backend``. ``declared`` are the roles a configuration names, role -> text, ``where`` its file."""
        declared = declared or {}
        _settle(backend, declared, where)
        added = backend.get_added_tokens_decoder()
        specials = {token.content: id_ for id_, token in sorted(added.items()) if token.special}
        unk = _unknown(backend)
        _keep_text_text(backend, specials, unk, where)
        self._json = canonical_json(backend.to_str())
        self._backend = _from_json(self._json)
        from data_pipeline.tokenization.charsmap import settled  # imports numpy, which `--help` must not wait for

        self._settled = settled(self._backend, self._json)
        self.roles = find_roles(declared, specials, unk, where)
        self.bos_id, self.pad_id, self.eos_id = self.roles.bos, self.roles.pad, self.roles.eos
        self.unk_id, self.mask_id = self.roles.unk, self.roles.mask
        self.special_ids: tuple[int, ...] = tuple(sorted(specials.values()))
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        facts = self._json + json.dumps(self.roles.as_dict(), sort_keys=True)
        self.hash: str = hashlib.sha256(facts.encode()).hexdigest()

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a ``tokenizer.json`` or a folder: one of :meth:`save`'s, of transformers, or of plain vocabulary files.

        The roles come from ``tokenizer_config.json`` and ``special_tokens_map.json`` where these name them, else from
        special tokens with well-known names (:data:`~data_pipeline.tokenization.roles.WELL_KNOWN`). Raises
        :class:`UserError` if there is no tokenizer, if it cannot be read, or if nothing in it can end a document.
        """
        return cls(*read_tokenizer(Path(path)))

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``; no special token is added."""
        encodings = (self._backend.encode(piece, add_special_tokens=False) for piece in self.pieces(text))
        return [id_ for encoding in encodings for id_ in encoding.ids]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, on all cores (``RAYON_NUM_THREADS``); no special token is added."""
        if any(map(is_long, texts)):
            return [self.encode(text) for text in texts]
        if self._settled is not None:
            texts = [self._settled.settle(text) for text in texts]
        # _fast leaves out the character offsets, which nobody here reads.
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def pieces(self, text: str) -> list[str]:
        """Pieces of a long text whose ids, end to end, are those of the whole: memory is that of a piece, not 130
        bytes for each character. Raises :class:`UserError` for a huge text that cannot be cut."""
        if self._settled is not None:
            text = self._settled.settle(text)
        return cut(self._backend, text) if is_long(text) else [text]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids, special tokens skipped; bytes that are not UTF-8 (a cut character) become U+FFFD.

        How much of the text comes back depends on the model: :mod:`data_pipeline.tokenization.training`.
        """
        return str(self._backend.decode([int(i) for i in ids], skip_special_tokens=True))

    def decode_batch(self, batch: Sequence[Sequence[int]]) -> list[str]:
        """:meth:`decode` for each of several documents, on all cores."""
        return list(self._backend.decode_batch([list(ids) for ids in batch], skip_special_tokens=True))

    def name_of(self, token: int) -> str:
        """What the vocabulary calls a token id, such as ``<mask>`` or ``Ġthe``; "" for an id that it does not have."""
        return self._backend.id_to_token(token) or ""

    def vocabulary(self) -> dict[str, int]:
        """Text of each token, special ones included -> its id."""
        return dict(self._backend.get_vocab(with_added_tokens=True))

    def to_json(self) -> str:
        """The canonical ``tokenizer.json``."""
        return self._json

    def files(self) -> dict[str, bytes]:
        """Name -> contents of the files that :meth:`save` writes, in the formats of `tokenizers` and transformers."""
        roles = {f"{role}_token": None for role in ROLES}
        config: dict[str, Any] = {"clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast"}
        config |= roles | {f"{role}_token": self._backend.id_to_token(i) for role, i in self.roles.as_dict().items()}
        text = json.dumps(config, sort_keys=True, ensure_ascii=False, indent=1) + "\n"
        return {TOKENIZER_FILE: self._json.encode(), CONFIG_FILE: text.encode()}

    def save(self, folder: str | Path) -> Path:
        """Write :data:`TOKENIZER_FILES` into ``folder`` (atomically); returns the path of its ``tokenizer.json``.

        :meth:`load` gives the same hash back, and transformers' ``AutoTokenizer`` reads the folder too.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in reversed(self.files().items()):  # tokenizer.json last: with it the folder is whole
            write_atomic(folder / name, data, shared=True)  # the jobs of an array start together
        return folder / TOKENIZER_FILE

    def __reduce__(self) -> tuple[Any, ...]:
        # The library's own pickling forgets encode_special_tokens.
        return _unpickle, (self._json, {role: self._backend.id_to_token(i) for role, i in self.roles.as_dict().items()})

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, hash={self.hash[:12]})"


def canonical_json(text: str) -> str:
    """One spelling for equal contents: sorted keys, no padding. The order of merges is a list and stays.

    Numbers (the scores of Unigram) get 12 digits: the library does not read back all of the 17 that it writes, so that
    a file would change each time it is loaded and saved.
    """
    data: dict[str, Any] = json.loads(text, parse_float=lambda number: float(f"{float(number):.12g}"))
    return json.dumps(data, sort_keys=True, ensure_ascii=False, separators=(",", ":")) + "\n"


def _from_json(text: str) -> tokenizers.Tokenizer:
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(text)
    # Not stored in tokenizer.json, so it has to be set on every object; or "<mask>" in raw text is the mask.
    backend.encode_special_tokens = True
    return backend


def _unpickle(text: str, declared: dict[str, str]) -> Tokenizer:
    roles: dict[str, str | None] = dict.fromkeys(ROLES)
    return Tokenizer(_from_json(text), roles | declared)


def _settle(backend: tokenizers.Tokenizer, declared: Mapping[str, str | None], where: str) -> None:
    """Bring ``backend`` into the one state in which equal vocabularies give equal ids."""
    from tokenizers import AddedToken

    backend.no_truncation()
    backend.no_padding()
    if getattr(backend.model, "dropout", None):
        raise UserError(f"{where}: BPE dropout gives other ids each time; set model.dropout to null in the file")
    vocabulary = backend.get_vocab(with_added_tokens=True)
    if not vocabulary:
        raise UserError(f"{where}: the vocabulary is empty")
    for role, text in declared.items():
        if text is not None and text not in vocabulary:
            raise UserError(
                f"{where}: the configuration beside it names {text!r} as {role}_token, which is not in the vocabulary; "
                "correct the configuration, or add the token and save the tokenizer again"
            )
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    missing = sorted({t for t in declared.values() if t is not None} - special, key=vocabulary.__getitem__)
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in missing])
    backend.encode_special_tokens = True


def _unknown(backend: tokenizers.Tokenizer) -> str | None:
    """The token that the model itself puts for what it does not know."""
    model = json.loads(backend.to_str())["model"]
    if model["type"] == "Unigram":
        return None if model["unk_id"] is None else str(model["vocab"][model["unk_id"]][0])
    return model.get("unk_token")


def _keep_text_text(backend: tokenizers.Tokenizer, specials: Mapping[str, int], unk: str | None, where: str) -> None:
    """See to it that no raw text gets a special id, also from a model that finds ``</s>`` among its ordinary pieces.

    Unigram vocabularies list the special tokens with the others, at a score of 0, the best. Where that happens, the
    text is cut after the first character of a special token's name, so that no piece holds the whole name.
    """
    from tokenizers import pre_tokenizers

    try:
        backend.encode("\U0010ffff a", add_special_tokens=False)
    except Exception as error:
        raise UserError(f"{where}: characters outside the vocabulary cannot be encoded ({error})") from None
    names = {text: id_ for text, id_ in specials.items() if text != unk}
    if not _leaks(backend, names):
        return
    cut = split_names(text for text in specials if len(text) > 1)
    before = backend.pre_tokenizer
    backend.pre_tokenizer = cut if before is None else pre_tokenizers.Sequence([before, cut])
    leaks = _leaks(backend, names)
    if leaks:
        raise UserError(
            f"{where}: the text {leaks[0]!r} would be encoded as the special token of that name; a special token needs "
            "a name that the tokenizer does not find in ordinary text"
        )


def split_names(names: Iterable[str]) -> Any:
    """A pre-tokenizer that cuts off the first character of each occurrence of one of ``names``."""
    from tokenizers import Regex, pre_tokenizers

    pattern = "|".join(f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in sorted(names))
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def _leaks(backend: tokenizers.Tokenizer, names: Mapping[str, int]) -> list[str]:
    """The names that come out as special ids; not for the unknown token, which is right for unknown characters."""
    probes = [(text, id_, probe) for text, id_ in names.items() for probe in (text, f"a{text}b", f"a {text} b")]
    found = backend.encode_batch_fast([probe for *_, probe in probes], add_special_tokens=False)
    return [text for (text, id_, _), encoding in zip(probes, found, strict=True) if id_ in encoding.ids]
