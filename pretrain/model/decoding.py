"""Decoding with a cache: a forward pass over a batch of prompts, then one token for each row at a time.

    logits, cache = prefill(model, input_ids, layout, max_length=1024)
    logits = decode(model, logits.argmax(-1), cache)

Both give the logits of a full forward pass over the same text, up to rounding. Every pass is a call of the model
itself, and every weight is used in the module that owns it: what ZeRO-3 asks for, which gathers weights before a
module's forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.errors import UserError
from pretrain.model.attention.cache import DecodingStep
from pretrain.model.attention.layout import Layout
from pretrain.model.attention.registry import forms_of
from pretrain.model.compute import at_least_float32
from pretrain.model.config import ModelConfig

if TYPE_CHECKING:
    from pretrain.model.transformer import NystromformerLM


class DecodingCache:
    """The state of B texts of unequal lengths in all layers, for up to ``max_length`` tokens each."""

    def __init__(
        self, config: ModelConfig, rows: int, max_length: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.config = config
        self.max_length = max_length
        self.device = device
        self.kept = {name: form.cache(max_length) for name, form in forms_of(config).items()}
        """By the name of the form."""
        self.layers = [self.kept[name].layer(rows, dtype, device) for name in config.attention_by_layer]
        self.plans: dict[str, Any] = {}
        """What the next forward pass does, by the name of the form."""
        self._lengths = np.zeros(rows, dtype=np.int64)
        self._position = torch.zeros(rows, dtype=torch.int64, device=device)

    @property
    def lengths(self) -> np.ndarray:
        """(B,) int64: tokens of each text so far. On the host: a step is planned without waiting for the device."""
        return self._lengths

    def begin(self, layout: Layout) -> np.ndarray:
        """Plan a forward pass over prompts, one in each row, padded on either side; returns where in the flattened
        batch each one ends.

        Raises :class:`UserError` for rows without a prompt and for prompts that are too long.
        """
        if self._lengths.any():
            raise RuntimeError("prompts go into an empty cache only: further tokens are given one at a time")
        rows, length = layout.batch, layout.length
        if layout.starts is None or layout.lengths is None:
            starts, lengths = np.arange(rows, dtype=np.int64) * length, np.full(rows, length, dtype=np.int64)
        else:
            starts, lengths = layout.starts, layout.lengths
        if not (lengths.all() and np.array_equal(starts // max(length, 1), np.arange(rows))):
            raise UserError("each row of a batch of prompts must be one sequence of at least one token")
        self._check_lengths(lengths)
        self.plans = {name: kept.prompts(starts, lengths, self.device) for name, kept in self.kept.items()}
        self._set_lengths(lengths)
        return starts + lengths - 1

    def next_step(self) -> DecodingStep:
        """Plan a forward pass over one more token for each row; raises :class:`UserError` if one gets too long."""
        if not self._lengths.all():
            raise RuntimeError("a cache gets prompts first, then single tokens")
        self._check_lengths(self._lengths + 1)
        steps = {name: kept.step(self._lengths, self._position) for name, kept in self.kept.items()}
        self.plans = dict(steps)
        return next(iter(steps.values()))  # as a layout they are all alike

    def advance(self) -> None:
        """Count the tokens of the step, after the pass."""
        self._lengths, self._position = self._lengths + 1, self._position + 1

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows from now on, in this order."""
        index = torch.as_tensor(rows, dtype=torch.int64)
        for layer in self.layers:
            layer.keep(index.to(self.device))
        self._set_lengths(self._lengths[index.numpy()])

    def _check_lengths(self, lengths: np.ndarray) -> None:
        if lengths.max() > self.max_length:
            raise UserError(
                f"a text of {lengths.max()} tokens does not fit a decoding cache made for {self.max_length}: ask for "
                "a larger max_length"
            )

    def _set_lengths(self, lengths: np.ndarray) -> None:
        self._lengths = lengths
        self._position = torch.from_numpy(lengths).to(self.device)


@torch.no_grad()
def prefill(
    model: NystromformerLM, input_ids: Tensor, layout: Layout | None = None, *, max_length: int
) -> tuple[Tensor, DecodingCache]:
    """Run prompts (B, N) through the model: the logits (B, V) after each, and the cache for what follows.

    layout: where each row's prompt is, one in a row, padded on the right (``Layout.from_lengths``) or anywhere
    (``Layout.from_documents``); default full rows. max_length: tokens that a text may come to, prompt included.

    Raises :class:`UserError` for a masked model, a row without a token, and a prompt longer than ``max_length`` or
    than the learned positions.
    """
    if model.config.objective != "clm":
        raise UserError("only a causal model (objective: clm) decodes token by token; this one is masked")
    weight = model.embeddings.word_embeddings.weight
    rows, length = input_ids.shape
    layout = layout or Layout.full(rows, length)
    cache = DecodingCache(model.config, rows, max_length, dtype=weight.dtype, device=input_ids.device)
    last = torch.from_numpy(cache.begin(layout)).to(input_ids.device)
    hidden = model(input_ids, layout=layout, hidden=True, cache=cache).hidden
    assert hidden is not None
    return model.head(hidden.flatten(0, 1)[last]), cache


@torch.no_grad()
def decode(model: NystromformerLM, token_ids: Tensor, cache: DecodingCache) -> Tensor:
    """Append a token to each row: token_ids (B,) int64; returns the logits (B, V) of what follows.

    Raises :class:`UserError`, with the cache as it was, if that is beyond ``max_length`` or the learned positions.
    """
    logits = model(token_ids.unsqueeze(1), layout=cache.next_step(), cache=cache).logits
    assert logits is not None
    cache.advance()
    return logits.squeeze(1)


def cache_elements(config: ModelConfig, rows: int, length: int) -> int:
    """Numbers in a cache for ``rows`` texts of up to ``length`` tokens: all that the tensors of its layers hold.

    For each row and layer, what the layer's form says (:meth:`Form.cache`).
    """
    low, high = _elements_per_row(config, length)
    return rows * (low + high)


def cache_bytes(config: ModelConfig, rows: int, length: int, dtype: torch.dtype) -> int:
    """Bytes of such a cache for a model of ``dtype``. What exact attention would need in its place:
    ``config.model_copy(update={"attention": "softmax"})``."""
    low, high = _elements_per_row(config, length)
    return rows * (low * dtype.itemsize + high * at_least_float32(dtype).itemsize)


def _elements_per_row(config: ModelConfig, length: int) -> tuple[int, int]:
    """Those in the dtype of the model, and those in at least float32."""
    sizes = {name: form.cache(length).elements() for name, form in forms_of(config).items()}
    by_layer = [sizes[name] for name in config.attention_by_layer]
    return sum(low for low, _ in by_layer), sum(high for _, high in by_layer)
