"""From a position in the run to batches of tensors: gather, mask, prefetch. The only state is ``tokens_consumed``."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from data_pipeline.batches import IGNORE
from data_pipeline.batches.blocks import Rows
from data_pipeline.batches.masking import Masking, mask_tokens
from data_pipeline.batches.mixture import TrainingData
from data_pipeline.batches.order import BatchSpan, Plan
from data_pipeline.batches.packing import PackedBlocks
from data_pipeline.batches.prefetch import Prefetcher
from data_pipeline.batches.words import WordBoundaries
from data_pipeline.errors import UserError
from data_pipeline.shards.shardset import ShardSet
from data_pipeline.tokenization.roles import check_objective

if TYPE_CHECKING:
    import torch

Objective = Literal["mlm", "clm"]

GATHER_TOKENS = 1 << 19
"""Tokens that are read and masked in one go, so that small batches share the cost of calling NumPy, which for 32 x 512
is more than that of copying the tokens. Larger pieces leave the processor's cache."""


class Batch(NamedTuple):
    """One process's part of a global batch.

    ``input_ids`` (rows, seq_len) and ``labels`` (rows, seq_len), CPU int64; labels are -100 where there is no target.
    Causal labels are the next tokens already (``labels[t]`` follows ``input_ids[t]``): the model does not shift. The
    two may share memory, within a batch and with neighbouring batches: do not write to them.
    ``sample_ids`` (rows,) int64, a row's position in the training order, name rows in error messages.
    ``document_ids`` (rows, seq_len) int32 tells packed documents apart, -1 at padding; None where every row is one
    sequence. ``tokens`` counts the slots of the *global* batch, padding included, ``tokens_before`` what was consumed
    before it: the state to save after training on the batch is ``tokens_before + tokens``.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    sample_ids: torch.Tensor
    stage: int
    seq_len: int
    tokens: int
    tokens_before: int
    document_ids: torch.Tensor | None = None


class _Noise:
    """From rows of text to inputs and labels for one objective."""

    def __init__(self, shards: ShardSet, objective: Objective, seed: int, maskings: Sequence[Masking]) -> None:
        if objective not in ("mlm", "clm"):
            raise UserError(f"objective must be 'mlm' or 'clm', got {objective!r}")
        self.causal = objective == "clm"
        self._shards, self._seed = shards, seed
        self._maskings = maskings
        self._boundaries: WordBoundaries | None = None
        if objective == "mlm":
            if not maskings:
                raise UserError("objective mlm needs masking")
            check_objective(shards.manifest.special_ids, objective, f"the shards in {shards.path}")
            if any(masking.unit != "token" for masking in maskings):
                self._boundaries = WordBoundaries.of(shards.tokenizer())

    def __call__(
        self, rows: Rows, sample_ids: np.ndarray, length: int, stage: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """(inputs, labels), each of the shape of ``rows.tokens`` (B, k * length), int64.

        Every ``length`` tokens of a row are a sample of their own, ``sample_ids`` (B, k).
        """
        if self.causal:
            assert rows.next_tokens is not None
            return rows.tokens, rows.next_tokens
        shards = self._shards
        assert shards.mask_id is not None
        inputs, labels = mask_tokens(
            rows.tokens.reshape(-1, length),
            sample_ids.reshape(-1),
            seed=self._seed,
            masking=self._maskings[stage],
            boundaries=self._boundaries,
            mask_id=shards.mask_id,
            special_ids=shards.special_ids,
            vocab_size=shards.vocab_size,
            documents=None if rows.documents is None else rows.documents.reshape(-1, length),
        )
        return inputs.reshape(rows.tokens.shape), labels.reshape(rows.tokens.shape)


class TrainLoader:
    """Iterates over this process's rows of the global batches, from ``tokens_consumed`` to the end of the plan.

    Process ``rank`` of ``world_size`` gets rows ``[rank * n / world_size, (rank + 1) * n / world_size)`` of each
    global batch of n rows, so that any number of processes sees the same global batches. One thread prepares up to
    ``prefetch`` groups of batches ahead. A group has up to ``GATHER_TOKENS`` tokens, but at least a batch. Exceptions
    are raised in the consumer, at the batch that they belong to. Each ``iter()`` starts anew at ``tokens_consumed``.
    ``masking`` is for objective ``mlm`` only: one for the whole run, or one for each stage of the plan. Either way the
    noise of a row depends on its stage's masking, the seed and its sample id, and on nothing else.

    Raises :class:`UserError` for a position that is not a batch's edge, rows that do not divide among the processes,
    and a tokenizer without mask token under ``mlm``.
    """

    def __init__(
        self,
        data: TrainingData,
        plan: Plan,
        *,
        objective: Objective,
        seed: int,
        masking: Masking | Sequence[Masking] | None = None,
        rank: int = 0,
        world_size: int = 1,
        tokens_consumed: int = 0,
        prefetch: int = 2,
    ) -> None:
        plan.check_position(tokens_consumed)
        for i, stage in enumerate(plan.stages):
            if stage.rows % world_size:
                raise UserError(
                    f"stage {i}: a global batch of {stage.rows} rows (batch_tokens {stage.batch_tokens} over "
                    f"seq_len {stage.seq_len}) does not divide among {world_size} processes: change one of these"
                )
        if data.block_length != plan.block_length:
            raise ValueError(f"blocks of {data.block_length} tokens do not fit a plan of {plan.block_length}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} outside a world of {world_size}")
        self.data, self.plan = data, plan
        if masking is None or isinstance(masking, Masking):
            masking = [masking] * len(plan.stages) if masking else []
        elif len(masking) != len(plan.stages):
            raise ValueError(f"{len(masking)} maskings for a plan of {len(plan.stages)} stages")
        self._noise = _Noise(data.shards, objective, seed, masking)
        self._orders = [blocks.order(seed, source) for source, blocks in enumerate(data.blocks)]
        self._rank, self._world_size = rank, world_size
        self._tokens_consumed = tokens_consumed
        self._prefetch = max(1, prefetch)
        self._running: weakref.WeakSet[Prefetcher[_Group]] = weakref.WeakSet()

    def batch_at(self, tokens_before: int) -> Batch:
        """The batch that begins at this position: a pure function, O(1)."""
        return next(self._cut(self._read(tokens_before, 1)))

    def __iter__(self) -> Iterator[Batch]:
        prefetcher = Prefetcher(self._groups(), self._prefetch)
        self._running.add(prefetcher)
        try:
            for group in prefetcher:
                for batch in self._cut(group):
                    if prefetcher.closed:
                        return
                    yield batch
        finally:
            prefetcher.close()

    def close(self) -> None:
        """Stop the prefetch threads of iterations still open; they then end."""
        for prefetcher in list(self._running):
            prefetcher.close()

    def _groups(self) -> Iterator[_Group]:
        position = self._tokens_consumed
        one_by_one = False
        while position < self.plan.total_tokens:
            batch_tokens = self.plan.stages[self.plan.stage_index(position)].batch_tokens
            limit = 1 if one_by_one else max(1, GATHER_TOKENS * self._world_size // batch_tokens)
            try:
                group = self._read(position, limit)
            except Exception:
                if limit == 1:
                    raise
                one_by_one = True  # up to the batch at fault: those before it are whole
                continue
            yield group
            position += group.part.windows * group.part.slices * batch_tokens

    def _read(self, position: int, limit: int) -> _Group:
        """Inputs and labels of the batches from this position on, at least one and at most ``limit``, in one go."""
        part = self.plan.part(position, limit)
        stage = self.plan.stages[part.stage]
        share = stage.rows // self._world_size
        own = np.arange(self._rank * share, (self._rank + 1) * share, dtype=np.int64)
        draws = (part.first_draw + np.arange(part.windows)[:, None] * stage.rows + own).reshape(-1)
        offset, width = part.first_slice * stage.seq_len, part.slices * stage.seq_len
        rows = self._gather(draws, offset, width)
        sample_ids = draws[:, None] * self.plan.block_length + np.arange(offset, offset + width, stage.seq_len)
        inputs, labels = self._noise(rows, sample_ids, stage.seq_len, part.stage)
        return _Group(part, position, inputs, labels, sample_ids, rows.documents)

    def _cut(self, group: _Group) -> Iterator[Batch]:
        """The batches of a group, as views. Left to the consumer: the thread can read the next group meanwhile."""
        import torch

        part, stage = group.part, self.plan.stages[group.part.stage]
        shape = (part.windows, -1, part.slices)
        length, tokens = stage.seq_len, stage.batch_tokens

        def views(array: np.ndarray, *row: int) -> Iterator[torch.Tensor]:
            by_slice = [t.unbind(0) for t in torch.from_numpy(array.reshape(*shape, *row)).unbind(2)]
            return itertools.chain.from_iterable(zip(*by_slice, strict=True))

        documents = itertools.repeat(None) if group.documents is None else views(group.documents, length)
        cuts = zip(
            views(group.inputs, length), views(group.labels, length), views(group.sample_ids), documents, strict=False
        )
        for number, (inputs, labels, sample_ids, document_ids) in enumerate(cuts):
            before = group.position + number * tokens
            yield Batch(inputs, labels, sample_ids, part.stage, length, tokens, before, document_ids)

    def _gather(self, draws: np.ndarray, offset: int, length: int) -> Rows:
        """Tokens ``[offset, offset + length)`` of the block of each draw (n,)."""
        causal = self._noise.causal
        sources, own = self.data.mixture.place(draws)
        parts: list[tuple[np.ndarray, Rows]] = []
        for source in range(len(self._orders)) if len(self._orders) > 1 else (0,):
            here = np.flatnonzero(sources == source)
            if len(here):
                blocks = self._orders[source].blocks(own[here])
                parts.append((here, self.data.blocks[source].read(blocks, offset, length, causal=causal)))
        return parts[0][1] if len(parts) == 1 else _interleave(parts, len(draws), length)


class _Group(NamedTuple):
    """Consecutive batches, uncut: rows of ``part.slices`` samples each, window by window."""

    part: BatchSpan
    position: int
    inputs: np.ndarray
    labels: np.ndarray
    sample_ids: np.ndarray
    documents: np.ndarray | None


def _interleave(parts: list[tuple[np.ndarray, Rows]], count: int, length: int) -> Rows:
    """Rows of several sources, each with its places among ``count``, as one."""
    tokens = np.empty((count, length), dtype=np.int64)
    next_tokens = None if parts[0][1].next_tokens is None else np.empty_like(tokens)
    packed = any(part.documents is not None for _, part in parts)
    documents = np.zeros((count, length), dtype=np.int32) if packed else None
    for here, part in parts:
        tokens[here] = part.tokens
        if next_tokens is not None and part.next_tokens is not None:
            next_tokens[here] = part.next_tokens
        if documents is not None and part.documents is not None:
            documents[here] = part.documents
    return Rows(tokens, next_tokens, documents)


def validation_batches(
    shards: ShardSet,
    *,
    objective: Objective,
    seq_len: int,
    rows: int,
    max_tokens: int,
    seed: int,
    masking: Masking | None = None,
    documents_apart: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """The same held-out rows with the same noise every time, whatever ``rows`` and ``world_size`` are.

    At most ``max_tokens`` tokens (but at least one row), as non-overlapping rows of ``seq_len`` spread evenly over
    the stream, or over packed rows of whole documents where they are to be ``documents_apart``. ``rows`` is the number
    of rows of *one process* in a batch. All processes get equally many batches of equal shape. The last ones are filled
    up with rows whose labels are all -100, so that every target counts exactly once in a sum over processes. Raises
    :class:`UserError` if the shards are shorter than one row of the stream.
    """
    noise = _Noise(shards, objective, seed, [masking] if masking else [])
    packed = PackedBlocks(shards, seq_len) if documents_apart else None
    available = packed.num_blocks if packed else (shards.num_tokens - (1 if noise.causal else 0)) // seq_len
    if available < 1:
        raise UserError(
            f"held-out shards in {shards.path} hold {shards.num_tokens} tokens, less than one row of {seq_len}"
        )
    count = min(available, max(1, max_tokens // seq_len))
    sample_ids = np.arange(count, dtype=np.int64) * available // count * seq_len

    def generate() -> Iterator[Batch]:
        import torch

        per_batch = rows * world_size
        for begin in range(0, count, per_batch):
            mine = begin + rank * rows + np.arange(rows)
            filler = mine >= count
            chosen = sample_ids[np.where(filler, 0, mine)]
            if packed:
                text = packed.read(chosen // seq_len, 0, seq_len, causal=noise.causal)
            else:
                tokens = shards.read(chosen, seq_len + noise.causal)
                text = Rows(tokens[:, :seq_len], tokens[:, 1:].copy() if noise.causal else None, None)
            inputs, labels = noise(text, chosen, seq_len)
            labels[filler] = IGNORE
            yield Batch(
                input_ids=torch.from_numpy(inputs),
                labels=torch.from_numpy(labels),
                sample_ids=torch.from_numpy(chosen),
                stage=0,
                seq_len=seq_len,
                tokens=min(per_batch, count - begin) * seq_len,
                tokens_before=begin * seq_len,
                document_ids=None if text.documents is None else torch.from_numpy(text.documents),
            )

    return generate()
