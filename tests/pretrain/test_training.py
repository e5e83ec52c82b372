"""The same mathematics everywhere: processes, micro-batches and ZeRO stages, against a plain PyTorch loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from plain_loop import plain_loop, train
from ranks import run_ranks, values
from training_case import metrics, settings, write_config

# float32 in another order of summation, over 8 steps of AdamW; measured: at most 1.8e-7, 3.7e-7 and 2.4e-7.
LOSS_TOLERANCE = 2e-6
NORM_TOLERANCE = 4e-6
WEIGHT_TOLERANCE = 2e-6  # absolute


def exported_weights(run: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    return load_file(run / "export" / "model.safetensors")


@pytest.fixture(scope="module")
def reference(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("reference")
    out = {}
    for objective in ("mlm", "clm"):
        config = write_config(folder / f"{objective}.yaml", settings(corpus, folder, model={"objective": objective}))
        (out[objective],) = values(run_ranks(plain_loop, 1, config=config))
    return out


def assert_same_run(run: Path, expected: dict[str, Any]) -> None:
    import numpy as np

    rows = metrics(run)
    np.testing.assert_allclose([row["loss"] for row in rows], expected["losses"], rtol=LOSS_TOLERANCE)
    np.testing.assert_allclose([row["grad_norm"] for row in rows], expected["norms"], rtol=NORM_TOLERANCE)
    for name, value in exported_weights(run).items():
        np.testing.assert_allclose(value, expected["weights"][name], atol=WEIGHT_TOLERANCE, err_msg=name)


def test_reference_uses_clipping_and_crosses_the_edge(reference: dict[str, dict[str, Any]]) -> None:
    for objective in ("mlm", "clm"):
        norms = reference[objective]["norms"]
        assert len(norms) == 8
        assert max(norms) > 0.5  # so that a wrong norm would change the weights
    losses = reference["clm"]["losses"]
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize(
    ("objective", "zero_stage", "world_size"),
    [
        ("mlm", 0, 2),
        ("mlm", 1, 1),
        ("mlm", 2, 2),
        ("clm", 3, 2),  # the whole product, over more steps, is in test_same_mathematics
    ],
)
def test_equals_a_plain_loop(
    corpus: Path, reference: dict[str, dict[str, Any]], tmp_path: Path, objective: str, zero_stage: int, world_size: int
) -> None:
    config = settings(corpus, tmp_path, model={"objective": objective}, zero_stage=zero_stage)
    ended = run_ranks(train, world_size, config=write_config(tmp_path / "run.yaml", config))
    assert values(ended) == [0] * world_size
    assert_same_run(tmp_path / "run", reference[objective])


@pytest.mark.parametrize(
    ("objective", "zero_stage", "packing"),
    [("clm", 0, "documents"), ("mlm", 3, "documents"), pytest.param("mlm", 2, "stream", marks=pytest.mark.slow)],
)
def test_packed_documents_of_a_mixture_equal_a_plain_loop(
    corpus: Path, tmp_path: Path, objective: str, zero_stage: int, packing: str
) -> None:
    """Ranks whose rows hold different numbers of documents stay in step, also where ZeRO-3 gathers weights."""
    sources = [{"path": str(corpus / "train"), "weight": 2}, {"path": str(corpus / "valid"), "weight": 1}]
    first, second = settings(corpus, tmp_path)["curriculum"]
    config = settings(
        corpus,
        tmp_path,
        model={"objective": objective},
        zero_stage=zero_stage,
        data={"train": sources, "valid": str(corpus / "valid"), "packing": packing, "max_padding": 0.1},
        curriculum=[first, {**second, "weights": {"train": 1, "valid": 3}}],
        document_loss=0.5,
    )
    path = write_config(tmp_path / "run.yaml", config)
    (expected,) = values(run_ranks(plain_loop, 1, config=path))
    ended = run_ranks(train, 2, config=path)
    assert values(ended) == [0, 0]
    assert_same_run(tmp_path / "run", expected)
    last = metrics(tmp_path / "run")[-1]
    assert last["document_loss"] == pytest.approx(expected["document_losses"][-1], rel=2e-6)
    held_out = metrics(tmp_path / "run", "valid")[-1]  # the text that most of the last rows are of
    assert held_out["document_loss"] == pytest.approx(last["document_loss"], rel=0.1)
    assert last["epoch/valid"] > last["epoch/train"] > 0  # the smaller one, and more often
    assert "2 sources in 8 steps of 256" in ended[0].output
    assert ("whole documents" in ended[0].output) == (packing == "documents")


@pytest.mark.parametrize("micro_batch", [1, 8])
def test_micro_batches_do_not_matter(
    corpus: Path, reference: dict[str, dict[str, Any]], tmp_path: Path, micro_batch: int
) -> None:
    stages = [{**stage, "micro_batch": micro_batch} for stage in settings(corpus, tmp_path)["curriculum"]]
    config = settings(corpus, tmp_path, zero_stage=2, curriculum=stages)
    assert values(run_ranks(train, 2, config=write_config(tmp_path / "run.yaml", config))) == [0, 0]
    assert_same_run(tmp_path / "run", reference["mlm"])


def train_with_a_bad_step(config: str, step: int, kind: str, rank: int = 1, last: int | None = None) -> int:
    """Runs in the ranks: as :func:`train`, but on one rank loss or gradient goes wrong at a step (to ``last``)."""
    import math
    import os

    from pretrain.engine.training import TrainingEngine

    counter = {"step": 1, "first": True}
    backward, take_step = TrainingEngine.backward, TrainingEngine.step

    def bad_backward(self: Any, input_ids: Any, labels: Any, scale: float, *more: Any) -> Any:
        here = step <= counter["step"] <= (last or step) and os.environ["RANK"] == str(rank) and counter["first"]
        counter["first"] = False
        if not here:
            return backward(self, input_ids, labels, scale, *more)
        if kind == "gradient":
            return backward(self, input_ids, labels, math.inf, *more)
        embedding = self.model.embeddings
        handle = embedding.register_forward_hook(lambda module, inputs, output: output * math.nan)
        try:
            return backward(self, input_ids, labels, scale, *more)
        finally:
            handle.remove()

    def counting_step(self: Any, lr: float) -> Any:
        result = take_step(self, lr)
        counter["step"] += 1
        counter["first"] = True
        return result

    TrainingEngine.backward, TrainingEngine.step = bad_backward, counting_step  # type: ignore[method-assign]
    return train(config)


@pytest.mark.parametrize(
    ("zero_stage", "kind"),
    [
        (0, "gradient"),
        (2, "loss"),
        (3, "gradient"),
        *(pytest.param(stage, "loss", marks=pytest.mark.slow) for stage in (0, 1, 3)),
        *(pytest.param(stage, "gradient", marks=pytest.mark.slow) for stage in (1, 2)),
    ],
)
def test_a_bad_step_is_skipped_on_all_processes_and_leaves_no_trace(
    corpus: Path, tmp_path: Path, zero_stage: int, kind: str
) -> None:
    import numpy as np

    config = write_config(tmp_path / "run.yaml", settings(corpus, tmp_path, zero_stage=zero_stage))
    (expected,) = values(run_ranks(plain_loop, 1, config=config, skip=[3]))
    assert values(run_ranks(train_with_a_bad_step, 2, config=config, step=3, kind=kind)) == [0, 0]
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 4, 5, 6, 7, 8]
    np.testing.assert_allclose([row["loss"] for row in rows], np.delete(expected["losses"], 2), rtol=LOSS_TOLERANCE)
    (event,) = [row for row in metrics(tmp_path / "run", "event") if row["event"] == "bad_step"]
    assert event["step"] == 3
    assert event["what"] == kind
    # Rank 1 holds the second half of the batch's 8 rows; for a bad gradient every row is suspect. Batch 3 is the first
    # of the second window: its rows begin 8 blocks of 64 tokens into the order.
    everyone = [(8 + row) * 64 for row in range(8)]
    assert event["samples"] == (everyone[4:] if kind == "loss" else everyone)


def test_a_step_without_a_target_has_no_loss(corpus: Path, tmp_path: Path) -> None:
    """It was logged as a loss of 0 and a perplexity of 1."""
    data = {"masking": {"rate": 0.002}, "valid": str(corpus / "valid")}
    changes = {"data": data, "validation": {"tokens": 64, "samples": 0}, "telemetry": {"log_every_steps": 2}}
    ended = run_ranks(train, 2, config=write_config(tmp_path / "run.yaml", settings(corpus, tmp_path, **changes)))
    assert values(ended) == [0, 0]
    rows = metrics(tmp_path / "run")
    without = [row["step"] for row in metrics(tmp_path / "run", "event") if row["event"] == "no_targets"]
    assert 0 < len(without) < 8
    for row in rows:
        assert (row["loss"] is None) == (row["perplexity"] is None) == (row["step"] in without), row
        assert row["loss"] is None or row["loss"] > 1
    assert any(step % 2 for step in without)  # also where no line is written
    for step in without:
        assert f"step {step}: no token of its batch is a target" in ended[0].output
    for row in metrics(tmp_path / "run", "valid"):
        assert (row["loss"] is None) == (row["targets"] == 0)


def test_too_many_bad_steps_stop_the_run(corpus: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", settings(corpus, tmp_path, zero_stage=2, max_bad_steps=2))
    ended = run_ranks(train_with_a_bad_step, 2, config=config, step=3, kind="loss", last=8)
    assert values(ended) == [76, 76]
    assert "Samples: 768, 832, 896, 960" in ended[0].output
    assert [row["step"] for row in metrics(tmp_path / "run", "event") if row["event"] == "bad_step"] == [3, 4]
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    "zero_stage", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
)
def test_bf16_stays_near_float32(
    corpus: Path, reference: dict[str, dict[str, Any]], tmp_path: Path, zero_stage: int
) -> None:
    import numpy as np

    config = settings(corpus, tmp_path, zero_stage=zero_stage, precision="bf16")
    assert values(run_ranks(train, 2, config=write_config(tmp_path / "run.yaml", config))) == [0, 0]
    losses = [row["loss"] for row in metrics(tmp_path / "run")]
    np.testing.assert_allclose(losses, reference["mlm"]["losses"], rtol=0.01)
