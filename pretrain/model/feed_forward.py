"""Kinds of feed-forward layers by name: an activation, and whether a second matrix gates it.

A further kind is one entry of :data:`FEED_FORWARDS`. A configuration is read with this module, so it imports torch
where a layer is built and not before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class FeedForwardKind:
    """``output(act(intermediate(x)))``, or gated ``output(act(gate(x)) * intermediate(x))``."""

    activation: Callable[[], Activation]
    """Imports what it needs and returns the function."""
    gated: bool = False

    @property
    def matrices(self) -> int:
        """Of ``hidden_size`` by the layer's width."""
        return 3 if self.gated else 2


def _gelu() -> Activation:
    import torch.nn.functional as F

    return partial(F.gelu, approximate="tanh")


def _silu() -> Activation:
    import torch.nn.functional as F

    return F.silu


def _relu2() -> Activation:
    def squared(x: Tensor) -> Tensor:
        return x.relu().square()

    return squared


FEED_FORWARDS = {
    "gelu": FeedForwardKind(_gelu),
    "geglu": FeedForwardKind(_gelu, gated=True),
    "swiglu": FeedForwardKind(_silu, gated=True),
    "relu2": FeedForwardKind(_relu2),
}
"""gelu: Hendrycks and Gimpel 2016, in its tanh form, transformers' ``gelu_new``. geglu, swiglu: Shazeer 2020. relu2: So
et al. 2021 (Primer, arXiv 2109.08668)."""


GATED = tuple(name for name, kind in FEED_FORWARDS.items() if kind.gated)
"""Kinds with a gate."""


def default_width(hidden_size: int, gated: bool) -> int:
    """4 x hidden_size; gated 2/3 of that, rounded up to a multiple of 16, which products in 16 bit want.

    So three matrices have as many parameters as two (Shazeer 2020, arXiv 2002.05202, section 3).
    """
    return -(-8 * hidden_size // 48) * 16 if gated else 4 * hidden_size


def feed_forward_kind(name: str) -> FeedForwardKind:
    """The kind of this name. Raises ``ValueError``, with the known names, for an unknown one."""
    if name not in FEED_FORWARDS:
        raise ValueError(f"there is no feed-forward layer '{name}': known: {', '.join(FEED_FORWARDS)}")
    return FEED_FORWARDS[name]
