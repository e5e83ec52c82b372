"""Blocks through the loader: every slice of every block of every source exactly once an epoch, whatever happens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest

from data_pipeline.batches.blocks import Blocks, Order, Rows, StreamBlocks
from data_pipeline.batches.loader import Batch, TrainLoader
from data_pipeline.batches.masking import Masking
from data_pipeline.batches.mixture import MixturePlan, TrainingData, quotas
from data_pipeline.batches.order import Plan, StageSpec
from data_pipeline.batches.packing import PackedBlocks
from data_pipeline.errors import UserError
from data_pipeline.prepare.plan import Settings, plan_preparation
from data_pipeline.prepare.run import prepare
from data_pipeline.shards.shardset import ShardSet
from data_pipeline.tokenization.training import train_tokenizer

FAR = 1 << 32  # tokens of numbered source s begin at s * FAR


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    folder = tmp_path_factory.mktemp("blocks")
    draw = np.random.default_rng(0)
    texts = [" ".join(f"w{n}" for n in draw.integers(0, 400, draw.integers(1, 40))) for _ in range(160)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = train_tokenizer(texts, 300)
    return prepare(
        plan_preparation([folder / "a.jsonl"], tokenizer, Settings(shard_tokens=900)), folder / "shards"
    ).shards


def stream_of(shards: ShardSet) -> np.ndarray:
    return np.concatenate(list(shards.chunks())).astype(np.int64)


def test_stream_blocks_are_the_stream_cut(shards: ShardSet) -> None:
    stream, blocks = stream_of(shards), StreamBlocks(shards, 32)
    assert blocks.num_blocks == (len(stream) - 1) // 32
    chosen = np.array([3, 0, blocks.num_blocks - 1, 3])
    for offset, length in ((0, 32), (8, 16), (31, 1)):
        starts = chosen[:, None] * 32 + offset + np.arange(length)
        masked, causal = (blocks.read(chosen, offset, length, causal=causal) for causal in (False, True))
        assert masked.next_tokens is masked.documents is causal.documents is None
        np.testing.assert_array_equal(masked.tokens, stream[starts])
        np.testing.assert_array_equal(causal.tokens, stream[starts])
        np.testing.assert_array_equal(causal.next_tokens, stream[starts + 1])


def test_shards_shorter_than_a_block_are_refused(shards: ShardSet) -> None:
    with pytest.raises(UserError, match=f"hold {shards.num_tokens} tokens, less than one block of 65536"):
        StreamBlocks(shards, 65536)
    assert StreamBlocks(shards, shards.num_tokens - 1).num_blocks == 1


def test_sources_have_orders_of_their_own_and_the_first_that_of_a_source_alone(shards: ShardSet) -> None:
    blocks, draws = StreamBlocks(shards, 16), np.arange(1000)
    orders = [blocks.order(7, source).blocks(draws) for source in range(3)]
    assert (orders[0] != orders[1]).mean() > 0.9
    assert (orders[1] != orders[2]).mean() > 0.9
    plan = Plan([StageSpec(16, 6400)], block_length=16, batch_tokens=64)
    alone = TrainLoader(TrainingData.single(blocks), plan, objective="clm", seed=7)
    mixed = TrainLoader(
        TrainingData(("a", "b"), (blocks, blocks), MixturePlan([(0, quotas((1, 0)))])), plan, objective="clm", seed=7
    )
    for a, b in zip(alone, mixed, strict=True):
        np.testing.assert_array_equal(a.input_ids, b.input_ids)


@dataclass
class Numbered:
    """Wraps a source: the same blocks in the same order, but each token is its own number."""

    inner: Blocks
    source: int

    @property
    def block_length(self) -> int:
        return self.inner.block_length

    @property
    def num_blocks(self) -> int:
        return self.inner.num_blocks

    @property
    def shards(self) -> ShardSet:
        return self.inner.shards

    def order(self, seed: int, source: int) -> Order:
        return self.inner.order(seed, source)

    def read(self, blocks: np.ndarray, offset: int, length: int, *, causal: bool) -> Rows:
        assert causal
        tokens = self.source * FAR + blocks[:, None] * self.block_length + offset + np.arange(length)
        return Rows(tokens, tokens + 1, None)


class Few(StreamBlocks):
    """The first ``num_blocks`` blocks of a stream."""

    def __init__(self, shards: ShardSet, block_length: int, num_blocks: int) -> None:
        super().__init__(shards, block_length)
        self.num_blocks = num_blocks


def plans() -> Iterator[tuple[int, int, int, list[tuple[int, int]]]]:
    """(case, block, batch, stages): lengths that go up, down and back, changing in the middle of epochs."""
    draw = np.random.default_rng(1)
    for case in range(10):
        block = int(draw.choice([8, 12, 16]))
        lengths = [n for n in range(1, block + 1) if block % n == 0]
        batch = 8 * block * int(draw.integers(1, 4))
        edges = np.cumsum(draw.integers(1, 5, size=draw.integers(1, 5)) * batch * block)
        yield case, block, batch, [(int(draw.choice(lengths)), int(edge)) for edge in edges]


def with_interruptions(data: TrainingData, plan: Plan, seed: int, draw: np.random.Generator) -> list[Batch]:
    """Global batches of a run that is stopped again and again and goes on with another number of processes."""
    out: list[Batch] = []
    position = 0
    while position < plan.total_tokens:
        world_size = int(draw.choice([1, 2, 4, 8]))
        steps = int(draw.integers(1, max(2, plan.num_batches // 3)))
        loaders = [
            TrainLoader(
                data, plan, objective="clm", seed=seed, rank=rank, world_size=world_size, tokens_consumed=position
            )
            for rank in range(world_size)
        ]
        for _, *parts in zip(range(steps), *loaders, strict=False):
            joined = {
                name: np.concatenate([getattr(part, name) for part in parts])
                for name in ("input_ids", "labels", "sample_ids")
            }
            out.append(
                Batch(**joined, stage=parts[0].stage, seq_len=parts[0].seq_len, tokens=0, tokens_before=position)
            )
            assert parts[0].tokens_before == position
            position += parts[0].tokens
        for loader in loaders:
            loader.close()
    return out


@pytest.mark.parametrize("kind", ["stream", "packed", "mixture", "packed mixture"])
@pytest.mark.parametrize(
    ("case", "block", "batch", "stages"),
    [pytest.param(*plan, marks=[pytest.mark.slow] if plan[0] >= 4 else []) for plan in plans()],
)
def test_every_slice_of_every_block_once_an_epoch(
    shards: ShardSet, kind: str, case: int, block: int, batch: int, stages: list[tuple[int, int]]
) -> None:
    draw = np.random.default_rng([case, len(kind)])
    plan = Plan([StageSpec(*stage) for stage in stages], block_length=block, batch_tokens=batch)
    count = int(draw.integers(2, 5)) if "mixture" in kind else 1
    inner: list[Blocks] = []
    for _ in range(count):
        if "packed" in kind:
            shortest = min(stage.seq_len for stage in plan.stages)
            inner.append(PackedBlocks(shards, block, slice_length=shortest, window_tokens=int(draw.integers(200, 900))))
        else:
            inner.append(Few(shards, block, int(draw.integers(1, 70))))
    mixture = MixturePlan([(0, quotas((1,)))])
    if count > 1:
        weights = draw.random((len(plan.stages), count)) + 0.05
        weights[draw.integers(len(plan.stages)), draw.integers(count)] = 0  # a source that pauses
        firsts = [stage.start_tokens // block for stage in plan.stages]
        mixture = MixturePlan([(first, quotas(row.tolist())) for first, row in zip(firsts, weights, strict=True)])
    names = tuple(f"source {i}" for i in range(count))
    data = TrainingData(names, tuple(Numbered(blocks, i) for i, blocks in enumerate(inner)), mixture)

    batches = with_interruptions(data, plan, case, draw)
    assert len(batches) == plan.num_batches
    whole = TrainLoader(data, plan, objective="clm", seed=case)
    seen = [np.zeros(blocks.num_blocks * block, dtype=np.int64) for blocks in inner]
    for one, other in zip(batches, whole, strict=True):
        for name in ("input_ids", "labels", "sample_ids"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        for source, seen_of in enumerate(seen):
            tokens = np.asarray(one.input_ids).ravel()
            seen_of += np.bincount(tokens[tokens // FAR == source] - source * FAR, minlength=len(seen_of))
        done = other.tokens_before + other.tokens
        stage = plan.stages[other.stage]
        if (done - stage.start_tokens) % (batch * stage.slices) == 0:  # the end of a window: no block is half read
            used = mixture.counts(done // block)
            assert used.sum() == done // block
            for seen_of, draws, blocks in zip(seen, used.tolist(), inner, strict=True):
                epochs, rest = divmod(draws, blocks.num_blocks)
                assert ((seen_of == epochs) | (seen_of == epochs + 1)).all()
                assert (seen_of == epochs + 1).sum() == rest * block


def runs(document_ids: np.ndarray) -> np.ndarray:
    """Document numbers as the model sees them: where one ends and the next begins, and padding."""
    return np.where(document_ids < 0, -1, np.diff(document_ids, axis=1, prepend=-2) != 0)


@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_packed_batches_are_whole_documents_on_any_number_of_processes(shards: ShardSet, objective: str) -> None:
    plan = Plan([StageSpec(16, 4000), StageSpec(64, 12_000)], block_length=64, batch_tokens=512)
    assert plan.total_tokens > shards.num_tokens / 0.9  # more than an epoch
    blocks = PackedBlocks(shards, 64, slice_length=16, max_padding=0.05, window_tokens=800)
    data = TrainingData.single(blocks)

    def loader(**options: int) -> TrainLoader:
        return TrainLoader(data, plan, objective=objective, seed=2, masking=Masking(), **options)  # type: ignore[arg-type]

    ranks = [loader(rank=rank, world_size=4) for rank in range(4)]
    epoch = np.zeros(300, dtype=np.int64)
    for whole, *parts in zip(loader(), *ranks, strict=True):
        for name in ("input_ids", "labels", "sample_ids"):
            np.testing.assert_array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name))
        documents = np.asarray(whole.document_ids)
        assert documents.shape == tuple(whole.input_ids.shape)
        np.testing.assert_array_equal(runs(np.concatenate([part.document_ids for part in parts])), runs(documents))
        alone = loader().batch_at(whole.tokens_before)
        np.testing.assert_array_equal(runs(np.asarray(alone.document_ids)), runs(documents))
        np.testing.assert_array_equal(alone.labels, whole.labels)
        inputs, labels = np.asarray(whole.input_ids), np.asarray(whole.labels)
        assert (inputs[documents < 0] == shards.pad_id).all()
        assert (labels[documents < 0] == -100).all()
        if objective == "clm":
            inside = documents[:, 1:] == documents[:, :-1]
            np.testing.assert_array_equal(
                np.where(inside & (documents[:, 1:] >= 0), labels[:, :-1], 0),
                np.where(inside & (documents[:, 1:] >= 0), inputs[:, 1:], 0),
            )
            assert (labels[inputs == shards.eos_id] == -100).all()  # no document predicts the next one
            first_epoch = whole.sample_ids.numpy()[:, None] < blocks.num_blocks * 64
            epoch += np.bincount(inputs[first_epoch & (documents >= 0)], minlength=300)
    if objective == "clm":
        np.testing.assert_array_equal(epoch, np.bincount(stream_of(shards), minlength=300))


def test_packed_and_plain_sources_may_be_mixed(shards: ShardSet) -> None:
    plan = Plan([StageSpec(16, 4096)], block_length=16, batch_tokens=256)
    sources = (StreamBlocks(shards, 16), PackedBlocks(shards, 16, window_tokens=800))
    data = TrainingData(("stream", "packed"), sources, MixturePlan([(0, quotas((1, 1)))]))
    several = 0
    for batch in TrainLoader(data, plan, objective="clm", seed=1):
        assert batch.document_ids is not None
        plain = (batch.document_ids == 0).all(1)
        assert plain.sum() >= len(plain) // 2  # all rows of the stream
        several += int((~plain).sum())
    assert several
