"""Batches as a function of the position: any number of processes, any point of resumption, and a thread that ends."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.batches import loader as loader_module
from data_pipeline.batches.loader import Batch, TrainLoader, validation_batches
from data_pipeline.batches.masking import Masking
from data_pipeline.batches.mixture import TrainingData
from data_pipeline.batches.order import Plan, StageSpec
from data_pipeline.errors import UserError
from data_pipeline.prepare.plan import Settings, plan_preparation
from data_pipeline.prepare.run import prepare
from data_pipeline.shards.shardset import ShardSet
from data_pipeline.tokenization.training import train_tokenizer

MASKING = Masking()
# 8-token slices, then halves, then whole blocks of 32: about two epochs of the text below.
PLAN = Plan([StageSpec(8, 2000), StageSpec(16, 4000), StageSpec(32, 9000)], block_length=32, batch_tokens=256)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    folder = tmp_path_factory.mktemp("loader")
    texts = [f"row {i} of {i * 7919 % 1000} " * (1 + i % 4) for i in range(220)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = train_tokenizer(texts, 270)
    opened = prepare(
        plan_preparation([folder / "a.jsonl"], tokenizer, Settings(shard_tokens=600)), folder / "shards"
    ).shards
    assert 3000 < opened.num_tokens < 9000
    return opened


def loader(shards: ShardSet, objective: str = "clm", **options: Any) -> TrainLoader:
    data = TrainingData.stream(shards, PLAN.block_length)
    return TrainLoader(data, PLAN, objective=objective, seed=5, masking=MASKING, **options)  # type: ignore[arg-type]


def same(a: Batch, b: Batch) -> bool:
    tensors = all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("input_ids", "labels", "sample_ids"))
    return tensors and all(getattr(a, n) == getattr(b, n) for n in ("stage", "seq_len", "tokens", "tokens_before"))


def test_batches_follow_the_plan(shards: ShardSet) -> None:
    position, samples = 0, []
    for batch in loader(shards):
        stage = PLAN.stages[batch.stage]
        assert stage.start_tokens <= position < stage.end_tokens
        assert (batch.tokens_before, batch.tokens, batch.seq_len) == (position, 256, stage.seq_len)
        assert batch.input_ids.shape == batch.labels.shape == (256 // stage.seq_len, stage.seq_len)
        assert batch.input_ids.dtype == batch.labels.dtype == batch.sample_ids.dtype == torch.int64
        samples += [(sample, sample + batch.seq_len) for sample in batch.sample_ids.tolist()]
        position += batch.tokens
    assert position == PLAN.total_tokens
    samples.sort()  # places in the training order: no gap and no overlap
    assert [end for _, end in samples] == [start for start, _ in samples[1:]] + [PLAN.total_tokens]


def test_causal_labels_are_the_next_tokens_of_the_stream(shards: ShardSet) -> None:
    stream = np.concatenate(list(shards.chunks())).astype(np.int64)
    places: dict[int, list[int]] = {}
    for start in range(len(stream) - 8):
        places.setdefault(hash(stream[start : start + 9].tobytes()), []).append(start)
    for batch in itertools.islice(loader(shards), 20):
        for inputs, labels in zip(batch.input_ids.numpy(), batch.labels.numpy(), strict=True):
            np.testing.assert_array_equal(inputs[1:], labels[:-1])
            row = np.append(inputs, labels[-1])
            starts = places[hash(row[:9].tobytes())]
            assert any(start % 8 == 0 and (stream[start : start + len(row)] == row).all() for start in starts)


def test_an_epoch_has_every_causal_target_once(shards: ShardSet) -> None:
    stream = np.concatenate(list(shards.chunks())).astype(np.int64)
    num_blocks = (len(stream) - 1) // 32
    counts = np.zeros(300, dtype=np.int64)
    seen = 0
    for batch in loader(shards):
        rows = batch.labels.numpy()[batch.sample_ids.numpy() < num_blocks * 32]  # the part of the batch in epoch 0
        counts += np.bincount(rows.ravel(), minlength=300)
        seen += rows.size
    assert seen == num_blocks * 32
    np.testing.assert_array_equal(counts, np.bincount(stream[1 : num_blocks * 32 + 1], minlength=300))


def test_masked_batches_hide_the_stream(shards: ShardSet) -> None:
    for masked, plain in zip(loader(shards, "mlm"), loader(shards, "clm"), strict=True):
        assert torch.equal(masked.sample_ids, plain.sample_ids)
        targets = masked.labels != -100
        restored = torch.where(targets, masked.labels, masked.input_ids)
        assert torch.equal(restored, plain.input_ids)  # the same rows, before masking
        assert not torch.isin(masked.labels[targets], torch.tensor(shards.special_ids)).any()


def test_masks_differ_from_epoch_to_epoch(shards: ShardSet) -> None:
    by_row: dict[bytes, list[torch.Tensor]] = {}
    for masked, plain in zip(loader(shards, "mlm"), loader(shards, "clm"), strict=True):
        if masked.seq_len == 32:
            for row, labels in zip(plain.input_ids, masked.labels, strict=True):
                by_row.setdefault(row.numpy().tobytes(), []).append(labels != -100)
    repeated = [masks for masks in by_row.values() if len(masks) > 1]
    assert repeated
    assert all(not torch.equal(masks[0], masks[1]) for masks in repeated)


@pytest.mark.parametrize("objective", ["clm", "mlm"])
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_ranks_interleave_to_the_same_global_batches(shards: ShardSet, objective: str, world_size: int) -> None:
    ranks = [loader(shards, objective, rank=rank, world_size=world_size) for rank in range(world_size)]
    for whole, *parts in zip(loader(shards, objective), *ranks, strict=True):
        for name in ("input_ids", "labels", "sample_ids"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
        assert all(part.tokens == whole.tokens and part.tokens_before == whole.tokens_before for part in parts)


@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_resuming_at_any_batch_equals_going_on(shards: ShardSet, objective: str) -> None:
    whole = list(loader(shards, objective))
    for i in range(len(whole)):
        resumed = next(iter(loader(shards, objective, tokens_consumed=whole[i].tokens_before)))
        assert same(resumed, whole[i])
    rest = list(loader(shards, objective, tokens_consumed=whole[9].tokens_before))
    assert len(rest) == len(whole) - 9
    assert all(same(a, b) for a, b in zip(rest, whole[9:], strict=True))
    assert list(loader(shards, objective, tokens_consumed=PLAN.total_tokens)) == []


def test_iterating_again_starts_again(shards: ShardSet) -> None:
    again = loader(shards)
    assert all(same(a, b) for a, b in zip(itertools.islice(again, 5), itertools.islice(again, 5), strict=True))


# Each stage has a batch and a masking of its own; 4 processes share every one of them.
UNEVEN = Plan(
    [StageSpec(8, 1500, 128), StageSpec(16, 4000), StageSpec(32, 7000, 512), StageSpec(8, 9000, 256)],
    block_length=32,
    batch_tokens=384,
)
MASKINGS = [Masking(rate=0.4), Masking(), Masking(rate=0.25, unit="word"), Masking(rate=0.1)]


def uneven(shards: ShardSet, **options: Any) -> TrainLoader:
    data = TrainingData.stream(shards, UNEVEN.block_length)
    return TrainLoader(data, UNEVEN, **{"objective": "mlm", "seed": 5, "masking": MASKINGS, **options})


def test_every_stage_has_its_own_batch_and_masking(shards: ShardSet) -> None:
    whole = list(uneven(shards))
    position = 0
    for batch in whole:
        stage = UNEVEN.stages[batch.stage]
        assert (batch.tokens_before, batch.tokens, batch.input_ids.numel()) == (position, *[stage.batch_tokens] * 2)
        position += batch.tokens
    assert position == UNEVEN.total_tokens
    for masking, rows in itertools.groupby(whole, key=lambda batch: MASKINGS[batch.stage]):
        labels = torch.cat([batch.labels.flatten() for batch in rows])
        assert abs(float((labels != -100).float().mean()) / masking.rate - 1) < 0.2
    # The noise is that of a run which masks everything as the stage does: nothing of the stages before is in it.
    for number, masking in enumerate(MASKINGS):
        alone = uneven(shards, masking=masking)
        for batch in whole:
            assert same(batch, alone.batch_at(batch.tokens_before)) or batch.stage != number


@pytest.mark.parametrize("gather_tokens", [1, 700, 1 << 20])
def test_uneven_stages_resume_and_share_out_anywhere(
    shards: ShardSet, monkeypatch: pytest.MonkeyPatch, gather_tokens: int
) -> None:
    whole = list(uneven(shards))
    monkeypatch.setattr(loader_module, "GATHER_TOKENS", gather_tokens)
    edges = [0] + [i for i in range(1, len(whole)) if whole[i].stage != whole[i - 1].stage]
    for i in {*edges, *(edge - 1 for edge in edges if edge), 3, len(whole) - 1}:
        rest = list(uneven(shards, tokens_consumed=whole[i].tokens_before))
        assert len(rest) == len(whole) - i
        assert all(same(a, b) for a, b in zip(rest, whole[i:], strict=True))
    ranks = [uneven(shards, rank=rank, world_size=4) for rank in range(4)]
    for batch, *parts in zip(whole, *ranks, strict=True):
        for name in ("input_ids", "labels", "sample_ids"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))


def test_seeds_differ(shards: ShardSet) -> None:
    data = TrainingData.stream(shards, PLAN.block_length)
    a, b = (TrainLoader(data, PLAN, objective="clm", seed=seed).batch_at(0) for seed in (1, 2))
    assert not torch.equal(a.input_ids, b.input_ids)


def prefetch_threads() -> int:
    return sum(thread.name == "prefetch" for thread in threading.enumerate())


def test_the_thread_ends_with_the_iteration(shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.batches.loader.GATHER_TOKENS", 1)  # more groups than are made ahead
    assert prefetch_threads() == 0
    whole = loader(shards)
    for _ in whole:
        assert prefetch_threads() == 1
        break
    assert prefetch_threads() == 0
    list(whole)
    assert prefetch_threads() == 0
    iterator = iter(whole)
    next(iterator)
    assert prefetch_threads() == 1
    whole.close()
    assert prefetch_threads() == 0
    assert list(iterator) == []  # closed under the consumer's hands: it ends, it does not hang
    whole.close()


def test_it_reads_ahead_but_not_far(shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    reached = threading.Event()
    original = TrainLoader._read

    def read(self: TrainLoader, position: int, limit: int) -> Any:
        made.append(position)
        if len(made) == 5:
            reached.set()
        return original(self, position, limit)

    monkeypatch.setattr(loader_module, "GATHER_TOKENS", 1)  # batches are read one by one
    monkeypatch.setattr(TrainLoader, "_read", read)
    iterator = iter(loader(shards, prefetch=3))
    next(iterator)
    assert reached.wait(5)  # one taken, three waiting, one in hand
    assert not threading.Event().wait(0.1)
    assert len(made) == 5
    iterator.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("bad", [0, 3, 11])
def test_an_exception_of_the_thread_is_raised_in_the_consumer_at_its_batch(
    shards: ShardSet, monkeypatch: pytest.MonkeyPatch, bad: int
) -> None:
    original = TrainLoader._read

    def read(self: TrainLoader, position: int, limit: int) -> Any:
        group = original(self, position, limit)
        if any(batch.tokens_before == bad * 256 for batch in self._cut(group)):
            raise UserError("shard 7 is damaged")
        return group

    monkeypatch.setattr(TrainLoader, "_read", read)
    iterator = iter(loader(shards))
    # Those before it may have been read together with it; they are whole and come first.
    assert [next(iterator).tokens_before for _ in range(bad)] == [256 * i for i in range(bad)]
    with pytest.raises(UserError, match="shard 7 is damaged"):
        next(iterator)
    assert prefetch_threads() == 0


@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_batches_read_together_equal_batches_read_alone(
    shards: ShardSet, monkeypatch: pytest.MonkeyPatch, objective: str
) -> None:
    together = list(loader(shards, objective))
    assert all(same(batch, loader(shards, objective).batch_at(batch.tokens_before)) for batch in together)
    for gather_tokens in (1, 600, 1 << 20):
        monkeypatch.setattr(loader_module, "GATHER_TOKENS", gather_tokens)
        again = list(loader(shards, objective, tokens_consumed=512))
        assert len(again) == len(together) - 2
        assert all(same(a, b) for a, b in zip(again, together[2:], strict=True))


def test_a_process_that_leaves_it_running_exits(shards: ShardSet) -> None:
    script = f"""
