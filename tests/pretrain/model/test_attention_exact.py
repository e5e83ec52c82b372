"""Exact softmax attention on any layout, against scaled_dot_product_attention with explicit masks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pretrain.model import Layout
from pretrain.model.attention.softmax import softmax_attention

DOCUMENTS = torch.tensor([[0] * 40 + [1] * 23 + [2] * 64 + [-1] * 3, [-1] * 5 + [0] * 1 + [1] * 124])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "layout",
    [
        Layout.full(2, 130),
        Layout.from_lengths([77, 130], 130),
        Layout.from_lengths([9, 130], 130),
        Layout.from_documents(DOCUMENTS),
    ],
    ids=["full", "padded", "padded-much", "documents"],
)
def test_equals_one_masked_call(layout: Layout, causal: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 130, 3, 8, dtype=torch.float64) for _ in range(3))
    owner = torch.full((2 * 130,), -1)
    starts, lengths = ([0, 130], [130, 130]) if layout.starts is None else (layout.starts, layout.lengths)
    for number, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        owner[start : start + length] = number
    owner = owner.view(2, 130)
    mask = (owner[:, :, None] == owner[:, None, :]).unsqueeze(1)
    if causal:
        mask = mask & torch.ones(130, 130, dtype=torch.bool).tril()
    expected = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask).transpose(
        1, 2
    )

    partition = layout.partition(torch.device("cpu"), causal=causal)
    outputs = [softmax_attention(r.take(q), r.take(k), r.take(v), r, causal=causal) for r in partition.rectangles]
    got = partition.merge(outputs, v)
    torch.testing.assert_close(got[owner >= 0], expected[owner >= 0], rtol=0, atol=1e-12)
