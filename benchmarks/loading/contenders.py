"""Who competes: each makes shuffled batches of int64 rows from the same tokens, without end."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from benchmarks.loading.corpus import SOURCES, Corpus
from data_pipeline.batches.blocks import Blocks, StreamBlocks
from data_pipeline.batches.loader import Objective, TrainLoader
from data_pipeline.batches.masking import Masking
from data_pipeline.batches.mixture import MixturePlan, TrainingData, quotas
from data_pipeline.batches.order import Plan, StageSpec
from data_pipeline.shards.shardset import ShardSet

WEIGHTS = (0.5, 0.3, 0.2)
SEED = 1
ENDLESS = 1 << 50  # tokens
WARM_UP = 256  # batches before the clock starts: what a thread had ready is gone by then


@dataclass(frozen=True)
class Contender:
    """``batches(corpus)`` yields batches of ``corpus.batch_rows`` rows; ``needs`` is a package beyond the project's."""

    title: str
    batches: Callable[[Corpus], Generator[Any, None, None]]
    needs: str | None = None


def order(corpus: Corpus) -> Iterator[np.ndarray]:
    """Row numbers of each batch, (batch_rows,) int64, an epoch after the other, drawn beforehand."""
    draw = np.random.default_rng(SEED)
    while True:
        permutation = draw.permutation(corpus.rows)
        for start in range(0, corpus.rows - corpus.batch_rows + 1, corpus.batch_rows):
            yield permutation[start : start + corpus.batch_rows]


def bare(corpus: Corpus) -> Generator[Any, None, None]:
    """The floor: a memory map indexed with rows known beforehand, and widened to int64. No labels, no checks."""
    rows = np.memmap(corpus.flat, dtype="<u2", mode="r")[: corpus.rows * corpus.seq_len].reshape(-1, corpus.seq_len)
    for chosen in order(corpus):
        yield rows[chosen].astype(np.int64)


def loader(
    corpus: Corpus, objective: Objective = "clm", *, packed: bool = False, mixed: bool = False, samples: int = 0
) -> TrainLoader:
    """Our loader, opened from the folder on, as it stands after ``samples`` rows."""

    def open_blocks(path: Any) -> Blocks:
        shards = ShardSet.open(path)
        if not packed:
            return StreamBlocks(shards, corpus.seq_len)
        from data_pipeline.batches.packing import PackedBlocks

        return PackedBlocks(shards, corpus.seq_len)

    if mixed:
        mixture = MixturePlan([(0, quotas(WEIGHTS))])
        names = tuple(f"source{i}" for i in range(SOURCES))
        data = TrainingData(names, tuple(open_blocks(path) for path in corpus.sources), mixture)
    else:
        data = TrainingData.single(open_blocks(corpus.shards))
    batch_tokens = corpus.batch_rows * corpus.seq_len
    plan = Plan([StageSpec(corpus.seq_len, ENDLESS)], block_length=corpus.seq_len, batch_tokens=batch_tokens)
    position = samples // corpus.batch_rows * batch_tokens
    return TrainLoader(data, plan, objective=objective, seed=SEED, masking=Masking(), tokens_consumed=position)


def ours(**options: Any) -> Callable[[Corpus], Generator[Any, None, None]]:
    """End to end: order, gather, checks, labels or masks, and the hand-over from the thread."""

    def batches(corpus: Corpus) -> Generator[Any, None, None]:
        made = loader(corpus, **options)
        try:
            yield from made
        finally:
            made.close()

    return batches


def datasets_arrow(corpus: Corpus) -> Generator[Any, None, None]:
    """A memory-mapped Arrow file of fixed-size rows, a list of rows at a time, through its NumPy format."""
    import datasets
    import pyarrow as pa

    file = corpus.flat.with_name("rows.arrow")
    if not file.exists():
        tokens = np.fromfile(corpus.flat, dtype="<u2", count=corpus.rows * corpus.seq_len)
        rows = pa.FixedSizeListArray.from_arrays(pa.array(tokens), corpus.seq_len)
        table = pa.table({"input_ids": rows})
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=10_000)
    data = datasets.Dataset.from_file(str(file)).with_format("numpy")
    for chosen in order(corpus):
        yield data[chosen.tolist()]["input_ids"].astype(np.int64)


