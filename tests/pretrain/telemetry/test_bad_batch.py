"""Batches of steps that went wrong: what is saved, and what ``nystrom replay`` finds in them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks, values
from test_training import train, train_with_a_bad_step
from training_case import metrics, settings, write_config

from data_pipeline.errors import UserError, run_cli


def bad_step(config: str, step: int, kind: str) -> int:
    """Runs in the ranks."""
    return train_with_a_bad_step(config, step, kind)


def plain_train(config: str) -> int:
    """Runs in the ranks."""
    return train(config)


def replay(folder: str, words: list[str]) -> int:
    """Runs in a rank: the command."""
    from pretrain.replay import main

    return run_cli(main, "nystrom replay", [folder, *words])


def replayed_loss(folder: str) -> float:
    """Runs in a rank: the mean loss of all the saved rows, by the weights that replay chooses."""
    from pretrain.replay import compute, load_weights, read_rows

    facts, rows = read_rows(Path(folder))
    model, _, _ = load_weights(Path(folder).parent.parent, facts, None)
    done = compute(model, rows, facts["targets"])
    return sum(row.loss * int((row.labels != -100).sum()) for row in done) / facts["targets"]


def batch_of(config: str, tokens_before: int, rank: int) -> Any:
    """The rows of process ``rank`` of 2, straight from the loader."""
    from data_pipeline.batches.loader import TrainLoader
    from pretrain.config import load_config
    from pretrain.curriculum.plan import build_plan
    from pretrain.sources import open_sources

    run = load_config(config)
    plan = build_plan(run)
    masking = run.data.masking.build()
    loader = TrainLoader(
        open_sources(run, plan),
        plan,
        objective=run.model.objective,
        seed=run.seed,
        masking=masking,
        rank=rank,
        world_size=2,
    )
    return loader.batch_at(tokens_before)


def assert_saved(folder: Path, config: str, ranks: list[int]) -> None:
    import torch

    from pretrain.telemetry.bad_batches import read_batch

    facts, parts = read_batch(folder)
    assert [rank for rank, _ in parts] == facts["processes"] == ranks
    for rank, tensors in parts:
        expected = batch_of(config, facts["tokens_before"], rank)
        names = ["input_ids", "labels", "sample_ids"]
        names += ["document_ids"] if expected.document_ids is not None else []
        assert sorted(tensors) == sorted(names)
        for name in names:
            assert torch.equal(tensors[name], getattr(expected, name).long()), name


def test_the_rows_of_the_process_at_fault_are_saved(corpus: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", settings(corpus, tmp_path, zero_stage=2))
    ended = run_ranks(bad_step, 2, config=config, step=3, kind="loss")
    assert values(ended) == [0, 0]
    folder = tmp_path / "run" / "bad_steps" / "step000000003"
    assert sorted(path.name for path in folder.iterdir()) == ["rank_00001.safetensors", "step.json"]
    assert_saved(folder, config, [1])
    facts = json.loads((folder / "step.json").read_text())
    targets = sum(int((batch_of(config, 512, rank).labels != -100).sum()) for rank in (0, 1))
    assert facts.pop("lr") > 0
    assert facts == {
        "step": 3, "what": "loss", "loss": "nan", "targets": targets, "tokens": 768, "tokens_before": 512, "stage": 0,
        "seq_len": 32, "loss_scale": 1.0, "precision": "fp32", "processes": [1], "world_size": 2, "checkpoint": None,
    }  # fmt: skip
    (event,) = [row for row in metrics(tmp_path / "run", "event") if row["event"] == "bad_step"]
    assert event["saved"] == "bad_steps/step000000003"
    assert f"nystrom replay {folder}" in ended[0].output
    assert metrics(tmp_path / "run")[-1]["bad_steps"] == 1


def test_replay_takes_the_weights_that_the_step_began_with(corpus: Path, tmp_path: Path) -> None:
    common = {"checkpoint": {"every_tokens": 256, "keep_last": 9}, "zero_stage": 2, "data": {"packing": "documents"}}
    clean = write_config(tmp_path / "clean.yaml", settings(corpus, tmp_path, name="clean", **common))
    assert values(run_ranks(plain_train, 2, config=clean)) == [0, 0]
    config = write_config(tmp_path / "run.yaml", settings(corpus, tmp_path, **common))
    assert values(run_ranks(bad_step, 2, config=config, step=3, kind="gradient")) == [0, 0]
    run = tmp_path / "run"
    folder = run / "bad_steps" / "step000000003"
    assert_saved(folder, config, [0, 1])
    assert json.loads((folder / "step.json").read_text())["checkpoint"] == "step000000002"
    (loss,) = values(run_ranks(replayed_loss, 1, folder=str(folder)))
    assert loss == pytest.approx(metrics(tmp_path / "clean")[2]["loss"], rel=1e-5)
    (end,) = run_ranks(replay, 1, folder=str(folder), words=["--bf16"])
    assert (end.code, end.value) == (0, 0)
    assert "its gradient was not finite" in end.output
    assert "8 rows of 32 tokens from process(es) 0, 1 of 2" in end.output
    assert f"Weights: {run / 'checkpoints' / 'step000000003'}, after 768 tokens" in end.output
    assert end.output.count("nothing is wrong with any of the 8 rows") == 2
    assert "the learning rate (0.01 at that step), if steps of that size spoilt the weights before" in end.output
    assert "The step had other weights" not in end.output  # a step that was skipped left them as they were
    assert end.output.index("In float32") < end.output.index("In bfloat16")
    for step in (1, 2, 3):
        (run / "checkpoints" / f"step{step:09d}").rename(run / f"aside{step}")
    (end,) = run_ranks(replay, 1, folder=str(folder), words=[])
    assert f"Weights: {run / 'checkpoints' / 'step000000004'}, after 1,024 tokens; the step began at 512" in end.output
    (run / "aside1").rename(run / "checkpoints" / "step000000001")
    (end,) = run_ranks(replay, 1, folder=str(folder), words=["--checkpoint", str(run / "checkpoints/step000000001")])
    assert f"Weights: {run / 'checkpoints' / 'step000000001'}, after 256 tokens" in end.output
    assert "The step had other weights, to which these rows may do something else." in end.output


def test_without_a_checkpoint_replay_starts_from_the_seed(corpus: Path, tmp_path: Path) -> None:
    clean = write_config(tmp_path / "clean.yaml", settings(corpus, tmp_path, name="clean"))
    assert values(run_ranks(plain_train, 1, config=clean)) == [0]
    config = write_config(tmp_path / "run.yaml", settings(corpus, tmp_path, max_bad_steps=1))
    assert values(run_ranks(bad_step, 2, config=config, step=1, kind="gradient")) == [76, 76]
    folder = tmp_path / "run" / "bad_steps" / "step000000001"
    (loss,) = values(run_ranks(replayed_loss, 1, folder=str(folder)))
    assert loss == pytest.approx(metrics(tmp_path / "clean")[0]["loss"], rel=1e-5)
    (end,) = run_ranks(replay, 1, folder=str(folder), words=[])
    assert "Weights: as initialised, for the run has no whole checkpoint from before step 1." in end.output


def poisoned_model(word: int) -> Any:
    """A small causal model in which one word makes everything after it not a number."""
    import torch

    from pretrain.model.config import ModelConfig
    from pretrain.model.transformer import build_model

    torch.manual_seed(0)
    config = ModelConfig(
        objective="clm", vocab_size=50, hidden_size=16, num_layers=1, num_heads=2, num_landmarks=4, segment_length=4,
        init_std=0.5,
    )  # fmt: skip
    model = build_model(config.model_copy(update={"tie_embeddings": False})).eval()
    model.embeddings.word_embeddings.weight.data[word] = math.inf
    return model


def test_rows_that_are_not_finite_or_stand_out_are_named() -> None:
    import torch

    from pretrain.replay import Row, compute, findings

    model = poisoned_model(word=7)
    ids = torch.arange(8, 40).reshape(4, 8)
    ids[2, 3] = 7
    rows = [Row(1, number, 100 + number, row, row.roll(-1), None) for number, row in enumerate(ids)]
    done = list(compute(model, rows, targets=32))
    assert [row.is_finite for row in done] == [True, True, False, True]
    reference = model(ids[:1], labels=rows[0].labels[None])
    model.zero_grad()
    (reference.loss_sum / 32).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)
    assert done[0].grad_norm == pytest.approx(float(norm), rel=1e-5)
    assert done[0].loss == pytest.approx(float(reference.loss_sum.detach()) / 8, rel=1e-5)
    documents = torch.tensor([0] * 5 + [1] * 3)
    (packed,) = compute(model, [Row(0, 0, 0, ids[1], ids[1].roll(-1), documents)], targets=8)
    apart = [model(ids[1:2, part], labels=ids[1].roll(-1)[None, part]) for part in (slice(5), slice(5, 8))]
    assert packed.loss == pytest.approx(sum(float(out.loss_sum.detach()) for out in apart) / 8, rel=1e-5)
    assert packed.loss != pytest.approx(done[1].loss, rel=1e-4)
    lines = "\n".join(findings("float32", done, lambda row: f"text {row.sample}"))
    assert "1 of 4 rows are not finite:\n    sample 102 (row 2 of process 1): loss nan" in lines
    assert "text 102" in lines
    assert "nothing is wrong" not in lines

    import dataclasses

    high = [dataclasses.replace(row, loss=1.0 + row.number * 0.01, grad_norm=1.0) for row in done]
    high[3] = dataclasses.replace(high[3], grad_norm=50.0)
    lines = "\n".join(findings("float32", high, lambda row: f"text {row.sample}"))
    assert "1 of 4 rows stand out" in lines
    assert "sample 103 (row 3 of process 1): loss 1.0300, gradient norm 50" in lines


def test_a_disk_that_does_not_take_them_does_not_end_the_run(corpus: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", settings(corpus, tmp_path, zero_stage=2))
    run = tmp_path / "run"
    run.mkdir()
    (run / "bad_steps").write_text("in the way")
    ended = run_ranks(bad_step, 2, config=config, step=3, kind="loss")
    assert values(ended) == [0, 0]
    assert "Its rows could not be saved: [Errno 17]" in ended[0].output
    (event,) = [row for row in metrics(run, "event") if row["event"] == "bad_step"]
    assert event["saved"] is None
    assert len(event["samples"]) == 4


def test_the_newest_stay(tmp_path: Path) -> None:
    import torch

    from data_pipeline.batches.loader import Batch
    from pretrain.distributed.world import Rank
    from pretrain.telemetry import bad_batches

    class Alone:
        rank, world_size, is_first = Rank().rank, 1, True

        def gather(self, value: Any) -> list[Any]:
            return [value]

    ids = torch.arange(6).reshape(2, 3)
    batch = Batch(ids, ids, torch.arange(2), stage=0, seq_len=3, tokens=6, tokens_before=0)
    root = tmp_path / "bad_steps"
    (root / "step000000001-mine").mkdir(parents=True)
    for step in range(1, 26):
        saved = bad_batches.save_batch(root, Alone(), batch, False, {"step": step})  # type: ignore[arg-type]
        assert saved.folder == root / f"step{step:09d}"
    names = [path.name for path in sorted(root.iterdir())]
    assert names == ["step000000001-mine", *(f"step{step:09d}" for step in range(6, 26))]
    with pytest.raises(UserError, match=r"is not a saved batch \(it has no step.json\)"):
        bad_batches.read_batch(root)
    rows = root / "step000000025" / "rank_00000.safetensors"
    rows.write_bytes(rows.read_bytes()[:-20])
    with pytest.raises(UserError, match="cannot be read"):
        bad_batches.read_batch(rows.parent)
