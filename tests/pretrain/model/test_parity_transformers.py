"""The published encoder: same weights, same outputs as transformers' ``NystromformerForMaskedLM``."""

from __future__ import annotations

import pytest
import torch

from pretrain.model import ModelConfig, build_model

transformers = pytest.importorskip("transformers")

LAYER = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "output": "attention.output.dense",
}


def renamed(theirs: dict[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    """Their names to ours. Their single token type is a constant on every token, so it goes into the positions."""
    ours: dict[str, torch.Tensor] = {}

    def both(to: str, of: str) -> None:
        for part in ("weight", "bias"):
            ours[f"{to}.{part}"] = theirs[f"{of}.{part}"]

    base = "nystromformer.embeddings."
    ours["embeddings.word_embeddings.weight"] = ours["head.decoder.weight"] = theirs[base + "word_embeddings.weight"]
    ours["embeddings.position_embeddings.weight"] = (
        theirs[base + "position_embeddings.weight"] + theirs[base + "token_type_embeddings.weight"][0]
    )
    both("embeddings.norm", base + "LayerNorm")
    for i in range(layers):
        of, to = f"nystromformer.encoder.layer.{i}.", f"layers.{i}."
        for name, source in LAYER.items():
            both(f"{to}attention.{name}", of + source)
        ours[to + "attention.conv_weight"] = theirs[of + "attention.self.conv.weight"]
        both(to + "attention_norm", of + "attention.output.LayerNorm")
        both(to + "feed_forward.intermediate", of + "intermediate.dense")
        both(to + "feed_forward.output", of + "output.dense")
        both(to + "feed_forward_norm", of + "output.LayerNorm")
    both("head.dense", "cls.predictions.transform.dense")
    both("head.norm", "cls.predictions.transform.LayerNorm")
    ours["head.decoder.bias"] = theirs["cls.predictions.bias"]
    return ours


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
    ours.load_state_dict(renamed(theirs.state_dict(), 2))
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
