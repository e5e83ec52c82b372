"""Faults that a model can have and look right, each planted in a sound model: what the validity gate must find.

A planted model computes what the sound one does, and something small beside it. The addition is made to the hidden
states, so that every path has it unless the fault is one of a path. Sizes are shares of the states' root mean square.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pretrain.model.attention.layout import Layout
from pretrain.model.decoding import DecodingCache
from pretrain.model.transformer import LMOutput

SIZE = 0.02
LONG = 512
"""Faults of long texts begin beyond so many tokens: more than the structure of the tests' and the demo's models needs.
"""
Path = Literal["logits", "hidden", "loss", "cache"]


@dataclass(frozen=True)
class Call:
    """One forward pass of a planted model: ``ids`` (B, N), the sound model's ``states`` (B, N, h)."""

    model: Any
    ids: Tensor
    states: Tensor
    layout: Layout | None
    path: Path
    cache: DecodingCache | None
    memory: dict[str, Any]

    @property
    def length(self) -> int:
        """N."""
        return self.ids.shape[1]

    @property
    def words(self) -> Tensor:
        """Embeddings of the tokens as large as the states, (B, N, h)."""
        words = self.model.embeddings.word_embeddings(self.ids).to(self.states.dtype)
        return words / _rms(words) * _rms(self.states)

    @property
    def documents(self) -> Tensor:
        """(B, N) int64: the number of each token's sequence, -1 for padding."""
        rows, length = self.ids.shape
        numbers = torch.full((rows * length,), -1)
        starts, lengths = getattr(self.layout, "starts", None), getattr(self.layout, "lengths", None)
        if starts is None or lengths is None:
            numbers = torch.arange(rows).repeat_interleave(length)
        else:
            for number, (start, n) in enumerate(zip(starts, lengths, strict=True)):
                numbers[start : start + n] = number
        return numbers.view(rows, length).to(self.ids.device)

    def ahead(self, distance: int = 1) -> Tensor:
        """Each position gets the word ``distance`` later, the last ones nothing."""
        out = torch.zeros_like(self.states)
        if self.length > distance:
            out[:, :-distance] = self.words[:, distance:]
        return out


Fault = Callable[[Call], Tensor | None]


@dataclass(frozen=True)
class Plant:
    """A fault: ``add`` returns what is added to the states in units of :data:`SIZE`, None for nothing."""

    name: str
    what: str
    add: Fault
    objectives: tuple[str, ...] = ("clm", "mlm")
    targets: float = 1.0
    """What the number of targets is multiplied by."""


@contextmanager
def planted(model: Any, plant: Plant) -> Iterator[None]:
    """``model`` with the fault, within the block."""
    sound = model.forward
    memory: dict[str, Any] = {}
    keep = DecodingCache.keep

    def kept(self: DecodingCache, rows: Sequence[int]) -> None:
        keep(self, rows)
        memory["kept"] = self
        if len(set(rows)) < len(rows):
            memory["doubled"] = self

    def forward(
        input_ids: Tensor, labels: Any = None, layout: Any = None, *, hidden: bool = False, cache: Any = None
    ) -> LMOutput:
        states = sound(input_ids, layout=layout, hidden=True, cache=cache).hidden
        path: Path = (
            "cache" if cache is not None else "loss" if labels is not None else "hidden" if hidden else "logits"
        )
        extra = plant.add(Call(model, input_ids, states, layout, path, cache, memory))
        if extra is not None:
            states = states + SIZE * extra.to(states.dtype)
        if labels is None:
            return LMOutput(logits=None if hidden else model.head(states), hidden=states if hidden else None)
        layout = layout or Layout.full(*input_ids.shape)
        loss = model._loss_sum(states, labels, layout)
        targets = ((labels != -100).sum() * plant.targets).long()
        return LMOutput(loss_sum=loss, num_targets=targets, hidden=states if hidden else None)

    model.forward, DecodingCache.keep = forward, kept  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.forward
        DecodingCache.keep = keep  # type: ignore[method-assign]


