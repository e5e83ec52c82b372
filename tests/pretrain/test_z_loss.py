"""z-loss: part of the gradient, counted apart from the cross entropy. The run here has the document objective, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain_loop import plain_loop, train
from ranks import run_ranks, values
from training_case import metrics, settings, write_config

from pretrain.model import Layout, ModelConfig, build_model, transformer
from pretrain.planning.trace import trace_micro_batch

SMALL = {"vocab_size": 29, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "init_std": 0.3}


def model_of(objective: str) -> Any:
    torch.manual_seed(0)
    model = build_model(ModelConfig.model_validate({"objective": objective, **SMALL})).double().train()
    model.z_loss = True
    return model


@pytest.mark.parametrize("limit", [None, 29 * 16])
@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_it_is_the_squared_log_partition_of_the_targets(
    objective: str, limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if limit is not None:
        monkeypatch.setattr(transformer, "LOSS_CHUNK_ELEMENTS", limit)  # in chunks of 16 positions at most
    model, generator = model_of(objective), torch.Generator().manual_seed(1)
    ids = torch.randint(0, 29, (2, 20), generator=generator)
    labels = torch.where(torch.rand(2, 20, generator=generator) < 0.4, ids, -100)
    out, known = model(ids, labels=labels), labels != -100
    logits = model(ids).logits[known]
    partition = logits.exp().sum(-1).log()
    torch.testing.assert_close(out.z_sum, (partition**2).sum())
    torch.testing.assert_close(out.loss_sum, (partition - logits.gather(1, labels[known][:, None])[:, 0]).sum())
    parameters = list(model.parameters())
    for got, expected in zip(
        torch.autograd.grad(out.loss_sum + 0.1 * out.z_sum, parameters),
        torch.autograd.grad(
            (partition - logits.gather(1, labels[known][:, None])[:, 0] + 0.1 * partition**2).sum(), parameters
        ),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)


def test_evaluation_has_none_and_a_batch_without_targets_reaches_every_parameter() -> None:
    model, ids = model_of("mlm"), torch.ones(1, 9, dtype=torch.int64)
    assert model.eval()(ids, labels=ids).z_sum is None
    out = model.train()(ids, labels=torch.full_like(ids, -100))
    assert (float(out.loss_sum.detach()), float(out.z_sum.detach())) == (0, 0)
    (out.loss_sum + out.z_sum).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_plan_counts_its_memory() -> None:
    config = ModelConfig.model_validate(SMALL | {"vocab_size": 5000})
    options: dict[str, Any] = {"targets": 64, "dtype": torch.float32, "on_gpu": True}
    without, with_it = (trace_micro_batch(config, Layout.full(2, 32), **options, z_loss=z) for z in (False, True))
    kept, targets, width, vocabulary = (t.kept["head and loss"] for t in (without, with_it)), 64, 16, 5000
    of_either = [4 * vocabulary * (width + 1), 4 * vocabulary * targets]  # gradients of weight and bias; a softmax
    for bytes_, expected in zip(kept, of_either, strict=True):
        assert expected < bytes_ < 1.1 * expected
    assert with_it.peak > without.peak


def test_a_run_trains_with_what_it_adds_and_reports_the_cross_entropy(corpus: Path, tmp_path: Path) -> None:
    valid = {"train": str(corpus / "train"), "valid": str(corpus / "valid")}
    added = {"z_loss": 0.01, "document_loss": 0.5}
    run = settings(corpus, tmp_path, zero_stage=2, data=valid, validation={"tokens": 1024, "samples": 0}, **added)
    path = write_config(tmp_path / "c.yaml", run)
    (expected,) = values(run_ranks(plain_loop, 1, config=path))
    values(run_ranks(train, 2, config=path))
    rows = metrics(tmp_path / "run")
    np.testing.assert_allclose([row["loss"] for row in rows], expected["losses"], rtol=2e-6)  # as test_training.py's
    np.testing.assert_allclose([row["grad_norm"] for row in rows], expected["norms"], rtol=4e-6)
    np.testing.assert_allclose([row["z_loss"] for row in rows], expected["z_losses"], rtol=2e-6)
    np.testing.assert_allclose([row["document_loss"] for row in rows], expected["document_losses"], rtol=2e-6)
    assert min(rows[-1]["z_loss"], rows[-1]["document_loss"]) > 0.01 * rows[-1]["loss"]  # it is no rounding
    assert metrics(tmp_path / "run", "valid")[-1]["loss"] == pytest.approx(_loss_of_export(tmp_path / "run"), rel=1e-5)


def _loss_of_export(run: Path) -> float:
    """The plain cross entropy of the held-out text."""
    from data_pipeline.batches.loader import validation_batches
    from data_pipeline.shards.shardset import ShardSet
    from pretrain.checkpoint.load import load_model

    loaded = load_model(run / "export")
    config = loaded.run_config
    total, targets = 0.0, 0
    assert config.data.valid is not None
    for batch in validation_batches(
        ShardSet.open(config.data.valid), objective="mlm", seq_len=config.curriculum[-1].seq_len, rows=4,
        max_tokens=1024, seed=config.seed, masking=config.data.masking.build(), documents_apart=False,
    ):  # fmt: skip
        with torch.no_grad():
            out = loaded.model(batch.input_ids, labels=batch.labels)
        total, targets = total + float(out.loss_sum), targets + int(out.num_targets)
    return total / targets
