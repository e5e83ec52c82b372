"""What a run works on: its sources of text opened and checked against each other, and what identifies them together."""

from __future__ import annotations

import json
from dataclasses import dataclass

import xxhash

from data_pipeline.batches.blocks import Blocks, StreamBlocks
from data_pipeline.batches.mixture import TrainingData
from data_pipeline.batches.order import Plan
from data_pipeline.errors import UserError
from data_pipeline.shards.shardset import ShardSet
from pretrain.config import RunConfig
from pretrain.curriculum.plan import build_mixture, slice_length

SAMPLED_BLOCKS = 8
"""Blocks of 4 MiB of each shard folder that a start reads and compares."""


@dataclass(frozen=True)
class Inputs:
    """A configuration with nothing left open but the precision, and the data it names, opened."""

    config: RunConfig  # model.vocab_size is set; precision may be auto until all processes have met
    plan: Plan
    train: TrainingData
    fingerprint: str  # of the training data
    valid: ShardSet | None


def open_sources(config: RunConfig, plan: Plan, expect_tokenizer: str | None = None) -> TrainingData:
    """Open the sources of ``data.train`` as blocks of the run's packing.

    Raises :class:`UserError` for folders that are missing, damaged, shorter than a block or made with another
    tokenizer than ``expect_tokenizer`` (a hash) or than each other, and for weights that cannot be.
    """
    sources = config.data.sources
    mixture = build_mixture(config, plan)
    blocks: list[Blocks] = []
    for source in sources:
        shards = ShardSet.open(source.path, expect_tokenizer=expect_tokenizer)
        stream = StreamBlocks(shards, plan.block_length)  # also to refuse what is shorter than a block
        if config.data.packing == "stream":
            blocks.append(stream)
            continue
        from data_pipeline.batches.packing import PackedBlocks

        blocks.append(
            PackedBlocks(
                shards,
                plan.block_length,
                slice_length=slice_length(plan),
                max_padding=config.data.max_padding,
            )
        )
    return TrainingData(tuple(source.name for source in sources), tuple(blocks), mixture)


def check_sample(shards: ShardSet) -> None:
    """Compare up to ``SAMPLED_BLOCKS`` blocks of the token files, spread evenly, with the checksums of the manifest.

    The manifest's own checksum, by which a resume tells the text, and the sizes do not show files that were overwritten
    in place. Raises :class:`UserError` that names the file. 32 MiB are read; all is by ``nystrom data verify``.
    """
    size = shards.manifest.block_bytes
    blocks = [(entry.tokens, number) for entry in shards.manifest.shards for number in range(len(entry.tokens.blocks))]
    chosen = {round(i * (len(blocks) - 1) / (SAMPLED_BLOCKS - 1)) for i in range(SAMPLED_BLOCKS)}
    for entry, number in (blocks[i] for i in sorted(chosen)):
        path = shards.path / entry.name
        try:
            with open(path, "rb") as file:
                file.seek(number * size)
                data = file.read(size)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
        if xxhash.xxh3_64_hexdigest(data) != entry.blocks[number]:
            raise UserError(
                f"{path} is not what its manifest says: block {number} of {size} bytes has other contents. It was "
                "overwritten in place or is damaged: prepare the text again (`nystrom data verify` lists every fault)"
            )


def fingerprint(config: RunConfig, plan: Plan, data: TrainingData) -> str:
    """What the order of the data depends on besides plan, seed and weights, as a hash (hex).

    For one source read as a stream it is the fingerprint of its shards.
    """
    if len(data.blocks) == 1 and config.data.packing == "stream":
        return data.shards.fingerprint
    parts: dict[str, object] = {
        "sources": [(name, blocks.shards.fingerprint) for name, blocks in zip(data.names, data.blocks, strict=True)],
        "packing": config.data.packing,
    }
    if config.data.packing == "documents":
        parts |= {
            "block_length": plan.block_length,
            "slice_length": slice_length(plan),
            "max_padding": config.data.max_padding,
        }
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True).encode())