def datatrove_folder(corpus: Corpus) -> Generator[Any, None, None]:
    """datatrove's map-style dataset of .ds files, row by row, stacked as DataLoader's default does."""
    import torch
    from datatrove.utils.dataset import DatatroveFolderDataset

    data = DatatroveFolderDataset(str(corpus.flat.parent), corpus.seq_len - 1, filename_pattern="*.ds")
    for chosen in order(corpus):
        yield torch.stack([data[int(row)]["input_ids"] for row in chosen])


def grain_map(corpus: Corpus) -> Generator[Any, None, None]:
    """grain's MapDataset over the memory map, shuffled and batched by its own means, without worker processes."""
    import grain

    rows = np.memmap(corpus.flat, dtype="<u2", mode="r")[: corpus.rows * corpus.seq_len].reshape(-1, corpus.seq_len)
    data = grain.MapDataset.source(rows).map(lambda row: np.asarray(row, dtype=np.int64))
    yield from data.shuffle(seed=SEED).repeat().batch(corpus.batch_rows).to_iter_dataset()


def litdata_tokens(corpus: Corpus) -> Generator[Any, None, None]:
    """litdata's chunks of tokens, shuffled and cut into rows by its own dataset, in this process."""
    import litdata
    import torch

    folder = corpus.flat.parent.with_name("litdata")
    if not folder.exists():
        from litdata.streaming.writer import BinaryWriter

        folder.mkdir()
        writer = BinaryWriter(
            str(folder), chunk_size=min(1 << 25, corpus.rows * corpus.seq_len), item_loader=litdata.TokensLoader()
        )
        tokens = np.fromfile(corpus.flat, dtype="<u2", count=corpus.rows * corpus.seq_len)
        for index, row in enumerate(tokens.reshape(-1, corpus.seq_len)):
            writer[index] = torch.from_numpy(row)
        writer.done()
        writer.merge()
    data = litdata.StreamingDataset(
        str(folder), item_loader=litdata.TokensLoader(block_size=corpus.seq_len), shuffle=True, seed=SEED
    )
    while True:
        yield from (
            batch.long() for batch in litdata.StreamingDataLoader(data, batch_size=corpus.batch_rows, num_workers=0)
        )


def mosaic_streaming(corpus: Corpus) -> Generator[Any, None, None]:
    """mosaicml-streaming's MDS shards, shuffled by its own dataset, stacked by DataLoader in this process."""
    import torch
    from streaming import MDSWriter, StreamingDataset

    folder = corpus.flat.parent.with_name("mds")
    if not folder.exists():
        tokens = np.fromfile(corpus.flat, dtype="<u2", count=corpus.rows * corpus.seq_len)
        with MDSWriter(out=str(folder), columns={"tokens": f"ndarray:uint16:{corpus.seq_len}"}) as writer:
            for row in tokens.reshape(-1, corpus.seq_len):
                writer.write({"tokens": row})
    data = StreamingDataset(local=str(folder), shuffle=True, shuffle_seed=SEED, batch_size=corpus.batch_rows)
    while True:
        for batch in torch.utils.data.DataLoader(data, batch_size=corpus.batch_rows):
            yield batch["tokens"].long()


CONTENDERS = {
    "bare": Contender("numpy.memmap, rows known beforehand", bare),
    "clm": Contender("ours, causal", ours()),
    "mlm": Contender("ours, masked", ours(objective="mlm")),
    "packed": Contender("ours, packed documents", ours(packed=True)),
    "mixture": Contender(f"ours, mixture of {SOURCES}", ours(mixed=True)),
    "datasets": Contender("datasets, Arrow", datasets_arrow, "datasets"),
    "datatrove": Contender("datatrove, .ds folder", datatrove_folder, "datatrove"),
    "grain": Contender("grain, MapDataset", grain_map, "grain"),
    "litdata": Contender("litdata, tokens", litdata_tokens, "litdata"),
    "streaming": Contender("mosaicml-streaming, MDS", mosaic_streaming, "streaming"),
}
FIRST_BATCH: dict[str, dict[str, Any]] = {"clm": {}, "mlm": {"objective": "mlm"}, "packed": {"packed": True},
                                          "mixture": {"mixed": True}}  # fmt: skip


def turn(name: str, corpus: Corpus, most: int, most_seconds: float) -> float:
    """Batches a second of one contender, over at most so many batches or seconds."""
    batches = CONTENDERS[name].batches(corpus)
    for _ in islice(batches, min(WARM_UP, most)):
        pass
    count, began = 0, time.perf_counter()
    for _ in islice(batches, most):
        count += 1
        if count % 16 == 0 and time.perf_counter() - began > most_seconds:
            break
    seconds = time.perf_counter() - began
    batches.close()
    return count / seconds
