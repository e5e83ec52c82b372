"""Byte-level BPE: training, loading, encoding, and the hash by which shards and checkpoints recognise their tokenizer.

The vocabulary is learned by byte-pair encoding (Sennrich, Haddow & Birch 2016) over bytes (Radford et al. 2019) with
the `tokenizers` library. All 256 bytes are in the alphabet, so any text can be encoded and decoded again without
loss.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.errors import UserError
from data_pipeline.files import write_atomic

if TYPE_CHECKING:
    import tokenizers

TOKENIZER_FILE = "tokenizer.json"
BOS, PAD, EOS, UNK, MASK = "<s>", "<pad>", "</s>", "<unk>", "<mask>"
SPECIAL_TOKENS = (BOS, PAD, EOS, UNK, MASK)  # their places in this tuple are their ids
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)


class Tokenizer:
    """A byte-level BPE tokenizer with the special tokens ``<s> <pad> </s> <unk> <mask>`` at ids 0 to 4.

    Raw text stays text: a literal ``<mask>`` or ``</s>`` in a document is encoded byte by byte like any other text and
    never becomes the special id.
    """

    bos_id, pad_id, eos_id, unk_id, mask_id = range(5)
    special_ids: tuple[int, ...] = (0, 1, 2, 3, 4)

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        # Not stored in tokenizer.json, so it has to be set on every object; or "<mask>" in raw text is the mask.
        backend.encode_special_tokens = True
        self._backend = backend
        self._json = canonical_json(backend.to_str())
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.hash: str = hashlib.sha256(self._json.encode()).hexdigest()

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a folder that holds ``tokenizer.json``, or that file itself.

        Raises :class:`UserError` if it is missing, is not a tokenizer, or has other special tokens than those above.
        """
        import tokenizers

        path = Path(path)
        file = path / TOKENIZER_FILE if path.is_dir() else path
        if not file.is_file():
            raise UserError(f"no tokenizer at {path}: expected {file}; `nystrom data tokenizer` trains one")
        try:
            backend = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:  # the Rust library raises bare Exception
            raise UserError(f"{file} is not a tokenizer.json of the tokenizers library: {error}") from None
        for index, token in enumerate(SPECIAL_TOKENS):
            if backend.token_to_id(token) != index:
                raise UserError(
                    f"{file}: special token {token} must have id {index}, it has {backend.token_to_id(token)}; "
                    "train a tokenizer with `nystrom data tokenizer`"
                )
        ids = backend.get_vocab(with_added_tokens=True).values()
        if max(ids) != len(ids) - 1:
            raise UserError(f"{file}: the ids of the vocabulary have gaps ({len(ids)} tokens, largest id {max(ids)})")
        return cls(backend)

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``; no special token is added."""
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, on all cores (``RAYON_NUM_THREADS``); no special token is added."""
        # _fast leaves out the character offsets, which nobody here reads.
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids, special tokens skipped; bytes that are not UTF-8 (a cut character) become U+FFFD."""
        return str(self._backend.decode([int(i) for i in ids], skip_special_tokens=True))

    def to_json(self) -> str:
        """The canonical ``tokenizer.json``, the text that :attr:`hash` is the SHA-256 of."""
        return self._json

    def save(self, folder: str | Path) -> Path:
        """Write ``folder/tokenizer.json`` (atomically) and return its path."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / TOKENIZER_FILE, self._json.encode())
        return folder / TOKENIZER_FILE

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, hash={self.hash[:12]})"


def canonical_json(text: str) -> str:
    """One spelling for equal contents: sorted keys, no padding. The order of merges is a list and stays."""
    data: dict[str, Any] = json.loads(text)
    return json.dumps(data, sort_keys=True, ensure_ascii=False, separators=(",", ":")) + "\n"


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a byte-level BPE vocabulary of ``vocab_size`` tokens, special tokens and the 256 bytes included.

    Streams the documents once; memory grows with the number of distinct words, not with the text. The same documents
    give the same tokenizer. With too little text the vocabulary comes out smaller: look at ``vocab_size`` of the
    result.

    Raises :class:`UserError` for a vocabulary below 256 bytes + 5 special tokens and for zero documents.
    """
    check_vocab_size(vocab_size)
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = tokenizers.Tokenizer(models.BPE(unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,  # its bar knows no total and draws over the caller's
    )
    counted = _Counted(documents)
    backend.train_from_iterator(iter(counted), trainer)
    if not counted.count:
        raise UserError("no documents to train a tokenizer on")
    return Tokenizer(backend)


def check_vocab_size(vocab_size: int) -> None:
    """Raise :class:`UserError` for a vocabulary that cannot hold the 256 bytes and the special tokens."""
    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(
            f"vocabulary of {vocab_size} is too small: byte-level BPE needs the 256 bytes and {len(SPECIAL_TOKENS)} "
            f"special tokens, {SMALLEST_VOCABULARY} in all; a few thousand is the least that is useful"
        )


class _Counted:
    """Counts what passes, so that an empty stream is noticed without reading ahead."""

    def __init__(self, documents: Iterable[str]) -> None:
        self._documents = documents
        self.count = 0

    def __iter__(self) -> Iterator[str]:
        for document in self._documents:
            self.count += 1
            yield document
