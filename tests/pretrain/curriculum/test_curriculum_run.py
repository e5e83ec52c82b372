"""A run whose stages change everything they can: against a plain loop, through interruptions at every edge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks, values
from training_case import events, metrics, numbers, settings, weights_hash, write_config

from data_pipeline.errors import run_cli

STAGES: list[dict[str, Any]] = [
    {"until_tokens": 512, "seq_len": 16, "micro_batch": 3, "batch_tokens": 128, "masking_rate": 0.3},
    {"until_tokens": 1536, "seq_len": 32, "micro_batch": 2, "masking_rate": 0.2},
    {"until_tokens": 3072, "seq_len": 64, "micro_batch": 4, "batch_tokens": 512},
]
"""4 steps of 8 rows, 4 of 8, 3 of 8; the first steps of the later stages are 5 and 9."""

MODELS: dict[str, dict[str, Any]] = {
    "learned": {"objective": "mlm", "positions": "learned", "max_positions": 48},
    "learned causal": {"objective": "clm", "positions": "learned", "max_positions": 64},
    "ntk": {"objective": "clm", "rope_scaling": "ntk"},
    "linear": {"objective": "mlm", "rope_scaling": "linear"},
    "own base": {"objective": "clm", "rope_theta": 100.0},
}


def case(corpus: Path, runs: Path, kind: str, **changes: Any) -> dict[str, Any]:
    stages = [dict(stage) for stage in STAGES]
    chosen = MODELS[kind] | changes.pop("model", {})
    if chosen["objective"] == "clm":
        for stage in stages:
            stage.pop("masking_rate", None)
    if kind == "own base":
        stages[1]["rope_theta"], stages[2]["rope_theta"] = 1000.0, 20.0
    return settings(corpus, runs, model=chosen, curriculum=stages, **changes)


def train(config: str, stop_after: int | None = None) -> int:
    """Runs in the ranks: the command itself; the last rank is asked to stop in a step."""
    import os
    import signal

    from pretrain.cli import main
    from pretrain.engine.training import TrainingEngine

    count, take_step = [0], TrainingEngine.step

    def counting_step(self: Any, lr: float) -> Any:
        count[0] += 1
        if count[0] == stop_after and os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(self, lr)

    TrainingEngine.step = counting_step  # type: ignore[method-assign]
    return run_cli(main, "nystrom train", ["--config", config])


def plain_loop(config: str) -> dict[str, Any]:
    """Runs in a rank: one process, whole batches, no DeepSpeed; the table of positions really grows at the edges."""
    import dataclasses

    import torch

    from data_pipeline.batches.loader import TrainLoader
    from pretrain.config import load_config
    from pretrain.curriculum.plan import build_plan
    from pretrain.model import build_model
    from pretrain.optim.schedule import learning_rate
    from pretrain.sources import open_sources

    run = load_config(config)
    plan = build_plan(run)
    data = open_sources(run, plan)
    torch.manual_seed(run.seed)
    base = run.model.model_copy(update={"vocab_size": data.shards.vocab_size, "max_positions": 64})
    model = build_model(base)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": run.optimizer.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=run.optimizer.betas, eps=run.optimizer.eps)
    masking = run.data.masking.build()
    rates = [stage.masking_rate or masking.rate for stage in run.curriculum]
    loader = TrainLoader(
        data,
        plan,
        objective=run.model.objective,
        seed=run.seed,
        masking=[dataclasses.replace(masking, rate=rate) for rate in rates],
    )
    losses, norms, stage = [], [], 0
    for batch in loader:
        if batch.stage != stage:
            stage = batch.stage
            length, first = run.curriculum[stage].seq_len, run.curriculum[0].seq_len
            half = length // 2  # what the stage before had
            table = model.embeddings.position_embeddings
            if table is not None:
                state = optimizer.state[table.weight]
                for rows in (table.weight.data, state["exp_avg"], state["exp_avg_sq"]):
                    rows[2 + half : 2 + length] = rows[2 : 2 + half].clone()
            theta = run.curriculum[stage].rope_theta or run.model.rope_theta
            if run.model.rope_scaling == "ntk":
                theta *= (length / first) ** (8 / 6)
            scale = first / length if run.model.rope_scaling == "linear" else 1.0
            model.config = base.model_copy(update={"rope_theta": theta, "rope_position_scale": scale})
        tokens = batch.tokens_before + batch.tokens
        lr = learning_rate(tokens, total_tokens=plan.total_tokens, peak=run.optimizer.lr, schedule=run.schedule)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        out = model(batch.input_ids, labels=batch.labels)
        loss = out.loss_sum / out.num_targets
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), run.optimizer.grad_clip)))
        losses.append(float(loss))
        optimizer.step()
    return {"losses": losses, "norms": norms, "weights": {k: v.numpy() for k, v in model.state_dict().items()}}


@pytest.mark.parametrize(
    ("model", "zero_stage"),
    [
        ("learned", 0),
        ("learned", 3),
        ("ntk", 2),
        *(pytest.param("learned", stage, marks=pytest.mark.slow) for stage in (1, 2)),
        *(pytest.param("learned causal", stage, marks=pytest.mark.slow) for stage in (0, 2, 3)),
        *(pytest.param("own base", stage, marks=pytest.mark.slow) for stage in (0, 3)),
        *(pytest.param("ntk", stage, marks=pytest.mark.slow) for stage in (0, 3)),
        *(pytest.param("linear", stage, marks=pytest.mark.slow) for stage in (0, 2, 3)),
    ],
)
def test_three_stages_equal_a_plain_loop(corpus: Path, tmp_path: Path, model: str, zero_stage: int) -> None:
    import numpy as np
    from safetensors.numpy import load_file

    config = case(corpus, tmp_path, model, zero_stage=zero_stage)
    path = write_config(tmp_path / "run.yaml", config)
    (expected,) = values(run_ranks(plain_loop, 1, config=path))
    ended = run_ranks(train, 2, config=path)
    assert values(ended) == [0, 0]
    assert "in 11 steps of 128, then 256, then 512" in ended[0].output
    rows = metrics(tmp_path / "run")
    # Measured: at most 3e-7, 2.1e-7 and 2.4e-7.
    np.testing.assert_allclose([row["loss"] for row in rows], expected["losses"], rtol=3e-6)
    np.testing.assert_allclose([row["grad_norm"] for row in rows], expected["norms"], rtol=3e-6)
    for name, value in load_file(tmp_path / "run" / "export" / "model.safetensors").items():
        np.testing.assert_allclose(value, expected["weights"][name], atol=2e-6, err_msg=name)


def resumable(corpus: Path, runs: Path, model: str, name: str, **changes: Any) -> dict[str, Any]:
    return case(
        corpus,
        runs,
        model,
        name=name,
        data={"valid": str(corpus / "valid")},
        model={"dropout": 0.2},
        validation={"tokens": 512, "samples": 0},
        **changes,
    )


@pytest.mark.parametrize(
    ("model", "zero_stage", "precision", "stops"),
    [
        ("learned", 2, "bf16", (4, 1)),  # at an edge, right after it
        pytest.param("learned", 3, "bf16", (3, 2), marks=pytest.mark.slow),  # before an edge, after it
        pytest.param("learned", 0, "fp32", (4, 4), marks=pytest.mark.slow),
        pytest.param("learned", 1, "bf16", (5, 4), marks=pytest.mark.slow),
        pytest.param("learned", 3, "bf16", (4, 4), marks=pytest.mark.slow),
        pytest.param("ntk", 2, "fp32", (4, 4), marks=pytest.mark.slow),
        pytest.param("own base", 3, "bf16", (5, 3), marks=pytest.mark.slow),
    ],
)
def test_resumes_around_the_edges_are_exact_to_the_bit(
    corpus: Path, tmp_path: Path, model: str, zero_stage: int, precision: str, stops: tuple[int, ...]
) -> None:
    common = {"zero_stage": zero_stage, "precision": precision}
    whole, parts = (
        write_config(tmp_path / f"{name}.yaml", resumable(corpus, tmp_path, model, name, **common))
        for name in ("whole", "parts")
    )
    assert values(run_ranks(train, 2, config=whole)) == [0, 0]
    for number, stop in enumerate(stops, 1):
        assert values(run_ranks(train, 2, config=parts, stop_after=stop)) == [75, 75]
        assert max(row["step"] for row in metrics(tmp_path / "parts")) == sum(stops[:number])
    assert values(run_ranks(train, 2, config=parts)) == [0, 0]
    run = tmp_path / "parts"
    assert numbers(run) == numbers(tmp_path / "whole")
    assert weights_hash(run) == weights_hash(tmp_path / "whole")
    assert [row["step"] for row in metrics(run, "event") if row["event"] == "stage"] == [1, 5, 9]
    assert events(run).count("resume") == 2


def test_a_run_tells_its_stages_and_validates_at_two_lengths(corpus: Path, tmp_path: Path) -> None:
    config = resumable(corpus, tmp_path, "linear", "run", checkpoint={"every_tokens": 512, "keep_last": 9})
    (end,) = run_ranks(train, 1, config=write_config(tmp_path / "run.yaml", config))
    assert end.value == 0
    run = tmp_path / "run"
    stages = [row for row in metrics(run, "event") if row["event"] == "stage"]
    keys = ("seq_len", "batch_tokens", "masking_rate", "rope_theta", "rope_position_scale")
    assert [tuple(row[key] for key in keys) for row in stages] == [
        (16, 128, 0.3, 1e4, 1.0), (32, 256, 0.2, 1e4, 0.5), (64, 512, 0.15, 1e4, 0.25),
    ]  # fmt: skip
    assert "Masked in the stages: 30.0%, 20.0%, 15.0% (in validation 15.0%)." in end.output
    valid = metrics(run, "valid")
    for row in valid:
        assert row["seq_len"] == [16, 32, 64][row["stage"]]
        assert ("longest_loss" in row) == (row["stage"] < 2)
        if row["stage"] < 2:
            assert row["longest_seq_len"] == 64
            assert 0 <= row["longest_accuracy"] <= 1
            assert row["longest_loss"] != row["loss"]
            assert f"; at length 64: {row['longest_loss']:.4f}" in end.output
            # As many targets in as many tokens: the rate is that of the configuration in every stage.
            assert abs(row["longest_targets"] / valid[-1]["targets"] - 1) < 1e-9
            assert abs(row["targets"] / valid[-1]["targets"] - 1) < 0.3
    (seen,) = values(run_ranks(look_at_checkpoints, 1, run=str(run)))
    assert seen == {512: (1.0, 16), 1024: (0.5, 32), 1536: (0.5, 32), 2048: (0.25, 64), 2560: (0.25, 64),
                    3072: (0.25, 64)}  # fmt: skip
    last = metrics(run, "valid")[-1]
    (again,) = values(run_ranks(loss_of_export, 1, run=str(run), config=str(tmp_path / "run.yaml")))
    assert again == pytest.approx(last["loss"], rel=1e-6)


def look_at_checkpoints(run: str) -> dict[int, tuple[float, int]]:
    """Runs in a rank: what an evaluation takes each checkpoint for: the scale of positions, the length trained on."""
    from eval.subject import Subject
    from pretrain.checkpoint.load import load_model

    out = {}
    for folder in sorted(Path(run, "checkpoints").glob("step*")):
        loaded = load_model(folder)
        assert loaded.model.config == loaded.model_config
        out[loaded.tokens] = (loaded.model_config.rope_position_scale, Subject(loaded).trained_length)
    return out


def loss_of_export(run: str, config: str) -> float:
    """Runs in a rank: the last validation again, from the exported weights alone."""
    import torch

    from data_pipeline.batches.loader import validation_batches
    from data_pipeline.shards.shardset import ShardSet
    from pretrain.checkpoint.load import load_model
    from pretrain.config import load_config

    settings, loaded = load_config(config), load_model(run)
    assert loaded.path.name == "export"
    assert settings.data.valid is not None
    total, targets = 0.0, 0
    for batch in validation_batches(
        ShardSet.open(settings.data.valid), objective="mlm", seq_len=64, rows=4, max_tokens=512, seed=settings.seed,
        masking=settings.data.masking.build(),
    ):  # fmt: skip
        with torch.no_grad():
            out = loaded.model(batch.input_ids, labels=batch.labels)
        total, targets = total + float(out.loss_sum), targets + int(out.num_targets)
    return total / targets


def extend_once(config: str) -> dict[str, Any]:
    """Runs in the ranks: a step, then the edge of the second stage: every state of the table before and after."""
    import torch

    from pretrain.checks import check_inputs
    from pretrain.config import load_config
    from pretrain.curriculum.stages import stage_model
    from pretrain.distributed.world import World, read_rank
    from pretrain.engine.state import fragments
    from pretrain.engine.training import TrainingEngine

    rank = read_rank()
    world = World(rank)
    run = check_inputs(load_config(config), rank.world_size).config
    engine = TrainingEngine(run, world)
    ids = torch.arange(64).reshape(4, 16)
    engine.backward(ids, ids, 0.01)
    engine.step(0.01)
    weight = engine.model.get_parameter("embeddings.position_embeddings.weight")

    def look() -> dict[str, Any]:
        names = fragments.state_names(engine._engine, weight)
        states = {name: fragments.get_full(engine._engine, weight, name).numpy() for name in names}
        rows = torch.arange(64)[None]
        hidden = engine.evaluate(rows, hidden=True).hidden
        assert hidden is not None
        return {**states, "hidden": hidden.float().numpy()}

    before = look()
    engine.enter_stage(stage_model(run, 1))  # as a resume does: nothing is copied
    resumed = look()
    engine.enter_stage(stage_model(run, 1), 16)
    after = look()
    world.close()
    return {"before": before, "resumed": resumed, "after": after}


@pytest.mark.parametrize(
    ("zero_stage", "precision"),
    [(0, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16"), pytest.param(3, "fp32", marks=pytest.mark.slow)],
)
def test_the_rows_are_copied_in_every_state_and_reach_the_model(
    corpus: Path, tmp_path: Path, zero_stage: int, precision: str
) -> None:
    import numpy as np

    config = case(corpus, tmp_path, "learned causal", zero_stage=zero_stage, precision=precision)
    for seen in values(run_ranks(extend_once, 2, config=write_config(tmp_path / "run.yaml", config))):
        before, resumed, after = seen["before"], seen["resumed"], seen["after"]
        assert set(before) == {"fp32", "exp_avg", "exp_avg_sq", "hidden"}
        for name in ("fp32", "exp_avg", "exp_avg_sq"):
            np.testing.assert_array_equal(resumed[name], before[name])
            np.testing.assert_array_equal(after[name][:18], before[name][:18])
            np.testing.assert_array_equal(after[name][18:34], before[name][2:18])
            np.testing.assert_array_equal(after[name][34:], before[name][34:])
            assert np.abs(before[name][2:18]).min(axis=1).max() > 0
        # What the model computes with: before the edge and after it 64 tokens are seen as the same copies.
        np.testing.assert_array_equal(after["hidden"], before["hidden"])
        assert not np.array_equal(resumed["hidden"], before["hidden"])  # rows 16 to 31 as they were drawn


@pytest.mark.slow
@pytest.mark.parametrize("model", ["learned", "ntk", "linear"])
def test_steps_at_16384_tokens(corpus: Path, tmp_path: Path, model: str) -> None:
    from data_pipeline.prepare.plan import plan_preparation
    from data_pipeline.prepare.run import prepare
    from data_pipeline.shards.shardset import ShardSet

    text = tmp_path / "long.jsonl"
    text.write_text((corpus / "train.jsonl").read_text() * 3)  # the corpus itself is shorter than a row
    prepare(plan_preparation([text], ShardSet.open(corpus / "train").tokenizer()), tmp_path / "train")
    stages = [
        {"until_tokens": 4 * 16_384, "seq_len": 4096, "micro_batch": 2},
        {"until_tokens": 6 * 16_384, "seq_len": 16_384, "micro_batch": 1},
    ]
    shape = {**MODELS[model], "segment_length": 128, "num_landmarks": 64}
    config = settings(
        tmp_path, tmp_path, model=shape, curriculum=stages, batch_tokens=16_384, zero_stage=2,
        schedule={"warmup_tokens": 0},
    )  # fmt: skip
    assert values(run_ranks(train, 1, config=write_config(tmp_path / "run.yaml", config))) == [0]
    rows = metrics(tmp_path / "run")
    assert [row["seq_len"] for row in rows] == [4096] * 4 + [16_384] * 2
    assert rows[-1]["loss"] < rows[0]["loss"]
