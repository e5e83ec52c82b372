"""Made-up tokens, written once in the form that each contender reads."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.files import hash_file, write_atomic
from data_pipeline.shards.manifest import BLOCK_BYTES, Manifest
from data_pipeline.shards.shardset import ShardSet
from data_pipeline.shards.writer import UnitWriter, token_dtype
from data_pipeline.tokenization.tokenizer import TOKENIZER_FILES, Tokenizer
from data_pipeline.tokenization.training import train_tokenizer

VOCAB_SIZE = 1000
MEAN_DOCUMENT = 600  # tokens, log-normal
SOURCES = 3


@dataclass(frozen=True)
class Corpus:
    """Where the tokens are, and the shape of what is asked for."""

    shards: Path
    """A folder of shards with ``rows`` rows of ``seq_len`` tokens (and one token)."""
    sources: tuple[Path, ...]
    """Folders with a third of that each, for the mixture."""
    flat: Path
    """The tokens of ``shards`` as one raw uint16 file, in a folder of its own."""
    rows: int
    seq_len: int
    batch_rows: int


def write_corpus(folder: Path, rows: int, seq_len: int, batch_rows: int, shard_tokens: int) -> Corpus:
    """Write everything below ``folder``; deterministic."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 7))) for _ in range(3000)]
    tokenizer = train_tokenizer((" ".join(draw.choices(words, k=50)) for _ in range(400)), VOCAB_SIZE)
    tokens = rows * seq_len + 1
    write_shards(folder / "shards", tokenizer, tokens, 0, shard_tokens)
    sources = tuple(folder / f"source{i}" for i in range(SOURCES))
    for i, source in enumerate(sources):
        write_shards(source, tokenizer, max(tokens // SOURCES, 2 * seq_len), i + 1, shard_tokens)
    (folder / "flat").mkdir()
    flat = folder / "flat" / "tokens.ds"
    with open(flat, "wb") as file:
        for chunk in ShardSet.open(folder / "shards").chunks():
            file.write(chunk.tobytes())
    return Corpus(folder / "shards", sources, flat, rows, seq_len, batch_rows)


def write_shards(folder: Path, tokenizer: Tokenizer, tokens: int, seed: int, shard_tokens: int) -> None:
    """A folder of shards of random documents, through the writer of ``nystrom data prepare``."""
    folder.mkdir()
    draw = np.random.default_rng(seed)
    special = set(tokenizer.special_ids)
    ordinary = np.array([i for i in range(tokenizer.vocab_size) if i not in special], dtype=np.uint16)
    pool = draw.choice(ordinary, 1 << 20)
    writer = UnitWriter(
        folder, 0, dtype=token_dtype(tokenizer.vocab_size), shard_tokens=shard_tokens, eos_id=tokenizer.eos_id
    )
    documents, left = 0, tokens
    while left > 0:
        size = int(np.clip(draw.lognormal(np.log(MEAN_DOCUMENT) - 0.5, 1.0), 2, len(pool) // 2))
        start = int(draw.integers(0, len(pool) - size))
        writer.add(pool[start : start + min(size, left) - 1], "made up")
        left -= min(size, left)
        documents += 1
    shards = writer.finish()
    tokenizer.save(folder)
    roles = tokenizer.roles.as_dict()
    manifest = Manifest(
        settings={"made_up": seed},
        num_tokens=sum(shard.num_tokens for shard in shards),
        num_documents=documents,
        text_bytes=0,
        empty_documents=0,
        bad_records={},
        dropped_documents={},
        dtype=token_dtype(tokenizer.vocab_size),
        vocab_size=tokenizer.vocab_size,
        tokenizer_hash=tokenizer.hash,
        special_ids=roles,
        other_special_ids=tuple(sorted(special - set(roles.values()))),
        tokenizer=tuple(hash_file(folder, name, BLOCK_BYTES) for name in TOKENIZER_FILES),
        reports=(),
        shards=shards,
        inputs=(),
    )
    write_atomic(folder / "manifest.json", manifest.to_bytes())
