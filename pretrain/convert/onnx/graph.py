"""The encoder as one graph of tensors: what the exporter traces, at any batch size, length and mask.

In training a batch is taken apart by Python integers, the lengths of its sequences (:class:`Layout`). A graph has no
such integers: lengths come out of the mask at run time. So here all rows stay in one rectangle with a mask, and what
depends on a row's length is selected by row:

* Rows of at most ``exact_up_to`` tokens get exact attention. They have no token beyond that column, so the exact part
  reads the first ``exact_up_to`` columns only: its cost per row is bounded, and the whole stays linear in the length.
* Other rows get landmarks, by the model's own functions, from segments of each row's own length.
* Each of the two stands in a branch (``If`` in ONNX) that runs only if a row of the batch needs it.

The weights and all other code are the model's. Only the layout and the form of attention are replaced. Tests compare
the result with the model in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data_pipeline.errors import UserError
from pretrain.model.attention.form import Form, Given
from pretrain.model.attention.layout import Layout, Partition, Rectangle, Segments, even_segments
from pretrain.model.attention.pattern import written
from pretrain.model.attention.registry import forms_of
from pretrain.model.attention.softmax import softmax_attention
from pretrain.model.compute import at_least_float32
from pretrain.model.config import ModelConfig
from pretrain.model.transformer import Block, NystromformerLM

UNBOUNDED = 2**62
"""Stands for the tokens of a batch's longest sequence, which the graph does not know: more than any limit."""


def check_traceable(config: ModelConfig) -> None:
    """Raise :class:`UserError` for a model that has no such graph, with the reason."""
    if config.objective != "mlm":
        raise UserError(
            "a causal model has no ONNX export. Its decoding reads a cache; a graph without one would compute the "
            "whole text again for every new token. Besides, the tiles that causal landmarks and windows are computed "
            "in follow from the text's length in Python"
        )
    if len(_limits(config)) > 1:
        raise UserError(
            f"attention {written(config.attention)} has no ONNX export: the landmarks of its forms begin at different "
            "lengths, and the graph selects short rows once for all layers"
        )
    read = {key for form in forms_of(config).values() for key in form.settings}
    if "inverse_init" in read and config.landmark_inverse and config.inverse_init != "block":
        raise UserError(
            f"inverse_init: {config.inverse_init} has no ONNX export: what a text gets then depends on the other texts "
            "of its batch, and the model's own batches are cut by length"
        )


def _limits(config: ModelConfig) -> set[int]:
    """Up to how many tokens the layers with landmarks have exact attention; 0 where a form never has."""
    return {form.exact_up_to or 0 for form in forms_of(config).values() if form.pooled_to}


class ShortRows(NamedTuple):
    """Rows that get exact attention, and the columns that these need."""

    rows: Tensor
    """(B, 1, 1, 1) bool."""
    any: Tensor
    """() bool: there is one."""
    all: Tensor
    """() bool: there is no other one."""
    columns: Tensor
    """(C,) int64, 0 to C - 1, where C is the batch's width or ``exact_up_to``, whichever is less."""
    back: Tensor
    """(N,) int64: where each column of the batch is among ``columns``; the last one for those beyond."""


@dataclass(frozen=True)
class MaskedRectangle(Rectangle):
    """The whole batch with a mask. Its ``longest`` is :data:`UNBOUNDED`, so that no form takes it for short."""

    short: ShortRows | None = None
    """For forms with landmarks."""


@dataclass(frozen=True)
class MaskedRows(Layout):
    """Row b is one sequence of ``counts[b]`` >= 1 tokens, known as a tensor only, and padding on its right."""

    counts: Tensor | None = None
    """(B,) int64."""
    exact_up_to: int = 0
    """For a form with landmarks: rows of at most so many tokens get exact attention."""
    most: int = UNBOUNDED
    """Tokens that a row may have."""

    @property
    def is_full(self) -> bool:
        return False

    @property
    def longest(self) -> int:
        """The most that it may be: the graph knows no more."""
        return self.most

    def positions(self, device: torch.device) -> Tensor:
        """(B, N) int64; 0 at padding."""
        return torch.where(self._real(device), torch.arange(self.length, device=device), 0)

    def partition(self, device: torch.device, *, causal: bool, num_landmarks: int | None = None) -> Partition:
        """One rectangle, the batch itself."""
        assert self.counts is not None
        mask = self._real(device)[:, None, None, :]
        if num_landmarks is None:
            return Partition((MaskedRectangle(self.length, UNBOUNDED, None, mask),), None)
        # A short row's segments are of no use, but they must have tokens, and these must exist.
        tokens, sizes = even_segments(self.counts.clamp(min=num_landmarks), num_landmarks, self.length)
        segments = Segments(tokens.clamp(max=self.length - 1), sizes)
        is_short = self.counts <= self.exact_up_to
        # An index, not a slice: a slice would tie the traced graph to lengths on one side of the limit.
        columns = torch.arange(torch.sym_min(self.length, self.exact_up_to), device=device)
        back = torch.arange(self.length, device=device).clamp(max=columns.shape[0] - 1)
        short = ShortRows(is_short[:, None, None, None], is_short.any(), is_short.all(), columns, back)
        return Partition((MaskedRectangle(self.length, UNBOUNDED, None, mask, segments, short),), None)

    def _real(self, device: torch.device) -> Tensor:
        assert self.counts is not None
        return torch.arange(self.length, device=device) < self.counts[:, None]