from data_pipeline.batches.loader import TrainLoader
from data_pipeline.batches.mixture import TrainingData
from data_pipeline.batches.order import Plan, StageSpec
from data_pipeline.shards.shardset import ShardSet
plan = Plan([StageSpec(32, 10**12)], block_length=32, batch_tokens=256)
data = TrainingData.stream(ShardSet.open({str(shards.path)!r}), 32)
iterator = iter(TrainLoader(data, plan, objective="clm", seed=1))
print(tuple(next(iterator).input_ids.shape))
"""
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "(8, 32)\n", "")


def test_refusals(shards: ShardSet) -> None:
    with pytest.raises(UserError, match="position 100 is not the edge of a batch of 256 tokens"):
        loader(shards, tokens_consumed=100)
    with pytest.raises(UserError, match="outside the run"):
        loader(shards, tokens_consumed=PLAN.total_tokens + 256)
    with pytest.raises(UserError, match=r"stage 0: .* 32 rows .* does not divide among 3 processes"):
        loader(shards, world_size=3)
    with pytest.raises(UserError, match="stage 2: a global batch of 8 rows"):
        loader(shards, world_size=16)
    with pytest.raises(UserError, match="objective must be 'mlm' or 'clm', got 'both'"):
        loader(shards, "both")
    data = TrainingData.stream(shards, 32)
    with pytest.raises(UserError, match="mlm needs masking"):
        TrainLoader(data, PLAN, objective="mlm", seed=1)
    with pytest.raises(ValueError, match="2 maskings for a plan of 3 stages"):
        TrainLoader(data, PLAN, objective="mlm", seed=1, masking=[MASKING, MASKING])
    with pytest.raises(ValueError, match="blocks of 64 tokens do not fit a plan of 32"):
        TrainLoader(TrainingData.stream(shards, 64), PLAN, objective="clm", seed=1)
    maskless = copy.copy(shards)
    roles = {role: id_ for role, id_ in shards.manifest.special_ids.items() if role != "mask"}
    maskless.manifest = dataclasses.replace(shards.manifest, special_ids=roles)
    maskless.mask_id = None
    with pytest.raises(UserError, match="masked language modelling needs a mask token"):
        loader(maskless, "mlm")
    assert loader(maskless, "clm").batch_at(0).seq_len == 8
    with pytest.raises(ValueError, match="rank 2 outside"):
        loader(shards, rank=2, world_size=2)


def held_out(shards: ShardSet, objective: str, **options: Any) -> list[Batch]:
    defaults = {"seq_len": 16, "rows": 5, "max_tokens": 1000, "seed": 3, "masking": MASKING}
    return list(validation_batches(shards, objective=objective, **{**defaults, **options}))  # type: ignore[arg-type]


def rows_of(batches: list[Batch]) -> list[tuple[int, bytes, bytes]]:
    """Real rows (those with targets) by sample id."""
    rows = []
    for batch in batches:
        for sample, inputs, labels in zip(batch.sample_ids.tolist(), batch.input_ids, batch.labels, strict=True):
            if (labels != -100).any():
                rows.append((sample, inputs.numpy().tobytes(), labels.numpy().tobytes()))
    return sorted(rows)


@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_validation_rows_are_the_same_however_they_are_grouped(shards: ShardSet, objective: str) -> None:
    expected = rows_of(held_out(shards, objective))
    assert expected == rows_of(held_out(shards, objective))
    assert len({sample for sample, *_ in expected}) == len(expected)
    if objective == "clm":
        assert len(expected) == 1000 // 16
    for world_size, rows in ((1, 1), (1, 100), (2, 5), (4, 7)):
        ranks = [held_out(shards, objective, rows=rows, rank=r, world_size=world_size) for r in range(world_size)]
        assert rows_of([batch for rank in ranks for batch in rank]) == expected
        for parts in zip(*ranks, strict=True):  # equally many batches of equal shape on all ranks
            assert {part.input_ids.shape for part in parts} == {(rows, 16)}
            assert {part.tokens for part in parts} == {parts[0].tokens}
        assert sum(batch.tokens for batch in ranks[0]) == 1000 // 16 * 16


def test_validation_takes_all_or_an_even_sample(shards: ShardSet) -> None:
    everything = [sample for sample, *_ in rows_of(held_out(shards, "clm", max_tokens=10**9))]
    assert everything == list(range(0, (shards.num_tokens - 1) // 16 * 16, 16))
    few = [sample for sample, *_ in rows_of(held_out(shards, "clm", max_tokens=64))]
    assert len(few) == 4
    assert set(few) <= set(everything)
    assert max(few) > shards.num_tokens // 2
    assert len(rows_of(held_out(shards, "clm", max_tokens=1))) == 1


def test_validation_refuses_shards_shorter_than_a_row(shards: ShardSet) -> None:
    with pytest.raises(UserError, match="less than one row of 100000"):
        held_out(shards, "clm", seq_len=100_000)


@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_validation_rows_of_documents_apart(shards: ShardSet, objective: str) -> None:
    """All documents fit a row, so each is whole in one, and its last token has no target."""
    found = held_out(shards, objective, seq_len=256, max_tokens=10**9, documents_apart=True)
    expected = rows_of(found)
    documents = []
    for batch in found:
        assert batch.document_ids is not None
        for ids, inputs, labels, numbers in zip(
            batch.sample_ids, batch.input_ids, batch.labels, batch.document_ids, strict=True
        ):
            assert ids % 256 == 0
            for number in torch.unique(numbers[numbers >= 0]) if (labels != -100).any() else ():
                tokens, goals = inputs[numbers == number], labels[numbers == number]
                if objective == "clm":
                    assert goals.tolist() == [*tokens[1:].tolist(), -100]
                documents.append(torch.where((goals == -100) | (objective == "clm"), tokens, goals).tolist())
    whole = [[*document.tolist(), shards.eos_id] for document in shards.documents()]
    assert sorted(documents) == sorted(whole)
    options = {"seq_len": 256, "rows": 3, "world_size": 2, "documents_apart": True}
    ranks = [held_out(shards, objective, max_tokens=10**9, rank=rank, **options) for rank in range(2)]
    assert rows_of([batch for rank in ranks for batch in rank]) == expected
    few = rows_of(held_out(shards, objective, seq_len=256, max_tokens=512, documents_apart=True))
    assert len(few) == 2
    assert set(few) < set(expected)
