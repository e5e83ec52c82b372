"""Pieces tile their files, give the documents of the whole whatever their size, and have a digest of their bytes."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import pickle
import random
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
import zstandard

from data_pipeline.errors import UserError
from data_pipeline.sources.corpus import open_corpus
from data_pipeline.sources.documents import Document, read_piece
from data_pipeline.sources.pieces import Piece
from data_pipeline.sources.reading import Reading
from data_pipeline.sources.streams import piece_digest, stdin_chunks
from data_pipeline.sources.tally import Tally

LINES = Reading(text_unit="line")


def pieces_of(path: Path, target_bytes: int, reading: Reading) -> list[Piece]:
    pieces = open_corpus([path]).pieces(target_bytes, reading)
    assert pieces[0].begin == 0
    assert pieces[-1].end == path.stat().st_size
    assert all(a.end == b.begin for a, b in itertools.pairwise(pieces))
    assert all(piece.total == path.stat().st_size for piece in pieces)
    return pieces


def read(pieces: list[Piece], reading: Reading) -> tuple[list[Document], Tally]:
    """All documents, each piece in a tally of its own as in processes of their own, and the digests checked."""
    documents: list[Document] = []
    both = Tally(max_bad_fraction=1)
    for piece in pieces:
        tally = Tally(max_bad_fraction=1)
        documents += read_piece(pickle.loads(pickle.dumps(piece)), reading, tally)
        data = Path(piece.location).read_bytes()[piece.begin : piece.end]
        assert tally.digest == piece_digest(piece) == xxhash.xxh3_128_hexdigest(data)
        both.documents += tally.documents
        both.empty += tally.empty
        both.records += tally.records
        both.text_bytes += tally.text_bytes
        both.bad += tally.bad
        both.bad_samples += tally.located()
    return documents, both


TEXT = "\ufeff" + "ein ä\r\n\r\n\nzwei \u2028 Zeilen\n😀😀\n   \nlast, without end"
RECORDS = (
    '\ufeff{"text": "erste ä"}\r\n\r\n\n{"text": "😀\\n😀"}\n{"text": null}\n{"text": "x"}\n'
    '[1]\n{"text": "\\ud83d"}\n{"text": "broken\n\n{"body": "no such field"}\n{"text": 7}\n{"text": "last ü"}'
)


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n\n"])
@pytest.mark.parametrize(("name", "contents", "reading"), [("a.txt", TEXT, LINES), ("a.jsonl", RECORDS, Reading())])
def test_pieces_of_every_size_give_the_same(
    tmp_path: Path, name: str, contents: str, reading: Reading, end: str
) -> None:
    path = tmp_path / name
    data = (contents + end).encode()
    path.write_bytes(data.replace(b'"x"', b'"\xff"') if end == "\n" else data)
    size = path.stat().st_size
    whole, tally = read(pieces_of(path, size, reading), reading)
    expected = TEXT.removeprefix("\ufeff").replace("\r\n", "\n").split("\n")
    if name == "a.txt":
        assert [d.text for d in whole] == [line for line in expected if line.strip()]
    else:
        texts = ["erste ä", "😀\n😀", "x", "last ü"] if end != "\n" else ["erste ä", "😀\n😀", "last ü"]
        assert [d.text for d in whole] == texts
        faults = {"not an object": 7, "surrogate": 8, "not JSON": 9, "no field": 11, "not text": 12}
        if end == "\n":
            faults["not UTF-8"] = 6
        assert {s.reason: s.record for s in tally.bad_samples} == faults
    for target in range(1, size):
        documents, counts = read(pieces_of(path, target, reading), reading)
        assert [d._replace(record=None) for d in documents] == [d._replace(record=None) for d in whole]
        assert counts == tally  # in particular the line and offset of each broken record


def test_any_cut_gives_the_same_also_across_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cuts that no plan makes, and lines much longer than what is read at a time."""
    monkeypatch.setattr("data_pipeline.sources.streams._BLOCK", 7)
    rng = random.Random(3)
    lines = ["ü" * rng.choice([0, 1, 3, 20]) + rng.choice(["", "\r"]) for _ in range(40)]
    path = tmp_path / "a.txt"
    path.write_bytes("\n".join(lines).encode())
    size = path.stat().st_size
    expected = [text for line in lines if (text := line.removesuffix("\r"))]
    for _ in range(200):
        edges = sorted({0, size, *rng.sample(range(size), rng.randrange(6))})
        pieces = [
            Piece("a.txt", str(path), "lines", begin, end, None, end - begin, size)
            for begin, end in itertools.pairwise(edges)
        ]
        assert [d.text for d in read(pieces, LINES)[0]] == expected


