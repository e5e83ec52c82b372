"""The loss that training validates by is that of the held-out documents as its rows hold them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from training_case import settings

from data_pipeline.shards.shardset import ShardSet
from pretrain.config import RunConfig
from pretrain.model import ModelConfig, build_model
from pretrain.model.document_loss import MIN_TOKENS
from pretrain.validation import validate


class Engine:
    """The model alone, as the engine lets it be evaluated."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def evaluate(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **options: Any) -> Any:
        with torch.no_grad():
            return self.model(input_ids, labels=labels, **options)


def validated(
    corpus: Path, objective: str, packing: str, seq_len: int, **run: Any
) -> tuple[dict[str, Any], Any, ShardSet]:
    shards = ShardSet.open(corpus / "valid")
    data = {"train": str(corpus / "train"), "packing": packing}
    whole = {"tokens": 10**9}
    changes = {"data": data, "model": {"objective": objective, "init_std": 0.3}, "validation": whole, **run}
    config = RunConfig.model_validate(settings(corpus, corpus, **changes))
    torch.manual_seed(0)
    model = build_model(ModelConfig.model_validate(config.model.model_dump() | {"vocab_size": shards.vocab_size}))
    model = model.double().eval()
    model.document_loss = config.document_loss > 0  # as the engine does
    world: Any = SimpleNamespace(rank=0, world_size=1, device=torch.device("cpu"), sum=lambda values: values)
    engine: Any = Engine(model)
    found = validate(engine, shards, config, world, seq_len=seq_len, micro_batch=3, stop=lambda: False)
    assert found is not None
    return found, model, shards


def document_loss(model: Any, inputs: torch.Tensor, text: torch.Tensor, targets: int) -> float:
    """Of one document, (N,) tokens as the model reads them and as they are, times the number of its targets."""
    if len(text) < MIN_TOKENS:
        return 0.0
    with torch.no_grad():
        mean = model(inputs[None], hidden=True).hidden[0].mean(0)
        log_p = model.head.decoder(mean).log_softmax(-1)
    return -targets * float(log_p[text.unique()].mean())


def test_packed_causal_validation_equals_a_loop_over_documents(corpus: Path) -> None:
    found, model, shards = validated(corpus, "clm", "documents", 512, document_loss=2.5)
    nats, number, about = 0.0, 0, 0.0
    for document in shards.documents():
        assert len(document) < 512
        ids = torch.tensor([[*document.tolist(), shards.eos_id]])
        with torch.no_grad():
            log_p = model(ids[:, :-1]).logits[0].log_softmax(-1)
        nats -= float(log_p.gather(1, ids[0, 1:, None]).sum())
        number += ids.shape[1] - 1
        about += document_loss(model, ids[0], ids[0], ids.shape[1] - 1)
    assert found["targets"] == number
    assert found["loss"] == pytest.approx(nats / number, rel=1e-9)
    assert found["document_loss"] == pytest.approx(2.5 * about / number, rel=1e-9)


def test_packed_masked_validation_reads_documents_apart(corpus: Path) -> None:
    """Each document of the rows by itself, with the noise that its row has."""
    from data_pipeline.batches.loader import validation_batches

    found, model, shards = validated(corpus, "mlm", "documents", 64, document_loss=0.5)
    config = RunConfig.model_validate(settings(corpus, corpus))
    nats, number, about = 0.0, 0, 0.0
    for batch in validation_batches(
        shards, objective="mlm", seq_len=64, rows=1, max_tokens=10**9, seed=config.seed,
        masking=config.data.masking.build(), documents_apart=True,
    ):  # fmt: skip
        assert batch.document_ids is not None
        for document in range(int(batch.document_ids.max()) + 1):
            mine = batch.document_ids == document
            labels, inputs = batch.labels[mine], batch.input_ids[mine]
            with torch.no_grad():
                log_p = model(inputs[None]).logits[0].log_softmax(-1)
            chosen = labels != -100
            nats -= float(log_p[chosen].gather(1, labels[chosen, None]).sum())
            number += int(chosen.sum())
            about += document_loss(model, inputs, torch.where(chosen, labels, inputs), int(chosen.sum()))
    assert found["targets"] == number > 50
    assert found["loss"] == pytest.approx(nats / number, rel=1e-6)
    assert found["document_loss"] == pytest.approx(0.5 * about / number, rel=1e-6)


def test_validation_of_a_stream_reads_the_stream(corpus: Path) -> None:
    found, model, shards = validated(corpus, "clm", "stream", 64)
    rows = (shards.num_tokens - 1) // 64
    stream = [token for document in shards.documents() for token in [*document.tolist(), shards.eos_id]]
    ids = torch.tensor(stream[: rows * 64]).view(rows, 64)
    goals = torch.tensor(stream[1 : rows * 64 + 1])
    with torch.no_grad():
        log_p = model(ids).logits.flatten(0, 1).log_softmax(-1)
    assert found["targets"] == rows * 64
    assert found["loss"] == pytest.approx(float(-log_p.gather(1, goals[:, None]).mean()), rel=1e-9)
    assert "document_loss" not in found
