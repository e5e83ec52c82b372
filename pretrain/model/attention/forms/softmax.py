"""``attention: softmax``: exact attention, the baseline of every comparison."""

from __future__ import annotations

from torch import Tensor

from pretrain.model.attention.form import Form, Given, OwnParameter
from pretrain.model.attention.layout import Rectangle
from pretrain.model.attention.registry import FORMS
from pretrain.model.attention.ring import Ring
from pretrain.model.attention.softmax import softmax_attention


@FORMS.register
class Softmax(Form):
    """Every token sees every other one (clm: every earlier one), exactly (Vaswani et al. 2017, equation 1)."""

    name = "softmax"
    far = "exact"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rectangle: Rectangle, given: Given) -> Tensor:
        return softmax_attention(q, k, v, rectangle, causal=self.causal)

    def cache(self, max_length: int) -> Ring:
        return Ring.of_everything(self.config, max_length)

    def flops(self, seq_len: int) -> float:
        return self.exact_flops(seq_len)

    @property
    def exact_up_to(self) -> None:
        return None

    def parameters(self) -> dict[str, OwnParameter]:
        return {}
