"""Learns a vocabulary from text, with the trainers of the `tokenizers` library.

What comes back from :meth:`Tokenizer.decode`:

- ``bpe``: everything. Byte-pair encoding (Sennrich, Haddow & Birch 2016) over bytes (Radford et al. 2019); all 256
  bytes are in the alphabet.
- ``unigram``: everything but the character U+2581, the model's sign for a space, which comes back as a space. Unigram
  language model (Kudo 2018); characters outside the vocabulary are written as bytes, all 256 of which are in it.
- ``wordpiece``: the words. WordPiece as in BERT (Schuster & Nakajima 2012; Devlin et al. 2019): white space becomes a
  single space, and a word with a character outside the alphabet becomes ``<unk>``. With ``lowercase`` case and accents
  are gone.

The same documents give the same vocabulary, whatever the machine or the number of threads. For ``unigram`` this holds
as far as the library allows it: :func:`_settled_pieces`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from data_pipeline.errors import UserError
from data_pipeline.tokenization.roles import SPECIAL_TOKENS, UNK
from data_pipeline.tokenization.tokenizer import Tokenizer, split_names

if TYPE_CHECKING:
    import tokenizers

MODELS = ("bpe", "wordpiece", "unigram")
ALPHABET = 1000  # of WordPiece, the commonest characters, if they take no more than half of the vocabulary; as BERT
_LEAST_LETTERS = 104
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]  # the names by which the library knows bytes
_STEP = 1e-4  # between the scores the library's Unigram trainer makes up for characters it would else have dropped


def train_tokenizer(
    documents: Iterable[str], vocab_size: int, model: str = "bpe", *, lowercase: bool = False
) -> Tokenizer:
    """Learn a vocabulary of ``vocab_size`` tokens, with ``<s> <pad> </s> <unk> <mask>`` at ids 0 to 4.

    ``model`` is "bpe", "wordpiece" or "unigram"; ``lowercase`` (WordPiece only) removes case and accents as BERT's
    uncased models do. Streams the documents; memory grows with the number of distinct words, not with the text.
    WordPiece and Unigram go through ``documents`` twice, first for the alphabet, so these must not be an iterator
    (``ValueError``). With too little text the vocabulary comes out smaller: look at ``vocab_size`` of the result.

    Raises :class:`UserError` for a vocabulary that is too small, and for zero documents.
    """
    check_training(vocab_size, model, lowercase)
    if model == "bpe":
        return Tokenizer(_train_bpe(_Counted(documents), vocab_size))
    if iter(documents) is documents:
        raise ValueError(f"{model} reads the documents twice: give a collection, not an iterator")
    if model == "wordpiece":
        return Tokenizer(_train_wordpiece(_Counted(documents), vocab_size, lowercase))
    return Tokenizer(_train_unigram(_Counted(documents), vocab_size))


def check_training(vocab_size: int, model: str, lowercase: bool = False) -> None:
    """Raise :class:`UserError` for settings that cannot be trained with, before any text is read."""
    if model not in MODELS:
        raise UserError(f"unknown tokenizer model {model!r}: choose one of {', '.join(MODELS)}")
    if lowercase and model != "wordpiece":
        raise UserError(f"lowercase is for wordpiece; {model} keeps the text as it is")
    needs = {len(SPECIAL_TOKENS): "special tokens"}
    if model != "wordpiece":
        needs = {len(_BYTES): "bytes"} | needs
    if model != "bpe":
        needs |= {_LEAST_LETTERS: "letters and pieces of words"}
    if vocab_size < sum(needs):
        names = " and ".join(f"{number} {name}" for number, name in needs.items())
        raise UserError(
            f"a vocabulary of {vocab_size} is too small: {model} needs the {names}, {sum(needs)} in all; "
            "a few thousand is the least that is useful"
        )


def _train_bpe(documents: _Counted, vocab_size: int) -> tokenizers.Tokenizer:
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
    documents.train(lambda texts: backend.train_from_iterator(texts, trainer))
    return backend


def _train_wordpiece(documents: _Counted, vocab_size: int, lowercase: bool) -> tokenizers.Tokenizer:
    """BERT's recipe. The alphabet is counted first and handed over in order. Left to itself, the trainer numbers its
    characters as its hash table yields them, and breaks ties between merges by these numbers. No two trainings on the
    same text would agree."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    backend = tokenizers.Tokenizer(models.WordPiece(unk_token=UNK))
    # Spaces around Chinese characters, which otherwise form "words" too long for the model. The rest is as it comes,
    # unless case is not wanted.
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=lowercase, handle_chinese_chars=True, strip_accents=lowercase, lowercase=lowercase
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    size = min(ALPHABET, (vocab_size - len(SPECIAL_TOKENS)) // 4)
    alphabet = sorted(_commonest(documents, size, backend.normalizer.normalize_str))
    # Punctuation and Chinese characters are words of their own: they never continue one.
    inner = [f"##{c}" for c in alphabet if len(backend.pre_tokenizer.pre_tokenize_str(f"a{c}")) == 1]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[*SPECIAL_TOKENS, *inner],  # this list alone is numbered as given
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    documents.train(lambda texts: backend.train_from_iterator(texts, trainer))
    trained = tokenizers.Tokenizer(models.WordPiece(backend.get_vocab(with_added_tokens=True), unk_token=UNK))
    trained.normalizer, trained.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    trained.decoder = decoders.WordPiece(prefix="##")
    trained.add_special_tokens(list(SPECIAL_TOKENS))
    return trained


def _train_unigram(documents: _Counted, vocab_size: int) -> tokenizers.Tokenizer:
    """SentencePiece's recipe. White space other than the space is kept apart, so that no piece runs over a line's end.
    The names of special tokens and bytes are cut, so that no text is taken for one of them."""
    import tokenizers
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

    room = vocab_size - len(_BYTES) - len(SPECIAL_TOKENS)
    alphabet = _commonest(documents, room // 4, str)
    rare = re.compile(f"[^{re.escape(''.join(sorted(alphabet)))}\\s]")  # they are written as bytes
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[^\S ]+"), "isolated"),
            pre_tokenizers.Metaspace(prepend_scheme="never"),
            split_names([*SPECIAL_TOKENS, *_BYTES]),
        ]
    )
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size - len(_BYTES),
        special_tokens=list(SPECIAL_TOKENS),
        unk_token=UNK,
        show_progress=False,
    )
    documents.train(lambda texts: backend.train_from_iterator((rare.sub(" ", text) for text in texts), trainer))
    pieces = _settled_pieces(json.loads(backend.to_str())["model"]["vocab"][len(SPECIAL_TOKENS) :])
    least = min((score for _, score in pieces), default=0.0)
    vocabulary = [(text, 0.0) for text in SPECIAL_TOKENS] + [(text, least) for text in _BYTES] + pieces
    trained = tokenizers.Tokenizer(models.Unigram(vocabulary, SPECIAL_TOKENS.index(UNK), byte_fallback=True))
    trained.pre_tokenizer = backend.pre_tokenizer
    trained.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never")])
    trained.add_special_tokens(list(SPECIAL_TOKENS))
    return trained