def test_only_what_can_be_entered_in_the_middle_is_cut(tmp_path: Path) -> None:
    data = b"".join(b'{"text": "%d"}\n' % i for i in range(1000))
    for name, contents in (
        ("a.jsonl", data),
        ("b.jsonl.gz", gzip.compress(data)),
        ("c.jsonl.zst", zstandard.compress(data)),
        ("d.csv", b"text\n" + data),
        ("e.txt", data),
        ("f.jsonl", b""),
    ):
        (tmp_path / name).write_bytes(contents)
    for reading, lines in ((Reading(), 1), (LINES, 10)):
        pieces = open_corpus([tmp_path]).pieces(len(data) // 10 + 1, reading)
        count = {name: sum(p.name == name for p in pieces) for name in sorted({p.name for p in pieces})}
        expected = {"a.jsonl": 10, "b.jsonl.gz": 1, "c.jsonl.zst": 1, "d.csv": 1, "e.txt": lines, "f.jsonl": 1}
        assert count == expected
        assert all(abs(p.size - len(data) / 10) <= 1 for p in pieces if p.name == "a.jsonl")
    with pytest.raises(UserError, match="at least one byte"):
        open_corpus([tmp_path]).pieces(0)


def test_the_plan_does_not_depend_on_where_the_corpus_lies_nor_on_contents(tmp_path: Path) -> None:
    plans = []
    for folder, filling in (("one", b"a"), ("else/where", b"\n")):
        for name in ("x/a.jsonl", "b.txt"):
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(filling * 1000)
        pieces = open_corpus([tmp_path / folder]).pieces(300, LINES)
        plans.append([(p.name, p.kind, p.begin, p.end, p.rows, p.size) for p in pieces])
    assert plans[0] == plans[1]


def write_parquet(path: Path, groups: list[int]) -> list[str]:
    rng = random.Random(1)
    texts = ["".join(rng.choices("abcdefgh ", k=50)) for _ in range(sum(groups))]
    table = pa.table({"other": ["much longer than the text " * 30] * len(texts), "text": texts})
    with pq.ParquetWriter(path, table.schema, use_dictionary=["other"]) as writer:
        at = 0
        for rows in groups:
            writer.write_table(table.slice(at, rows))
            at += rows
    return texts


@pytest.mark.parametrize("groups", [[10], [10, 1, 300, 7, 50, 50, 50], []])
def test_parquet_is_cut_at_its_row_groups(tmp_path: Path, groups: list[int]) -> None:
    path = tmp_path / "a.parquet"
    texts = write_parquet(path, groups)
    for target in (1, 600, 3000, 8000, 10**9):
        pieces = pieces_of(path, target, Reading())
        assert [p.rows[0] for p in pieces if p.rows] == [0, *(p.rows[1] for p in pieces[:-1] if p.rows)]
        assert pieces[-1].rows is not None
        assert pieces[-1].rows[1] == len(groups)
        for piece in pieces:  # weighed by the column that is read: 54 bytes a row, and headers
            assert piece.rows is not None
            assert 0 <= piece.size - 54 * sum(groups[slice(*piece.rows)]) <= 300 * len(groups)
        assert all(a.size + b.size > target for a, b in itertools.pairwise(pieces))
        documents, _ = read(pieces, Reading())
        assert [d.text for d in documents] == texts
        assert [d.record for d in documents] == list(range(1, len(texts) + 1))
    assert len(pieces_of(path, 1, Reading())) == max(1, len(groups))


def test_a_changed_byte_changes_the_digest_of_its_piece_alone(tmp_path: Path) -> None:
    jsonl, parquet = tmp_path / "a.jsonl", tmp_path / "a.parquet"
    jsonl.write_bytes(b"".join(b'{"text": "%d"}\n' % i for i in range(100)))
    write_parquet(parquet, [20] * 5)
    for path in (jsonl, parquet):
        pieces = pieces_of(path, path.stat().st_size // 6 if path is jsonl else 900, Reading())
        assert len(pieces) > 3
        before = [piece_digest(piece) for piece in pieces]
        assert len(set(before)) == len(pieces)
        data = bytearray(path.read_bytes())
        data[pieces[1].end - 1] ^= 1
        path.write_bytes(data)
        assert [a == b for a, b in zip(before, map(piece_digest, pieces), strict=True)] == [
            i != 1 for i in range(len(pieces))
        ]


def test_the_digest_stands_only_when_the_piece_was_read_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "b"}\n')
    [piece] = open_corpus([tmp_path]).pieces(sys.maxsize)
    tally = Tally()
    stream = read_piece(piece, Reading(), tally)
    next(stream)
    assert tally.digest is None
    list(stream)
    assert tally.digest == piece_digest(piece)
    next(read_piece(piece, Reading(), tally))
    assert tally.digest is None


def test_the_line_of_a_broken_record_is_counted_only_when_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": f"{i}"}) for i in range(50)]
    lines[37] = lines[41] = "broken"
    path.write_text("\n".join(lines))
    tally = Tally(max_bad_fraction=1)
    for piece in pieces_of(path, path.stat().st_size // 2, Reading()):
        list(read_piece(piece, Reading(), tally))
    assert [s.record for s in tally.bad_samples] == [None, None]
    assert [s.offset for s in tally.bad_samples] == [len("\n".join(lines[:i])) + 1 for i in (37, 41)]
    assert [s.record for s in tally.located()] == [38, 42]
    path.unlink()
    assert [s.record for s in tally.located()] == [None, None]


class Pipe(io.RawIOBase):
    """Gives what it has, like a pipe: a few bytes at a time."""

    def __init__(self, data: bytes) -> None:
        self.data, self.rng = data, random.Random(0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        count = min(len(buffer), self.rng.randrange(1, 9), len(self.data))
        buffer[:count], self.data = self.data[:count], self.data[count:]
        return count


@pytest.mark.parametrize("data", [b"", b"\n", b"a\nbb\r\n\nccccccccccc\nd", b"a\nbb\n" * 7, b"no end at all"])
def test_standard_input_is_cut_at_ends_of_lines(data: bytes) -> None:
    for target in range(1, len(data) + 2):
        chunks = list(stdin_chunks(io.BytesIO(data), target))
        assert b"".join(chunks) == data
        assert all(chunk.endswith(b"\n") for chunk in chunks[:-1])
        assert all(len(chunk) >= target for chunk in chunks[:-1])
        # No longer than its target and the line in which it is reached.
        assert all(b"\n" not in chunk[target - 1 : -1] for chunk in chunks)
        assert list(stdin_chunks(Pipe(data), target)) == chunks  # type: ignore[arg-type]


def test_standard_input_without_lines_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.sources.streams.MAX_LINE", 1000)
    assert len(list(stdin_chunks(io.BytesIO(b"x" * 900 + b"\n"), 10))) == 1
    with pytest.raises(UserError, match="standard input: a line of more than 1,000 bytes"):
        list(stdin_chunks(io.BytesIO(b"x" * 3000), 10))
    with pytest.raises(UserError, match="at least one byte"):
        next(stdin_chunks(io.BytesIO(b"x"), 0))
