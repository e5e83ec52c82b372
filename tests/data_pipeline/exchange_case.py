"""Token files of other programs, written byte by byte from their published layouts."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

Documents = Sequence[Sequence[Sequence[int]]]  # documents of sequences of ids
MEGATRON_CODES = {"uint8": 1, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}


def write_megatron(prefix: Path, documents: Documents, dtype: str = "uint16") -> Path:
    """NAME.bin and NAME.idx, as Megatron-LM's IndexedDatasetBuilder lays them out; returns the .bin."""
    sequences = [ids for document in documents for ids in document]
    firsts = [0]
    for document in documents:
        firsts.append(firsts[-1] + len(document))
    width = np.dtype(dtype).itemsize
    pointers = [width * sum(len(ids) for ids in sequences[:number]) for number in range(len(sequences))]
    index = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", MEGATRON_CODES[dtype])
    index += struct.pack("<Q", len(sequences)) + struct.pack("<Q", len(firsts))
    index += struct.pack(f"<{len(sequences)}i", *map(len, sequences))
    index += struct.pack(f"<{len(sequences)}q", *pointers) + struct.pack(f"<{len(firsts)}q", *firsts)
    prefix.with_name(prefix.name + ".idx").write_bytes(index)
    tokens = prefix.with_name(prefix.name + ".bin")
    tokens.write_bytes(b"".join(np.array(ids, dtype=np.dtype(dtype).newbyteorder("<")).tobytes() for ids in sequences))
    return tokens


def write_datatrove(
    path: Path,
    documents: Sequence[Sequence[int]],
    size: int = 2,
    *,
    index: bool = True,
    metadata: bool = False,
    loss: Sequence[int] | None = None,
) -> Path:
    """NAME.ds and what lies beside it, as datatrove's TokenizedFile lays them out."""
    ids = [id_ for document in documents for id_ in document]
    path.write_bytes(struct.pack(f"<{len(ids)}{'H' if size == 2 else 'I'}", *ids))
    ends = np.cumsum([len(document) for document in documents]).tolist()
    if index:
        path.with_name(path.name + ".index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))
    if metadata:
        path.with_name(path.name + ".metadata").write_text(f"some/tokenizer|{size}\n{len(ids)}\n{len(ids)} T")
    if loss is not None:
        path.with_name(path.name + ".loss").write_bytes(struct.pack(f"<{len(loss)}?", *map(bool, loss)))
    return path
