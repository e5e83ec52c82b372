"""The document objective against its formula, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pretrain.model import Layout, ModelConfig, build_model, transformer
from pretrain.model.document_loss import MIN_TOKENS
from pretrain.planning.trace import trace_micro_batch

VOCABULARY, MASK = 29, 4
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "init_std": 0.3}
LENGTH = 24
PACKED = [[0] * 10 + [1] * 14, [2] * 9 + [3] * (MIN_TOKENS - 1) + [-1] * 8]  # one is too short, then padding


def model_of(objective: str) -> Any:
    torch.manual_seed(0)
    model = build_model(ModelConfig.model_validate({"objective": objective, **SMALL})).double().train()
    model.document_loss = True
    return model


def batch_of(objective: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Text, inputs and labels."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(5, VOCABULARY, (2, LENGTH), generator=generator)
    if objective == "clm":
        return text, text, text.roll(-1, dims=1)
    chosen = torch.rand(2, LENGTH, generator=generator) < 0.4
    return text, torch.where(chosen, MASK, text), torch.where(chosen, text, -100)


@pytest.mark.parametrize("limit", [None, VOCABULARY * 2], ids=["whole", "in chunks"])
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_it_is_the_cross_entropy_of_a_documents_distinct_tokens(
    objective: str, packed: bool, limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if limit is not None:
        monkeypatch.setattr(transformer, "LOSS_CHUNK_ELEMENTS", limit)
    model = model_of(objective)
    text, inputs, labels = batch_of(objective)
    layout = Layout.from_documents(torch.tensor(PACKED)) if packed else Layout.full(2, LENGTH)
    spans = [(0, 0, 10), (0, 10, 24), (1, 0, 9)] if packed else [(0, 0, 24), (1, 0, 24)]
    states, expected = model(inputs, layout=layout, hidden=True).hidden, torch.zeros((), dtype=torch.float64)
    for row, start, end in spans:
        logits = model.head.decoder(states[row, start:end].mean(0, keepdim=True))[0].log_softmax(-1)
        distinct = sorted(set(text[row, start:end].tolist()))
        targets = int((labels[row, start:end] != -100).sum())
        expected = expected - targets * logits[distinct].mean()
    out = model(inputs, labels=labels, layout=layout)
    torch.testing.assert_close(out.document_sum, expected)
    parameters = list(model.parameters())
    for got, wanted in zip(
        torch.autograd.grad(out.document_sum, parameters, allow_unused=True),
        torch.autograd.grad(expected, parameters, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted)


def test_it_leaves_the_loss_alone_and_evaluation_has_none() -> None:
    model = model_of("mlm")
    _, inputs, labels = batch_of("mlm")
    with_it = model(inputs, labels=labels)
    assert model.eval()(inputs, labels=labels).document_sum is None
    model.train().document_loss = False
    without = model(inputs, labels=labels)
    assert without.document_sum is None
    torch.testing.assert_close(with_it.loss_sum, without.loss_sum, rtol=0, atol=0)


@pytest.mark.parametrize("length", [MIN_TOKENS - 1, LENGTH], ids=["no document", "no target"])
def test_a_batch_without_it_reaches_every_parameter(length: int) -> None:
    model, ids = model_of("mlm"), torch.ones(1, length, dtype=torch.int64)
    out = model(ids, labels=torch.full_like(ids, -100))
    assert float(out.document_sum.detach()) == 0
    (out.loss_sum + out.document_sum).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_the_plan_counts_its_memory() -> None:
    config = ModelConfig.model_validate(SMALL | {"vocab_size": 5000})
    options: dict[str, Any] = {"targets": 64, "dtype": torch.float32, "on_gpu": True}
    without, with_it = (
        trace_micro_batch(config, Layout.full(8, 32), **options, document_loss=asked) for asked in (False, True)
    )
    logits = 8 * 5000 * 4
    assert logits <= with_it.kept["head and loss"] - without.kept["head and loss"] <= 3 * logits
