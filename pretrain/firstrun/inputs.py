"""What a first configuration is chosen for: a corpus in numbers, and a machine for some hours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.shards.shardset import ShardSet
from data_pipeline.shards.summary import Lengths
from data_pipeline.tokenization.roles import check_objective
from pretrain.machine import PEAK_FLOPS

MARGIN = 0.1
"""Share of the memory that stays free, as ``nystrom plan`` has it by default."""
TAKEN_FOR = (
    (0, "T4"),
    (23, "L4"),
    (39, "A100"),
    (90, "H100"),
    (140, "H200"),
    (180, "B200"),
)
"""From so many GiB on, the slowest GPU of data centres that has them: what is assumed where no GPU is named."""


@dataclass(frozen=True)
class Corpus:
    """Prepared text in numbers."""

    train: str
    """Folder of the shards, as it stands in the configuration."""
    tokens: int
    documents: int
    vocab_size: int
    median: int
    """Tokens that half of the documents do not exceed."""
    p90: int
    """Tokens that nine in ten do not exceed."""
    valid: str | None = None
    held_out: int | None = None
    """Tokens of the held-out shards."""


@dataclass(frozen=True)
class Machine:
    """Equal processes for some hours."""

    processes: int
    memory: float
    """GiB of one process: of its GPU, or its share of the host's memory."""
    flops: float
    """FLOP/s that one process reaches in training, not its peak."""
    hours: float
    on_gpu: bool
    speed: str
    """Where that number is from, in words: ``30% of the 312 TFLOP/s of an A100``."""
    gpu: str | None = None
    """A name in :data:`pretrain.machine.PEAK_FLOPS`, if that is where the peak is from."""


def read_corpus(train: Path, valid: Path | None, objective: str) -> Corpus:
    """Open the shards and count how long their documents are; only the index of each shard is read.

    Raises :class:`UserError` for shards that are missing or damaged, made with two tokenizers, or without a mask token
    where ``objective`` is mlm.
    """
    shards = ShardSet.open(train)
    check_objective(shards.manifest.special_ids, objective, f"shards in {train}")
    lengths = Lengths()
    for shard in shards.manifest.shards:
        lengths.add(np.diff(shards.document_ends(shard.index).astype(np.int64), prepend=0))
    if not lengths.documents:
        raise UserError(f"shards in {train} hold no document: prepare text first")
    held_out = None
    if valid is not None:
        if valid.resolve() == train.resolve():
            raise UserError(f"--valid {valid} is the training text: a held-out loss needs other text")
        held_out = ShardSet.open(valid, expect_tokenizer=shards.tokenizer_hash).num_tokens
    return Corpus(
        train=str(train),
        tokens=shards.num_tokens,
        documents=shards.num_documents,
        vocab_size=shards.vocab_size,
        median=lengths.percentile(50),
        p90=lengths.percentile(90),
        valid=None if valid is None else str(valid),
        held_out=held_out,
    )


def gpus(
    count: int, memory: float, hours: float, mfu: float, name: str | None = None, peak: float | None = None
) -> Machine:
    """``count`` GPUs of ``memory`` GiB, of which a share ``mfu`` of the peak is reached.

    ``name``: a GPU whose peak is known; left out, the slowest one with this memory is assumed. ``peak``: FLOP/s, which
    wins. Raises :class:`UserError` for an unknown name.
    """
    if peak is not None:
        return Machine(count, memory, mfu * peak, hours, True, f"{mfu:.0%} of {peak / 1e12:,.0f} TFLOP/s")
    known = {each.lower(): each for each in PEAK_FLOPS}
    assumed = name is None
    chosen = [gpu for least, gpu in TAKEN_FOR if memory >= least][-1] if name is None else known.get(name.lower())
    if chosen is None:
        raise UserError(f"--gpu {name}: its peak is not known; give --peak-flops, or one of {', '.join(PEAK_FLOPS)}")
    reached = f"{mfu:.0%} of the {PEAK_FLOPS[chosen] / 1e12:,.0f} TFLOP/s of {chosen}"
    words = f"{reached}, assumed from the memory (--gpu names another)" if assumed else reached
    return Machine(count, memory, mfu * PEAK_FLOPS[chosen], hours, True, words, chosen)
