"""From a position in the run to batches of tensors: gather, mask, prefetch. The only state is ``tokens_consumed``."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from data_pipeline.batches.masking import IGNORE, check_shares, mask_tokens
from data_pipeline.batches.order import BlockOrder, Plan
from data_pipeline.errors import UserError
from data_pipeline.shards.shardset import ShardSet

if TYPE_CHECKING:
    import torch

Objective = Literal["mlm", "clm"]


@dataclass(frozen=True)
class Batch:
    """One process's part of a global batch.

    ``input_ids`` (rows, seq_len) and ``labels`` (rows, seq_len), CPU int64; labels are -100 where there is no target.
    Causal labels are the next tokens already (``labels[t]`` follows ``input_ids[t]``): the model does not shift.
    ``sample_ids`` (rows,) int64, a row's position in the training order, name rows in error messages. ``tokens``
    counts the *global* batch, ``tokens_before`` what was consumed before it: the state to save after training on the
    batch is ``tokens_before + tokens``.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    sample_ids: torch.Tensor
    stage: int
    seq_len: int
    tokens: int
    tokens_before: int


class _Rows:
    """Rows of the stream with inputs and labels for one objective."""

    def __init__(self, shards: ShardSet, objective: Objective, seed: int, masking: Mapping[str, float] | None) -> None:
        if objective not in ("mlm", "clm"):
            raise UserError(f"objective must be 'mlm' or 'clm', got {objective!r}")
        if objective == "mlm":
            if masking is None:
                raise UserError("objective mlm needs masking: rate, mask_share and random_share")
            check_shares(**masking)
        self._shards = shards
        self._objective = objective
        self._seed = seed
        self._masking = dict(masking or {})

    def get(self, starts: np.ndarray, length: int, sample_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(inputs, labels), each (len(starts), length) int64."""
        if self._objective == "clm":
            tokens = self._shards.read(starts, length + 1)
            return np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:])
        return mask_tokens(
            self._shards.read(starts, length),
            sample_ids,
            seed=self._seed,
            mask_id=self._shards.mask_id,
            special_ids=self._shards.special_ids,
            vocab_size=self._shards.vocab_size,
            **self._masking,
        )


class TrainLoader:
    """Iterates over this process's rows of the global batches, from ``tokens_consumed`` to the end of the plan.

    Process ``rank`` of ``world_size`` gets rows ``[rank * n / world_size, (rank + 1) * n / world_size)`` of each
    global batch of n rows, so that any number of processes sees the same global batches. One thread prepares up to
    ``prefetch`` batches ahead; its exceptions are raised in the consumer. Each ``iter()`` starts anew at
    ``tokens_consumed``. ``masking`` holds the values ``rate``, ``mask_share`` and ``random_share`` of
    :func:`data_pipeline.batches.masking.mask_tokens` (objective ``mlm`` only).

    Raises :class:`UserError` for a position that is not a batch's edge, rows that do not divide among the processes,
    and shards shorter than one block.
    """

    def __init__(
        self,
        shards: ShardSet,
        plan: Plan,
        *,
        objective: Objective,
        seed: int,
        masking: Mapping[str, float] | None = None,
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
        # One token more than the blocks: the last causal target of the last block lies behind it.
        num_blocks = (shards.num_tokens - 1) // plan.block_length
        if num_blocks < 1:
            raise UserError(
                f"shards in {shards.path} hold {shards.num_tokens} tokens, less than one block of {plan.block_length} "
                "(and a token): prepare more text or shorten the longest seq_len (or block_length)"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} outside a world of {world_size}")
        self.plan = plan
        self.num_blocks = num_blocks
        self._rows = _Rows(shards, objective, seed, masking)
        self._order = BlockOrder(num_blocks, seed)
        self._rank, self._world_size = rank, world_size
        self._tokens_consumed = tokens_consumed
        self._prefetch = max(1, prefetch)
        self._running: weakref.WeakSet[_Prefetcher] = weakref.WeakSet()

    def batch_at(self, tokens_before: int) -> Batch:
        """The batch that begins at this position: a pure function, O(1)."""
        index = self.plan.stage_index(tokens_before)
        stage = self.plan.stages[index]
        draws, slices = self.plan.rows(tokens_before)
        share = stage.rows // self._world_size
        mine = slice(self._rank * share, (self._rank + 1) * share)
        draws, offsets = draws[mine], slices[mine] * stage.seq_len
        sample_ids = draws * self.plan.block_length + offsets
        starts = self._order.blocks(draws) * self.plan.block_length + offsets
        inputs, labels = self._rows.get(starts, stage.seq_len, sample_ids)
        return _batch(inputs, labels, sample_ids, index, stage.batch_tokens, tokens_before)

    def _batches(self) -> Iterator[Batch]:
        position = self._tokens_consumed
        while position < self.plan.total_tokens:
            batch = self.batch_at(position)
            yield batch
            position += batch.tokens

    def __iter__(self) -> Iterator[Batch]:
        prefetcher = _Prefetcher(self._batches(), self._prefetch)
        self._running.add(prefetcher)
        try:
            yield from prefetcher
        finally:
            prefetcher.close()

    def close(self) -> None:
        """Stop the prefetch threads of iterations still open; they then end."""
        for prefetcher in list(self._running):
            prefetcher.close()


class _Prefetcher:
    """Runs an iterator in a thread, at most ``depth`` items ahead."""

    def __init__(self, source: Iterator[Batch], depth: int) -> None:
        self._state = _Shared()
        self._thread = threading.Thread(
            target=_Prefetcher._work, args=(source, depth, self._state), name="prefetch", daemon=True
        )
        self._thread.start()
        # Also at interpreter exit, before daemon threads are torn down in the middle of a gather.
        self._finalizer = weakref.finalize(self, _Prefetcher._stop, self._state, self._thread)

    @staticmethod
    def _work(
        source: Iterator[Batch], depth: int, state: _Shared
    ) -> None:  # no reference to self: it must stay collectable
        error: BaseException | None = None
        try:
            for item in source:
                with state.changed:
                    state.changed.wait_for(lambda: state.stopped or len(state.items) < depth)
                    if state.stopped:
                        return
                    state.items.append(item)
                    state.changed.notify_all()
        except BaseException as caught:  # handed to the consumer, whatever it is
            error = caught
        finally:
            with state.changed:
                state.error, state.finished = error, True
                state.changed.notify_all()

    @staticmethod
    def _stop(state: _Shared, thread: threading.Thread) -> None:
        with state.changed:
            state.stopped = True
            state.items.clear()
            state.changed.notify_all()
        if thread is not threading.current_thread():
            thread.join()

    def __iter__(self) -> Iterator[Batch]:
        state = self._state
        while True:
            with state.changed:
                state.changed.wait_for(lambda: bool(state.items) or state.finished or state.stopped)
                if state.items:
                    item = state.items.popleft()
                    state.changed.notify_all()
                elif state.error is not None:
                    raise state.error
                else:
                    return
            yield item

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self._finalizer()


class _Shared:
    """What the consumer and the thread of a :class:`_Prefetcher` share."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.items: deque[Batch] = deque()
        self.error: BaseException | None = None
        self.finished = False
        self.stopped = False


def validation_batches(
    shards: ShardSet,
    *,
    objective: Objective,
    seq_len: int,
    rows: int,
    max_tokens: int,
    seed: int,
    masking: Mapping[str, float] | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """The same held-out rows with the same noise every time, whatever ``rows`` and ``world_size`` are.

    At most ``max_tokens`` tokens (but at least one row), as non-overlapping rows of ``seq_len`` spread evenly over
    the stream. ``rows`` is the number of rows of *one process* in a batch. All processes get equally many batches of
    equal shape; what is left over at the end is filled with rows whose labels are all -100, so that every target
    counts exactly once in a sum over processes. Raises :class:`UserError` if the shards are shorter than one row.
    """
    source = _Rows(shards, objective, seed, masking)
    available = (shards.num_tokens - (1 if objective == "clm" else 0)) // seq_len
    if available < 1:
        raise UserError(
            f"held-out shards in {shards.path} hold {shards.num_tokens} tokens, less than one row of {seq_len}"
        )
    count = min(available, max(1, max_tokens // seq_len))
    sample_ids = np.arange(count, dtype=np.int64) * available // count * seq_len

    def generate() -> Iterator[Batch]:
        per_batch = rows * world_size
        for begin in range(0, count, per_batch):
            mine = begin + rank * rows + np.arange(rows)
            filler = mine >= count
            chosen = sample_ids[np.where(filler, 0, mine)]
            inputs, labels = source.get(chosen, seq_len, chosen)
            labels[filler] = IGNORE
            real = min(per_batch, count - begin)
            yield _batch(inputs, labels, chosen, 0, real * seq_len, begin * seq_len)

    return generate()


def _batch(
    inputs: np.ndarray, labels: np.ndarray, sample_ids: np.ndarray, stage: int, tokens: int, tokens_before: int
) -> Batch:
    import torch

    return Batch(
        input_ids=torch.from_numpy(inputs),
        labels=torch.from_numpy(labels),
        sample_ids=torch.from_numpy(sample_ids),
        stage=stage,
        seq_len=inputs.shape[1],
        tokens=tokens,
        tokens_before=tokens_before,
    )
