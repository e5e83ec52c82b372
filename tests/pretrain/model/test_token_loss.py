"""The loss of tokens in chunks, whose gradients are taken in the forward pass, against PyTorch's own cross entropy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pretrain.model import token_loss
from pretrain.model.config import ModelConfig
from pretrain.model.token_loss import Decoder
from pretrain.model.transformer import build_model

ROWS, WIDTH, WORDS = 50, 8, 30


def inputs(dtype: torch.dtype = torch.float64, *, bias: bool = True) -> tuple[Decoder, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    decoder = Decoder(WIDTH, WORDS, bias=bias).to(dtype)
    states = torch.randn(ROWS, WIDTH, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, WORDS, (ROWS,))
    targets[::7] = -100
    return decoder, states, targets


def reference(decoder: Decoder, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = F.linear(states, decoder.weight, decoder.bias)
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 7, ROWS, 1000])
def test_loss_and_gradients_are_those_of_cross_entropy(rows: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_loss, "CHUNK_ELEMENTS", rows * WORDS)
    decoder, states, targets = inputs(bias=bias)
    leaves = [states, *decoder.parameters()]
    for factor in (1.0, 0.25):
        expected, got = (factor * loss(decoder, states, targets) for loss in (reference, Decoder.__call__))
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
        pairs = (torch.autograd.grad(loss, leaves) for loss in (got, expected))
        for a, b in zip(*pairs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_gradients_that_nobody_wants_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, states, targets = inputs()
    expected = reference(decoder, states, targets)
    with torch.no_grad():
        monkeypatch.setattr(torch, "zeros_like", None)  # what would begin the weight's gradient
        torch.testing.assert_close(decoder(states, targets), expected)


def test_rows_without_targets_count_for_nothing() -> None:
    decoder, states, targets = inputs()
    for some in (torch.full_like(targets, -100), targets[:0]):
        loss = decoder(states[: len(some)], some)
        assert float(loss.detach()) == 0
        for gradient in torch.autograd.grad(loss, [states, *decoder.parameters()]):
            assert (gradient == 0).all()


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_a_model_whose_output_layer_was_replaced_has_the_same_loss(objective: str) -> None:
    sizes = {"vocab_size": WORDS, "hidden_size": 16, "num_layers": 1, "num_heads": 2}
    model = build_model(ModelConfig.model_validate({"objective": objective, **sizes})).double()
    ids = torch.randint(0, WORDS, (2, 20))
    expected = torch.autograd.grad(model(ids, labels=ids).loss_sum, model.embeddings.word_embeddings.weight)
    other = torch.nn.Linear(16, WORDS, bias=objective == "mlm").double()
    other.load_state_dict(model.head.decoder.state_dict())
    other.weight, model.head.decoder = model.head.decoder.weight, other
    got = torch.autograd.grad(model(ids, labels=ids).loss_sum, model.embeddings.word_embeddings.weight)
    torch.testing.assert_close(got, expected)


def test_a_second_backward_pass_is_refused() -> None:
    decoder, states, targets = inputs()
    loss = decoder(states, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("cast", ["weights", "autocast"])
def test_in_bfloat16_it_is_as_close_to_float64_as_cross_entropy_is(cast: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over tokens and chunks are float32. Products have bfloat16's 8 bits, in both."""
    monkeypatch.setattr(token_loss, "CHUNK_ELEMENTS", 5 * WORDS)
    exact, wide, targets = inputs()
    true = torch.autograd.grad(reference(exact, wide, targets), [wide, *exact.parameters()])
    dtype = torch.bfloat16 if cast == "weights" else torch.float32
    decoder, states, _ = inputs(dtype)
    decoder.load_state_dict(exact.state_dict())
    states = wide.detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast == "autocast"):
        loss = decoder(states, targets)
    assert loss.dtype == torch.float32
    got = torch.autograd.grad(loss, [states, *decoder.parameters()])
    for a, b in zip(got, true, strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).norm() / b.norm() < 0.01
