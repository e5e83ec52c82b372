"""Continuations of prompts, in batches and as they grow: :func:`pretrain.model.generation.generate` with its tokens as
text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from data_pipeline.errors import UserError
from eval.shell.stream import Detokenizer, TextStream
from eval.shell.texts import Given
from eval.subject import Subject
from pretrain.model.beam import beam_search
from pretrain.model.generation import check_request, generate
from pretrain.model.sampling import Sampling

END, STOP, LENGTH = "end", "stop", "length"
"""Why a text ended: the model's end-of-text token, a stop that was asked for, or ``max_new_tokens``."""


@dataclass(frozen=True)
class Decoding:
    """How prompts are continued. Raises :class:`UserError` for settings out of range."""

    max_new_tokens: int = 128
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    beams: int = 0
    """Above 0: a beam search in place of sampling."""
    length_penalty: float = 1.0
    stops: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    samples: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        Sampling(self.repetition_penalty, self.temperature, self.top_k, self.top_p)
        if "" in self.stops:
            raise UserError("--stop: an empty text would end every continuation at once")


@dataclass(frozen=True)
class Row:
    """A continuation to be written. The first of its sequence of rows has the number 0."""

    number: int
    prompt: str
    ids: list[int]
    sample: int
    seed: int


@dataclass(frozen=True)
class Written:
    """A continuation. ``tokens``: all new ones, those of a stop text included, the end-of-text token not."""

    prompt: str
    sample: int
    text: str
    tokens: list[int]
    finish_reason: str
    seed: int


class Writer:
    """Continues prompts with one model. Row i draws with the seed ``seed + i``, whatever batch it is in.

    Raises :class:`UserError` for a stop token that the model does not have.
    """

    def __init__(self, subject: Subject, decoding: Decoding) -> None:
        check_request(subject.model, [], decoding.stop_ids, [], decoding.max_new_tokens)
        self.subject = subject
        self.decoding = decoding
        self.detokenizer = Detokenizer(subject.loaded.tokenizer)
        self.rows_so_far = 0

    def rows(self, given: Given) -> list[Row]:
        """The rows of one more prompt; an empty one begins a new document.

        Raises :class:`UserError` for a prompt that the model's learned positions do not reach.
        """
        tokenizer, config = self.subject.loaded.tokenizer, self.subject.loaded.model_config
        ids = tokenizer.encode(given.text) or [tokenizer.eos_id]
        if config.positions == "learned" and len(ids) > config.max_positions:
            raise UserError(
                f"{given.where}: a prompt of {len(ids)} tokens is longer than the {config.max_positions} learned "
                "positions of the model (model.max_positions): shorten it"
            )
        first = self.rows_so_far
        self.rows_so_far += self.decoding.samples
        return [
            Row(first + i, given.text, ids, i, self.decoding.seed + first + i) for i in range(self.decoding.samples)
        ]

    def batches(self, prompts: Iterable[Given], size: int) -> Iterator[list[Row]]:
        """Their rows, ``size`` at a time; a prompt is taken when its first row is."""
        rows = (row for given in prompts for row in self.rows(given))
        while batch := list(islice(rows, size)):
            yield batch

    def write(
        self,
        rows: list[Row],
        on_text: Callable[[int, str], None] | None = None,
        on_end: Callable[[int], None] | None = None,
    ) -> list[Written]:
        """Continue a batch. ``on_text`` gets the place of a row in it and its next piece of text, ``on_end`` the place
        of a row that is whole."""
        said, ended = on_text or (lambda place, piece: None), on_end or (lambda place: None)
        how = self.decoding
        end = self.subject.loaded.tokenizer.eos_id
        stops = {end, *how.stop_ids}
        streams = [TextStream(self.detokenizer, row.ids, how.stops) for row in rows]
        reasons = [LENGTH] * len(rows)
        open_rows = set(range(len(rows)))

        def close(place: int, reason: str) -> None:
            stream = streams[place]
            said(place, stream.finish())
            reasons[place] = STOP if stream.stopped else reason
            open_rows.remove(place)
            ended(place)

        def push(place: int, token: int) -> bool:
            """Take a token; whether the row ends with it."""
            if token in stops:
                close(place, END if token == end else STOP)
                return True
            said(place, streams[place].push(token))
            if streams[place].stopped or len(streams[place].tokens) == how.max_new_tokens:
                close(place, LENGTH)
                return True
            return False

        if how.beams:
            self._search(rows, stops, push, close, open_rows)
        else:
            generate(
                self.subject.model,
                [row.ids for row in rows],
                max_new_tokens=how.max_new_tokens,
                temperature=how.temperature,
                top_k=how.top_k,
                top_p=how.top_p,
                repetition_penalty=how.repetition_penalty,
                seed=[row.seed for row in rows],
                stop_id=sorted(stops),
                on_tokens=lambda places, tokens: [p for p, t in zip(places, tokens, strict=True) if push(p, t)],
            )
        return [
            Written(row.prompt, row.sample, stream.text, stream.tokens, reason, row.seed)
            for row, stream, reason in zip(rows, streams, reasons, strict=True)
        ]

    def _search(
        self,
        rows: list[Row],
        stops: set[int],
        push: Callable[[int, int], Any],
        close: Callable[[int, str], None],
        open_rows: set[int],
    ) -> None:
        """Beam search: a text is known when all of it is, and a stop text cuts it afterwards."""
        how = self.decoding
        texts, _ = beam_search(
            self.subject.model,
            [row.ids for row in rows],
            beams=how.beams,
            max_new_tokens=how.max_new_tokens,
            length_penalty=how.length_penalty,
            stop_id=sorted(stops),
        )
        for place, tokens in enumerate(texts):
            for token in tokens:
                if push(place, token):
                    break
            if place in open_rows:  # a stop token ended it; which of several, the search does not say
                close(place, STOP if how.stop_ids else END)
