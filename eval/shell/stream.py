"""Tokens become text as they are chosen: only what later tokens cannot change is handed out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence

from data_pipeline.tokenization.tokenizer import Tokenizer

CUT = "�"
"""What stands for bytes that are not (yet) a character."""
CONTEXT = 8
"""Tokens of the prompt that are decoded with a continuation: some tokenizers drop the space before the first word."""


class Detokenizer:
    """Text of continuations: what decoding the whole adds to the prompt."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.byte_ids = byte_tokens(tokenizer)

    def text(self, prompt: Sequence[int], new: Sequence[int]) -> str:
        """Of the tokens ``new`` behind ``prompt``."""
        context = list(prompt[-CONTEXT:])
        before = self.tokenizer.decode(context)
        whole = self.tokenizer.decode([*context, *new])
        return whole[len(before) :] if whole.startswith(before) else self.tokenizer.decode(new)

    def settled(self, prompt: Sequence[int], new: Sequence[int]) -> str:
        """The part of it that no further token changes.

        A character whose bytes are in several tokens is left out until it is whole. So is a run of byte tokens
        (``<0xE2>``): one that is wrong makes the decoder write all of its run as wrong.
        """
        end = len(new)
        while end and new[end - 1] in self.byte_ids:
            end -= 1
        return self.text(prompt, new[:end]).rstrip(CUT)


def byte_tokens(tokenizer: Tokenizer) -> frozenset[int]:
    """The ids of single bytes in vocabularies that fall back to them; none in others."""
    text = tokenizer.to_json()
    if '"ByteFallback"' not in text:
        return frozenset()
    vocabulary = json.loads(text)["model"]["vocab"]
    names = vocabulary if isinstance(vocabulary, dict) else {entry[0]: i for i, entry in enumerate(vocabulary)}
    return frozenset(i for name, i in names.items() if re.fullmatch(r"<0x[0-9A-F]{2}>", name))


class TextStream:
    """One continuation: its tokens, its text so far, and whether one of the ``stops`` ended it.

    The pieces that :meth:`push` and :meth:`finish` return make up :attr:`text`, which ends before the first stop.
    """

    def __init__(self, detokenizer: Detokenizer, prompt: Sequence[int], stops: Sequence[str] = ()) -> None:
        self.detokenizer = detokenizer
        self.prompt = list(prompt[-CONTEXT:])
        self.stops = list(stops)
        self.tokens: list[int] = []
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that this token settles, possibly none."""
        self.tokens.append(token)
        return self._advance(self.detokenizer.settled(self.prompt, self.tokens), hold=True)

    def finish(self) -> str:
        """What was held back; after it :attr:`text` is whole."""
        if self.stopped:
            return ""
        return self._advance(self.detokenizer.text(self.prompt, self.tokens), hold=False)

    def _advance(self, whole: str, hold: bool) -> str:
        places = [place for stop in self.stops if (place := whole.find(stop)) >= 0]
        if places:
            self.stopped = True
            end = min(places)
        else:
            end = len(whole) - (self._begun(whole) if hold else 0)
        piece = whole[len(self.text) : end]
        self.text += piece
        return piece

    def _begun(self, whole: str) -> int:
        """Characters at the end that may be the beginning of a stop."""
        longest = max(map(len, self.stops), default=1) - 1
        return next(
            (n for n in range(min(longest, len(whole)), 0, -1) if any(s.startswith(whole[-n:]) for s in self.stops)), 0
        )


class InOrder:
    """Texts that are written at the same time, handed out one after another: the first that is not done as it grows.

    ``begin`` and ``end`` are called with the number of a text before and after its pieces go to ``write``.
    """

    def __init__(
        self, count: int, begin: Callable[[int], None], write: Callable[[str], None], end: Callable[[int], None]
    ) -> None:
        self.waiting: list[list[str]] = [[] for _ in range(count)]
        self.done = [False] * count
        self.begin, self.write, self.end = begin, write, end
        self.front = 0
        if count:
            begin(0)

    def add(self, number: int, piece: str) -> None:
        """More of a text."""
        if not piece:
            return
        if number == self.front:
            self.write(piece)
        else:
            self.waiting[number].append(piece)

    def finish(self, number: int) -> None:
        """A text is whole."""
        self.done[number] = True
        while self.front < len(self.done) and self.done[self.front]:
            self.end(self.front)
            self.front += 1
            if self.front < len(self.done):
                self.begin(self.front)
                if self.waiting[self.front]:
                    self.write("".join(self.waiting[self.front]))