def _settled_pieces(pieces: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Pieces in one order, with scores (log-probabilities, nats) that do not depend on the run.

    The library's trainer adds floating-point numbers in the order of a hash table that is seeded anew each time. Two
    trainings on the same text learned the same pieces in all of 18 settings tried, five times each, with scores that
    differed by up to 4e-11. Characters that it would have dropped it keeps with scores a step apart, again in the
    table's order: they get the lowest score. Rounding to 1e-3, far below what decides between two segmentations, takes
    the rest, save for a score that happens to lie on the edge between two roundings.
    """
    least = min((score for _, score in pieces), default=0.0)
    kept_anyway = least + _STEP * sum(len(text) == 1 for text, _ in pieces)
    scores = {text: least if len(text) == 1 and score < kept_anyway else score for text, score in pieces}
    return sorted(((text, round(score, 3)) for text, score in scores.items()), key=lambda piece: (-piece[1], piece[0]))


def _commonest(documents: _Counted, number: int, normalize: Callable[[str], str]) -> list[str]:
    """The commonest characters other than white space, the first code points first among equals."""
    counts: Counter[str] = Counter()

    def count(texts: Iterator[str]) -> None:
        for text in texts:
            counts.update(normalize(text))

    documents.train(count)
    return sorted((c for c in counts if not c.isspace()), key=lambda c: (-counts[c], c))[:number]


class _Counted:
    """Passes documents to a trainer, and notices an empty stream without reading ahead."""

    def __init__(self, documents: Iterable[str]) -> None:
        self._documents = documents

    def train(self, consume: Callable[[Iterator[str]], None]) -> None:
        """Hand all documents to ``consume``; :class:`UserError` if there are none."""
        count = 0

        def counted() -> Iterator[str]:
            nonlocal count
            for document in self._documents:
                count += 1
                yield document

        consume(counted())
        if not count:
            raise UserError("no documents to train a tokenizer on")
