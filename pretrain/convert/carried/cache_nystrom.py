"""The decoding cache as transformers' ``generate`` handles it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache

from pretrain.model.attention.layout import Layout
from pretrain.model.decoding import DecodingCache

if TYPE_CHECKING:
    from pretrain.model.config import ModelConfig


class NystromCache(Cache):
    """State of B texts for up to ``max_length`` tokens each; the first forward pass with it fills it.

    Its size is known from the start, and so ``generate`` makes it: ring buffer and landmarks, and not all keys.
    It cannot go back: :meth:`crop` is refused, and with it assisted generation.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, max_length: int) -> None:
        super().__init__(layers=[])
        self.max_length = max_length
        self.columns = 0
        """Tokens and padding that each row has been given so far."""
        self.state: DecodingCache | None = None

    def begin(self, config: ModelConfig, layout: Layout, dtype: torch.dtype, device: torch.device) -> DecodingCache:
        """Make the state for prompts, and plan the forward pass over them."""
        self.state = DecodingCache(config, layout.batch, self.max_length, dtype=dtype, device=device)
        self.state.begin(layout)
        return self.state

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen: what ``generate`` cuts off from the ids that it passes next."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Tokens that a text may come to."""
        return self.max_length

    get_max_cache_shape = get_max_length

    def __len__(self) -> int:
        return 0 if self.state is None else len(self.state.layers)

    @property
    def is_initialized(self) -> bool:
        """Whether it holds prompts."""
        return self.state is not None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Only these rows from now on, in this order, some of them several times."""
        if self.state is not None:
            self.state.keep(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        """The same by another name."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row so many times, next to each other."""
        if self.state is not None:
            rows = len(self.state.lengths)
            self.state.keep([row for row in range(rows) for _ in range(repeats)])

    def reset(self) -> None:
        """Forget the texts."""
        self.state, self.columns = None, 0

    def crop(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            "the cache of a Nyströmformer holds landmarks in place of far tokens, so it cannot be cut back: generate "
            "without an assistant model"
        )

    activate_past_recording = crop
