"""The published encoder: same weights, same outputs as transformers' ``NystromformerForMaskedLM``."""

from __future__ import annotations

import pytest
import torch

from pretrain.convert.stock import from_stock
from pretrain.convert.tensor_names import DECODER, WORDS
from pretrain.model import ModelConfig, build_model

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize(("n", "m"), [(64, 8), (128, 16), (96, 32), (320, 64), (16, 16)])
@pytest.mark.parametrize("rows", [1, 3])
def test_logits_and_gradients_equal(n: int, m: int, rows: int) -> None:
    torch.manual_seed(0)
    theirs = transformers.NystromformerForMaskedLM(
        transformers.NystromformerConfig(
            vocab_size=50,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=400,
            segment_means_seq_len=n,
            num_landmarks=m,
            conv_kernel_size=9,
            initializer_range=0.2,
        )
    ).eval()
    ours = build_model(
        ModelConfig(
            vocab_size=50,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            intermediate_size=64,
            norm="post",
            positions="learned",
            max_positions=400,
            num_landmarks=m,
            conv_kernel=9,
            inverse_init="original",
        )
    ).eval()
    weights = from_stock(theirs.state_dict(), ours.config, "theirs").weights
    ours.load_state_dict({**weights, DECODER: weights[WORDS]})
    ids = torch.randint(0, 50, (rows, n))

    expected = theirs(input_ids=ids).logits
    got = ours(ids).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))

    labels = torch.where(torch.rand(rows, n) < 0.3, ids, -100)
    theirs(input_ids=ids, labels=labels).loss.backward()
    out = ours(ids, labels=labels)
    (out.loss_sum / out.num_targets).backward()
    for name in ("query", "value"):
        a = getattr(ours.layers[0].attention, name).weight.grad
        b = getattr(theirs.nystromformer.encoder.layer[0].attention.self, name).weight.grad
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * float(b.abs().max()))
