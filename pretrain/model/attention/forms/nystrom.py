"""``attention: nystrom``: far tokens through landmarks; which kind of landmarks, the objective decides.

Masked models have the Nystrom method of Xiong et al. 2021 (:mod:`pretrain.model.attention.nystrom`), causal ones the
window and landmarks of :mod:`pretrain.model.attention.causal_nystrom`. docs/attention.md derives both.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from data_pipeline.errors import UserError
from pretrain.model.attention.blockwise import Window
from pretrain.model.attention.causal_nystrom import causal_nystrom_attention
from pretrain.model.attention.form import Form, Given, OwnParameter, Rotary
from pretrain.model.attention.forms.window import segment_sizes, tokens_seen
from pretrain.model.attention.layout import Layout, Rectangle
from pretrain.model.attention.nystrom import nystrom_attention, pooled_attention
from pretrain.model.attention.pyramid import FLAT, Pyramid
from pretrain.model.attention.registry import FORMS
from pretrain.model.attention.ring import Ring, RingStep
from pretrain.model.compute import at_least_float32
from pretrain.model.positions import RotaryTable, apply_rotary, segment_rotary_table

if TYPE_CHECKING:
    from pretrain.model.config import ModelConfig


@FORMS.register
class Nystrom(Form):
    """A landmark for each segment of the text: m of them (mlm), or one for each c tokens beyond the window (clm)."""

    name = "nystrom"
    far = "approximate"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rectangle: Rectangle, given: Given) -> Tensor:
        """given: ``gamma`` (H,) and ``offset`` (H, S or 1, d) of :func:`causal_nystrom_attention`, as far as there
        are."""
        config = self.config
        if self.causal:
            return causal_nystrom_attention(
                q,
                k,
                v,
                window=self._window,
                offset=given.get("offset"),
                gamma=given.get("gamma"),
                weighted=config.landmark_keys == "weighted",
                pyramid=self.pyramid,
                recall=config.recall_segments,
            )
        if config.landmark_inverse:
            return self._bidirectional(q, k, v, rectangle, None)
        return pooled_attention(q, k, v, rectangle, num_landmarks=config.num_landmarks)

    def attend_and_convolve(
        self, q: Tensor, k: Tensor, v: Tensor, rectangle: Rectangle, given: Given, weight: Tensor
    ) -> Tensor | None:
        if self.causal or not self.config.landmark_inverse:
            return None
        return self._bidirectional(q, k, v, rectangle, weight)

    def _bidirectional(
        self, q: Tensor, k: Tensor, v: Tensor, rectangle: Rectangle, conv_weight: Tensor | None
    ) -> Tensor:
        config = self.config
        return nystrom_attention(
            q,
            k,
            v,
            rectangle,
            num_landmarks=config.num_landmarks,
            iterations=config.inverse_iterations,
            init=config.inverse_init,
            conv_weight=conv_weight,
        )

    def cache(self, max_length: int) -> Ring:
        """The window and, behind it, the landmarks. With ``landmark_inverse`` or ``recall_segments`` also all tokens
        that these stand for."""
        return Ring.of_window(
            self.config,
            self._window,
            max_length,
            landmarks=True,
            history=self.config.landmark_inverse or self.config.recall_segments > 0,
            weighted=self.config.landmark_keys == "weighted",
            pyramid=self.pyramid,
            recall=self.config.recall_segments,
        )

    def flops(self, seq_len: int) -> float:
        """Bidirectional, with m landmarks and T steps of the inverse: 8 m h for the two rectangular products. The
        landmark matrix, its inverse, and the inverse times the values add (4 m^2 h + 8 T m^3 h / d) / n. Pooled,
        without the inverse: 4 m h.

        Causal, m landmarks of c tokens: 4 h for every token seen in the window and every landmark seen, on average. The
        landmarks' own work is divided by n: 6 h m c for their keys, masses and values. With the inverse come 4 h c m (m
        + 1) / 2 for B V, and h m^2 each for A and the triangular solve. In a pyramid a token sees fewer, and each
        landmark is made into a parent once, which is 6 h for each child. Of a segment that a token reads exactly it has
        the landmark's logit, 2 h, and 4 h for each of the c tokens.
        """
        if seq_len <= self.exact_up_to:
            return self.exact_flops(seq_len)
        config, h, n = self.config, self.config.hidden_size, seq_len
        if not self.causal:
            m = config.num_landmarks
            if not config.landmark_inverse:
                return 4.0 * m * h
            small = 4 * m * m * h + 8 * config.inverse_iterations * m**3 * config.num_heads
            return 8.0 * m * h + small / n
        c, w = self._window
        sizes = segment_sizes(n, c)
        seen = [(size, self.pyramid.seen(max(i - w + 1, 0))) for i, size in enumerate(sizes)]
        landmarks = sum(size * count for size, count in seen)
        recalled = sum(size * min(count, config.recall_segments) for size, count in seen)
        m = len(sizes) - w
        own = 6.0 * h * m * c + 6.0 * h * self.pyramid.branching * sum(self.pyramid.nodes(m)[1:])
        if config.landmark_inverse:
            own += 4.0 * h * c * m * (m + 1) / 2 + 2.0 * h * m * m
        own += (4.0 * c - 2.0) * h * recalled
        return (4.0 * h * (tokens_seen(self._window, n, causal=True) + landmarks) + own) / n

    @property
    def exact_up_to(self) -> int:
        """Causal: the window, and as many segments more as each token reads exactly. Masked: as long as exact attention
        is cheaper than two landmark products, below 2 m tokens; without the inverse than one, up to m tokens."""
        if self.causal:
            return (self._window.segments + self.config.recall_segments) * self._window.segment_length
        m = self.config.num_landmarks
        return 2 * m - 1 if self.config.landmark_inverse else m

    def parameters(self) -> dict[str, OwnParameter]:
        """Of causal models, as far as the configuration asks for them.

        ``landmark_query`` (H, d) is the learned offset to the landmarks' queries, which starts at 0. ``gamma_logit``
        (H,) gives the weight of the identity in the triangular inverse, which starts at ``gamma_init``.
        """
        config, found = self.config, {}
        if self.has_landmark_query:
            shape = (config.num_heads, config.head_dim)
            found["landmark_query"] = OwnParameter(shape, nn.init.zeros_, decay=False)  # a bias for each head
        if self.has_gamma and config.learn_gamma:
            share = 2 * config.gamma_init - 1
            reset = partial(nn.init.constant_, val=math.log(share / (1 - share)))
            found["gamma_logit"] = OwnParameter((config.num_heads,), reset)
        return found

    @property
    def has_gamma(self) -> bool:
        """Causal landmarks' values go through the triangular inverse."""
        return self.causal and self.config.landmark_inverse

    @property
    def has_landmark_query(self) -> bool:
        """Causal landmarks' queries have a learned offset."""
        return self.causal and self.config.learn_landmark_query

    @property
    def window(self) -> Window | None:
        return self._window if self.causal else None

    @property
    def _window(self) -> Window:
        return Window(self.config.segment_length, self.config.window_segments)

    @property
    def pyramid(self) -> Pyramid:
        """Which landmarks, and parents of landmarks, a causal model's tokens see."""
        return pyramid_of(self.config)

    def check(self) -> None:
        super().check()
        if self.causal and self.config.landmark_levels > 1 and self.config.landmark_inverse:
            raise UserError(
                f"landmark_levels {self.config.landmark_levels} and landmark_inverse exclude each other: the "
                "triangular inverse needs the landmark of every segment. Set landmark_inverse: false, or "
                "landmark_levels: 1"
            )
        if self.causal and self.config.landmark_levels > 1 and self.config.recall_segments:
            raise UserError(
                f"landmark_levels {self.config.landmark_levels} and recall_segments {self.config.recall_segments} "
                "exclude each other: tokens choose among the landmarks of single segments. Set landmark_levels: 1, or "
                "recall_segments: 0"
            )

    @property
    def pooled_to(self) -> int | None:
        return None if self.causal else self.config.num_landmarks

    @property
    def settings(self) -> tuple[str, ...]:
        if not self.causal:
            return ("landmark_inverse", "num_landmarks", "inverse_iterations", "inverse_init")
        keys = ("landmark_inverse", "segment_length", "window_segments", "landmark_keys", "landmark_levels")
        return (
            *keys,
            "landmark_band",
            "landmark_branching",
            "recall_segments",
            "learn_landmark_query",
            "gamma_init",
            "learn_gamma",
        )

    def prepare(
        self, layout: Layout, rotary: Rotary | None, device: torch.device, plan: object | None
    ) -> RotaryTable | None:
        """The mean over each segment's rotary angles, (1, S, 1, d / 2): what a constant added to every query amounts
        to. Only for a learned offset and rotary positions. In decoding: of the segments that the step completes."""
        if rotary is None or not self.has_landmark_query:
            return None
        size = self.config.segment_length
        if isinstance(plan, RingStep):
            if plan.completed is None:
                return None
            return segment_rotary_table(rotary.of(plan.completed.positions.flatten().unsqueeze(0)), size)
        segments = -(-layout.length // size)
        if segments <= self.config.window_segments and plan is None:
            return None
        table = rotary.table
        if not (layout.is_full and layout.length == segments * size):
            # Every sequence starts at position 0, so one table serves all.
            table = rotary.of(torch.arange(segments * size, device=device).unsqueeze(0))
        return segment_rotary_table(table, size)

    def given(self, own: Given, shared: RotaryTable | None, device: torch.device) -> dict[str, Tensor]:
        """``gamma`` and ``offset``, as far as there are; see :meth:`attend`."""
        found = {}
        if (gamma := self.gamma(own, device)) is not None:
            found["gamma"] = gamma
        if self.has_landmark_query and "landmark_query" in own:
            found["offset"] = _offset(own["landmark_query"], shared)
        return found

    def gamma(self, own: Given, device: torch.device) -> Tensor | None:
        """(H,) weights in (1/2, 1) of the identity in the triangular inverse; None without it."""
        if not self.has_gamma:
            return None
        if "gamma_logit" in own:
            logit = own["gamma_logit"]
            return 0.5 + 0.5 * torch.sigmoid(logit.to(at_least_float32(logit.dtype)))
        return torch.full((self.config.num_heads,), self.config.gamma_init, device=device)


def pyramid_of(config: ModelConfig) -> Pyramid:
    """Which landmarks a causal token sees, by the configuration's levels, band and branching."""
    if config.landmark_levels == 1:
        return FLAT
    return Pyramid(config.landmark_levels, config.landmark_band, config.landmark_branching)


def _offset(landmark_query: Tensor, rotary: RotaryTable | None) -> Tensor:
    """(H, d) -> (H, S, d) or (H, 1, d): what is added to the mean query of each segment.

    With rotary positions it is turned as the queries are: the mean over the segment of one vector that is added to each
    query before the rotation. What a landmark gets then depends on relative positions only.
    """
    offset = landmark_query.to(at_least_float32(landmark_query.dtype))[None, None]
    if rotary is not None:
        offset = apply_rotary(offset, rotary)
    return offset[0].transpose(0, 1)
