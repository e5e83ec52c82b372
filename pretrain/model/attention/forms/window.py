"""``attention: window``: near tokens only, the ablation that shows what landmarks see beyond them."""

from __future__ import annotations

from torch import Tensor

from pretrain.model.attention.blockwise import Window
from pretrain.model.attention.causal_nystrom import causal_window_attention
from pretrain.model.attention.form import Form, Given, OwnParameter
from pretrain.model.attention.layout import Rectangle
from pretrain.model.attention.registry import FORMS
from pretrain.model.attention.ring import Ring
from pretrain.model.attention.softmax import window_attention


@FORMS.register
class WindowAlone(Form):
    """A token sees its own segment of c tokens and the w - 1 before it, up to itself; mlm: w - 1 on both sides."""

    name = "window"
    far = "unseen"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rectangle: Rectangle, given: Given) -> Tensor:
        if self.causal:
            return causal_window_attention(q, k, v, self.window)
        return window_attention(q, k, v, rectangle, self.window)

    def cache(self, max_length: int) -> Ring:
        return Ring.of_window(self.config, self.window, max_length)

    def flops(self, seq_len: int) -> float:
        """4 h for every token seen, on average."""
        return 4.0 * self.config.hidden_size * tokens_seen(self.window, seq_len, causal=self.causal) / seq_len

    @property
    def exact_up_to(self) -> int:
        return self.window.segments * self.window.segment_length

    def parameters(self) -> dict[str, OwnParameter]:
        return {}

    @property
    def window(self) -> Window:
        return Window(self.config.segment_length, self.config.window_segments)

    @property
    def settings(self) -> tuple[str, ...]:
        return ("segment_length", "window_segments")


def tokens_seen(window: Window, length: int, *, causal: bool) -> float:
    """How many tokens of their window the tokens of a sequence see, all together."""
    c, w = window
    sizes = segment_sizes(length, c)
    if causal:
        return sum(size * (min(i, w - 1) * c + (size + 1) / 2) for i, size in enumerate(sizes))
    return sum(size * sum(sizes[max(i - w + 1, 0) : i + w]) for i, size in enumerate(sizes))


def segment_sizes(length: int, segment_length: int) -> list[int]:
    """Tokens of each segment; the last one may be short."""
    return [min(segment_length, length - first) for first in range(0, length, segment_length)]