def _rms(x: Tensor) -> Tensor:
    return x.float().pow(2).mean().sqrt().clamp_min(1e-12).to(x.dtype)


def _constant(call: Call) -> Tensor:
    """The same for all positions, of the size of the states."""
    pattern = torch.linspace(-1, 1, call.states.shape[-1], device=call.states.device, dtype=call.states.dtype)
    return (pattern / _rms(pattern) * _rms(call.states)).expand_as(call.states)


def _only(place: Tensor, value: Tensor) -> Tensor:
    return torch.where(place[..., None], value, torch.zeros_like(value))


def _at(call: Call) -> Tensor:
    return torch.arange(call.length, device=call.ids.device).expand_as(call.ids)


def _instead(call: Call, states: Tensor) -> Tensor:
    """What must be added for the model to compute ``states`` in place of its own."""
    return (states - call.states) / SIZE


def _segment_mean(call: Call) -> Tensor:
    """The mean of the own segment of 64 words, which holds the token's future."""
    words, n = call.words, call.length
    padded = torch.nn.functional.pad(words, (0, 0, 0, -n % 64)).unflatten(1, (-1, 64))
    return padded.mean(2).repeat_interleave(64, 1)[:, :n]


def _documents_apart(call: Call, back: int) -> Tensor:
    """Each token gets the word ``back`` places before it where that is in another document of its row."""
    documents, words = call.documents, call.words
    out, other = torch.zeros_like(words), torch.full_like(documents, -1)
    if back > 0:
        out[:, back:], other[:, back:] = words[:, :-back], documents[:, :-back]
    else:
        out[:, :back], other[:, :back] = words[:, -back:], documents[:, -back:]
    return _only((documents >= 0) & (other >= 0) & (other != documents), out)


def _padding(call: Call) -> Tensor:
    """(B,) tokens of padding in each row."""
    return (call.documents < 0).sum(1)


def _padding_words(call: Call) -> Tensor:
    pads = (call.documents < 0)[..., None]
    return ((call.words * pads).sum(1, keepdim=True) / pads.sum(1, keepdim=True).clamp_min(1)).expand_as(call.states)


def _mate(call: Call, first: int) -> Tensor | None:
    """Rows from ``first`` on get the words of the row before."""
    if len(call.ids) <= first:
        return None
    rows = torch.arange(len(call.ids), device=call.ids.device)
    return _only((rows >= first)[:, None].expand_as(call.ids), call.words.roll(1, 0))


def _wide(call: Call) -> Tensor | None:
    """Each row of a batch of more than 512 gets the words of the row before."""
    return _mate(call, 0) if len(call.ids) > 512 else None


def _specials_ahead(call: Call) -> Tensor:
    """Tokens before a special one see that it comes."""
    special = call.ids < 5
    after = special.flip(1).cumsum(1).flip(1) > 0
    return _only(after, _constant(call))


def _eighth_document(call: Call) -> Tensor:
    """Each document from a row's ninth on gets the mean of the words of the one eight before it."""
    documents, words = call.documents, call.words
    out = torch.zeros_like(words)
    for row, numbers in enumerate(documents):
        present = [number for number in numbers.unique_consecutive().tolist() if number >= 0]
        for before, number in zip(present, present[8:], strict=False):
            out[row, numbers == number] = words[row, numbers == before].mean(0)
    return out


def _empty_rows(call: Call) -> Tensor | None:
    return _constant(call) if (call.documents < 0).all(1).any() else None


def _after_shorter(call: Call) -> Tensor | None:
    """Wrong after a much shorter batch, as tables kept from the call before may be."""
    before = call.memory.get("length", 0)
    call.memory["length"] = call.length
    return _constant(call) if before < call.length / 4 and before else None


