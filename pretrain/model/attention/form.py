"""What a form of attention is: the parts that the model, decoding, planning and the evaluation ask it for.

Nobody matches on a form's name. Whoever needs to know something of a form asks an object of its class, made for a
model's configuration by :func:`pretrain.model.attention.registry.form_of`, or by ``forms_of`` where layers differ. A
form that lacks a part is refused when it is registered: a part that is missed would else run as another form's.

This module imports no torch when it is loaded: the registry is read while a configuration is parsed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from data_pipeline.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pretrain.model.attention.blockwise import Window
    from pretrain.model.attention.cache import Cache
    from pretrain.model.attention.layout import Layout, Rectangle
    from pretrain.model.config import ModelConfig
    from pretrain.model.positions import RotaryTable

Far = Literal["exact", "approximate", "unseen"]
Given = Mapping[str, "Tensor"]

PARTS = {
    "far": "what a token gets of those beyond exact_up_to: exact, approximate or unseen",
    "attend": "the attention itself",
    "cache": "what decoding keeps, and its size",
    "flops": "floating-point operations per token",
    "exact_up_to": "the length up to which it equals exact attention",
    "parameters": "learned parameters of its own",
}
"""What every form defines itself, beside its ``name``."""


@dataclass(frozen=True)
class OwnParameter:
    """A learned parameter that each layer of a form has."""

    shape: tuple[int, ...]
    reset: Callable[[Tensor], object]
    """Writes the initial values into the tensor it is given, under ``no_grad`` as those of ``torch.nn.init`` are."""
    decay: bool = True
    """Whether the optimizer may decay it; vectors are never decayed."""


class Rotary(NamedTuple):
    """The rotary angles of a batch."""

    table: RotaryTable
    """Of the batch's own tokens."""
    of: Callable[[Tensor], RotaryTable]
    """Of any positions (1 or B, n) int64."""


class Form:
    """A form of attention under one configuration. Letters: heads H of width d, hidden size h = H d, n tokens.

    Subclasses define ``name`` and all of :data:`PARTS`. What comes after them below has a default, which is right for a
    form with nothing special about it.
    """

    name: ClassVar[str]
    far: ClassVar[Far]
    objectives: ClassVar[tuple[str, ...]] = ("mlm", "clm")
    """Those it is defined for."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    @property
    def causal(self) -> bool:
        """No token may see a later one."""
        return self.config.objective == "clm"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rectangle: Rectangle, given: Given) -> Tensor:
        """Attention without the skip convolution. q, k, v: (R, H, L, d), positions applied; returns the same.

        A sequence's result depends on that sequence alone: not on its batch mates, and not on the padding on its right.
        ``rectangle.mask`` marks the padding for a bidirectional form; a causal one does not see it. What a causal form
        returns does not depend on the sequence's length either. ``given``: of :meth:`given`.
        """
        raise NotImplementedError

    def attend_and_convolve(
        self, q: Tensor, k: Tensor, v: Tensor, rectangle: Rectangle, given: Given, weight: Tensor
    ) -> Tensor | None:
        """:meth:`attend` plus the skip convolution with ``weight`` (H, 1, k, 1), for a form that computes both at once.
        None: the form does not, and the two are added."""
        return None

    def cache(self, max_length: int) -> Cache:
        """What decoding keeps of texts of up to ``max_length`` tokens, for a causal model.

        :class:`~pretrain.model.attention.ring.Ring` is for forms that read near tokens, or all;
        :class:`~pretrain.model.attention.whole_text.WholeText` is right for every form, and slow.
        """
        raise NotImplementedError

    def flops(self, seq_len: int) -> float:
        """Floating-point operations per token of one layer's forward pass over full rows, without projections and
        convolution; a multiply-add counts 2. What is computed and then masked is left out."""
        raise NotImplementedError

    @property
    def exact_up_to(self) -> int | None:
        """Sequences of at most so many tokens get exact softmax attention; None: all do; 0: none. Its own parameters
        have no effect on those."""
        raise NotImplementedError

    def parameters(self) -> Mapping[str, OwnParameter]:
        """By name, in the order of the checkpoint. They are parameters of the ``SelfAttention`` module."""
        raise NotImplementedError

    @property
    def window(self) -> Window | None:
        """Segments of a fixed length whose tokens are seen exactly; None for a form without."""
        return None

    @property
    def pooled_to(self) -> int | None:
        """m, where rectangles with padding need the tokens' membership in m landmarks; see ``Layout.partition``."""
        return None

    @property
    def settings(self) -> tuple[str, ...]:
        """Keys of the configuration that it reads, as far as they are about attention."""
        return ()

    def check(self) -> None:
        """Raise :class:`UserError` for settings under which it cannot run; asked when a model is built, which
        ``nystrom plan`` does too."""
        if self.config.objective not in self.objectives:
            raise UserError(
                f"attention: {self.name} is for objective {' or '.join(self.objectives)}, and this model has "
                f"objective {self.config.objective}"
            )

    def prepare(self, layout: Layout, rotary: Rotary | None, device: torch.device, plan: object | None) -> Any:
        """What all layers share for one batch, computed once; :meth:`given` gets it. plan: of the decoding cache, if
        there is one: what :meth:`Cache.prompts` or :meth:`Cache.step` returned."""
        return None

    def given(self, own: Given, shared: Any, device: torch.device) -> Given:
        """What :meth:`attend` and the cache of one layer are given beside queries, keys and values.

        own: the layer's own parameters; also those of another form, where weights are run under this one. shared: of
        :meth:`prepare`. Runs within the module that owns the parameters, as ZeRO-3 asks.
        """
        return own

    def exact_flops(self, seq_len: int) -> float:
        """:meth:`flops` of exact attention: 4 n h; causal, where (n + 1) / 2 tokens are seen on average, 2 (n + 1)
        h."""
        h = self.config.hidden_size
        return 2.0 * (seq_len + 1) * h if self.causal else 4.0 * seq_len * h