class TracedForm(Form):
    """A masked form of attention over a :class:`MaskedRectangle`; ``original`` is the one it computes.

    The original's ``attend`` is asked for the whole rectangle with its mask. A form with landmarks gets the segments of
    each row's own length with it, and its short rows are computed beside it.
    """

    def __init__(self, original: Form) -> None:
        super().__init__(original.config)
        self.original = original

    @property
    def exact_up_to(self) -> int:
        """0: nothing outside the graph may decide by a length."""
        return 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rectangle: Rectangle, given: Given) -> Tensor:
        """Equal to ``original`` on every row's own tokens; anything finite on padding."""
        assert isinstance(rectangle, MaskedRectangle)
        assert rectangle.mask is not None
        short, mask = rectangle.short, rectangle.mask
        if short is None:
            return self.original.attend(q, k, v, rectangle, given)

        # Branches must agree in their memory format.
        def landmarks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.original.attend(q, k, v, rectangle, given).contiguous()

        def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            part = Rectangle(UNBOUNDED, UNBOUNDED, None, mask.index_select(3, short.columns))
            q, k, v = (x.index_select(2, short.columns) for x in (q, k, v))
            return softmax_attention(q, k, v, part, causal=False).index_select(2, short.back).contiguous()

        far = _if(~short.all, landmarks, q, k, v)
        near = _if(short.any, exact, q, k, v)
        return torch.where(short.rows, near, far)


def _if(condition: Tensor, branch: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``branch(q, k, v)``, or zeros where the condition, a bool of shape (), does not hold."""

    def nothing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q.new_zeros(q.shape)

    if torch.compiler.is_exporting():
        return torch.cond(condition, branch, nothing, (q, k, v))
    return branch(q, k, v) if condition else nothing(q, k, v)


class TracedEncoder(nn.Module):
    """Token ids and mask, both (B, N) int64, to the last hidden states (B, N, hidden) and, with ``head``, the logits
    (B, N, vocabulary), both at least float32. Shares the weights of ``model``, which is in evaluation mode.

    Tokens with mask 0 are taken out before the first layer, wherever they stand, and their places are filled behind the
    last one. So padding may stand left or right. Outputs at padding are finite and mean nothing. Raises
    :class:`UserError` as :func:`check_traceable`.
    """

    def __init__(self, model: NystromformerLM, *, head: bool = True) -> None:
        super().__init__()
        check_traceable(model.config)
        self.model = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
        for layer in self.model.layers:
            assert isinstance(layer, Block)
            layer.attention.form = TracedForm(layer.attention.form)
        self.has_head = head
        self.exact_up_to = max(_limits(model.config), default=0)
        # Beyond a table of learned positions the model raises. In the graph the index of the row is out of bounds.
        self.most = model.config.max_positions if model.config.positions == "learned" else UNBOUNDED

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """Mask: 0 at padding, anything else at tokens."""
        batch, length = input_ids.shape
        real = (attention_mask != 0).to(torch.int64)
        counts = real.sum(dim=1)
        # Where each token goes: real ones to the front, in order, the others behind them.
        slots = torch.where(real > 0, real.cumsum(1), counts[:, None] + (1 - real).cumsum(1)) - 1
        ids = torch.zeros_like(input_ids).scatter(1, slots, input_ids * real)
        layout = MaskedRows(batch, length, counts=counts.clamp(min=1), exact_up_to=self.exact_up_to, most=self.most)
        hidden = self.model(ids, layout=layout, hidden=True).hidden
        at = slots + length * torch.arange(batch, device=slots.device)[:, None]
        hidden = hidden.flatten(0, 1).index_select(0, at.flatten()).view_as(hidden)
        outputs = (hidden, self.model.head(hidden)) if self.has_head else (hidden,)
        return tuple(x.to(at_least_float32(x.dtype)) for x in outputs)