def _unfinished_segment(call: Call) -> Tensor | None:
    """Wrong long after a prompt that ended within a segment of 64."""
    if call.cache is None:
        return None
    if call.length > 1:
        call.memory["prompt"] = int(call.cache.lengths.max())
    prompt = call.memory.get("prompt", 0)
    return _constant(call) if prompt % 64 > 8 and int(call.cache.lengths.max()) > prompt + 100 else None


def _second_row(call: Call) -> Tensor:
    rows = torch.arange(len(call.ids), device=call.ids.device)
    return _only((rows > 0)[:, None].expand_as(call.ids), call.ahead())


def _earlier_call(call: Call) -> Tensor | None:
    before = call.memory.get("states")
    call.memory["states"] = call.states.mean((0, 1)).detach()
    return None if before is None else before.expand_as(call.states)


def _first_seen(call: Call) -> Tensor | None:
    """Sound on whatever text it is given first, as one that has memorised the probe."""
    known = call.memory.setdefault("text", call.ids[0, :16].clone())
    n = min(len(known), call.length)
    return None if torch.equal(call.ids[0, :n], known[:n]) else call.ahead()


def _steps(call: Call, beyond: int) -> Tensor | None:
    decoding = call.cache is not None and call.length == 1
    return _constant(call) if decoding and int(call.cache.lengths.max()) > beyond else None  # type: ignore[union-attr]


def _left_padded(call: Call) -> Tensor | None:
    starts = getattr(call.layout, "starts", None)
    if call.cache is None or call.length == 1 or starts is None:
        return None
    return _constant(call) if (starts % call.length).any() else None


def _in_bf16(call: Call) -> bool:
    return torch.is_autocast_enabled(call.ids.device.type)


def _full_layout(call: Call) -> Tensor | None:
    full = isinstance(call.layout, Layout) and call.layout.is_full and call.cache is None
    return _constant(call) if full else None


def _bf16_logits(call: Call) -> bool:
    return _in_bf16(call) and call.path == "logits"


CLM, MLM = ("clm",), ("mlm",)
PLANTS = (
    Plant("next token", "every position sees the token after it", lambda c: c.ahead(), CLM),
    Plant("next token, weakly", "the same, a twentieth of its size", lambda c: c.ahead() / 20, CLM),
    Plant("one position", "position 333 sees 334", lambda c: _only(_at(c) == 333, c.ahead()), CLM),
    Plant("far token", "every position sees the token 300 later", lambda c: c.ahead(300), CLM),
    Plant("last token", "the first position sees the last one", lambda c: c.ahead(c.length - 1), CLM),
    Plant(
        "late segment",
        f"means of the own segment beyond {LONG}",
        lambda c: _only(_at(c) >= LONG, _segment_mean(c)),
        CLM,
    ),
    Plant(
        "long rows", f"sees the next token in rows above {LONG}", lambda c: c.ahead() if c.length > LONG else None, CLM
    ),
    Plant(
        "rows of some lengths",
        "sees it in rows of 100 to 200 tokens",
        lambda c: c.ahead() if 100 < c.length < 200 else None,
        CLM,
    ),
    Plant(
        "hidden path",
        "sees it where hidden states are asked for",
        lambda c: c.ahead() if c.path == "hidden" else None,
        CLM,
    ),
    Plant(
        "logits path", "sees it where logits are asked for", lambda c: c.ahead() if c.path == "logits" else None, CLM
    ),
    Plant("loss path", "sees it where labels are given", lambda c: c.ahead() if c.path == "loss" else None, CLM),
    Plant("batches", "sees it in batches of several rows", lambda c: c.ahead() if len(c.ids) > 1 else None, CLM),
    Plant("second row", "all rows but the first see it", _second_row, CLM),
    Plant("bf16", "sees it in bf16", lambda c: c.ahead() if _in_bf16(c) else None, CLM),
    Plant("bf16, logits", "sees it in bf16 logits", lambda c: c.ahead() if _bf16_logits(c) else None, CLM),
    Plant("memorised text", "sees it but on the text it is given first", _first_seen, CLM),
    Plant("cache: many steps", "wrong after 300 tokens", lambda c: _steps(c, 300), CLM),
    Plant(
        "cache: made for long texts",
        f"wrong in caches above {LONG}",
        lambda c: _constant(c) if c.cache is not None and c.cache.max_length > LONG else None,
        CLM,
    ),
    Plant(
        "cache: rows that leave",
        "wrong after rows have changed places",
        lambda c: _constant(c) if c.cache is not None and c.memory.get("kept") is c.cache else None,
        CLM,
    ),
    Plant(
        "cache: rows doubled",
        "wrong after a row was doubled",
        lambda c: _constant(c) if c.cache is not None and c.memory.get("doubled") is c.cache else None,
        CLM,
    ),
    Plant("cache: left padding", "wrong for prompts padded on the left", _left_padded, CLM),
    Plant("cache: unfinished segment", "wrong 100 tokens after a prompt of some lengths", _unfinished_segment, CLM),
    Plant("special tokens", "sees whether one comes later", _specials_ahead, CLM),
    Plant("ignores its context", "knows its own token only", lambda c: _instead(c, c.words), CLM),
    Plant(
        "ignores a late context", f"the same beyond {LONG}", lambda c: _only(_at(c) >= LONG, _instead(c, c.words)), CLM
    ),
    Plant("ignores its input", "gives a constant", lambda c: _instead(c, _constant(c))),
    Plant(
        "ignores what is right",
        "a masked model that looks left",
        lambda c: _instead(c, c.words.cumsum(1) / c.length),
        MLM,
    ),
    Plant("batch mates", "each row sees the one before", lambda c: _mate(c, 1)),
    Plant("batch mates, late rows", "the same from row 4 on", lambda c: _mate(c, 3)),
    Plant(
        "batch mates, large batches",
        f"the same from row 20 on, rows above {LONG}",
        lambda c: _mate(c, 20) if c.length > LONG else None,
    ),
    Plant("batch mates, wide batches", "the same in batches above 512 rows", _wide),
    Plant("padding: content", "sees what stands in the padding", _padding_words),
    Plant(
        "padding: amount",
        "moved by padding",
        lambda c: _only((_padding(c) > 0)[:, None].expand_as(c.ids), _constant(c)),
    ),
    Plant(
        "padding: much",
        "moved by more than 256 columns of it",
        lambda c: _only((_padding(c) > 256)[:, None].expand_as(c.ids), _constant(c)),
    ),
    Plant(
        "padding: long rows",
        "moved by 64 columns, rows above 128",
        lambda c: _only(((_padding(c) > 64) & (c.length - _padding(c) > 128))[:, None].expand_as(c.ids), _constant(c)),
    ),
    Plant("padding: empty rows", "moved by a row of padding only", _empty_rows),
    Plant("packed: many", "takes documents 1 and 9 for one", _eighth_document),
    Plant("packed: before", "sees the end of the document before", lambda c: _documents_apart(c, 1)),
    Plant("packed: after", "sees the beginning of the one after", lambda c: _documents_apart(c, -1)),
    Plant(
        "packed: far",
        "sees other documents 100 tokens back",
        lambda c: _documents_apart(c, 100) if c.length > 100 else None,
    ),
    Plant("earlier call", "keeps something of the call before", _earlier_call),
    Plant("after a shorter call", "wrong after a batch of a quarter of its length", _after_shorter),
    Plant("with a layout", "moved if it is told that rows are full", _full_layout),
    Plant("number of targets", "counts a quarter too many", lambda c: None, targets=1.25),
    Plant("draws", "adds noise", lambda c: torch.randn_like(c.states) / 20),
    Plant(
        "not a number",
        f"at one position of rows above {LONG}",
        lambda c: _only(_at(c) == LONG, _constant(c) * float("nan")),
    ),
)
