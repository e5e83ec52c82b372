"""Files that cannot be entered in the middle: divided while they are read, with the documents of the whole."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from killing_case import kill_at
from prepare_case import TEXTS, contents, crash_after

from data_pipeline.errors import UserError
from data_pipeline.prepare.folder import Deal, JobPart
from data_pipeline.prepare.plan import Preparation, Settings, plan_preparation
from data_pipeline.prepare.run import PrepareOptions, prepare
from data_pipeline.quality.duplicates import Dedup
from data_pipeline.quality.filters import Filters
from data_pipeline.sources.corpus import open_corpus
from data_pipeline.sources.documents import iter_documents, read_piece
from data_pipeline.sources.formats.parquet import Parquet
from data_pipeline.sources.pieces import Excerpt, Piece
from data_pipeline.sources.reading import Reading
from data_pipeline.sources.records import read_chunks
from data_pipeline.sources.tally import Tally
from data_pipeline.tokenization.tokenizer import Tokenizer

LONG = [f"{text}, and {i} more; {random.Random(i).randbytes(60).hex()}" for i, text in enumerate(TEXTS)]


def jsonl() -> bytes:
    lines = [json.dumps({"text": text}) for text in LONG]
    lines[10:10] = ["", '{"text": null}', "{broken"]
    lines[200:200] = ["[1]", "\ufeff{}"]  # a byte order mark in the middle is text
    return ("\ufeff" + "\n".join(lines)).encode()


def table(delimiter: str, quote: Callable[[str], str]) -> bytes:
    rows = [delimiter.join((str(i), quote(text))) for i, text in enumerate(LONG)]
    rows[20:20] = ["", delimiter.join("abc")]
    rows[150:150] = ["", "\r", f"wide{delimiter}{delimiter}"]
    return ("\ufeff\n" + "\n".join([delimiter.join(("id", "text")), *rows]) + "\n").encode()


def quoted(text: str) -> str:
    return (
        '"' + text.replace("says", 'says,\n"').replace('"', '""') + '"'
        if len(text) % 3
        else f"{text[:9]} '{text[9:30]}'"
    )


def write(path: Path) -> None:
    """240 documents, and broken and empty records among them where the format can have them."""
    kind = path.name.split(".")[1]
    if kind == "parquet":
        texts: list[str | None] = list(LONG)
        texts[50:50] = [None, " "]
        pq.write_table(pa.table({"n": range(len(texts)), "text": texts}), path)
        return
    data = {
        "jsonl": jsonl,
        "txt": lambda: ("\ufeff" + "\n".join([*LONG[:99], "", *LONG[99:]])).encode(),
        "csv": lambda: table(",", quoted),
        "tsv": lambda: table("\t", lambda text: f'"{text}'),
    }[kind]()
    if path.suffix == ".gz":
        data = gzip.compress(data[:9000], 1) + gzip.compress(data[9000:], 1)
    if path.suffix == ".zst":
        data = pytest.importorskip("zstandard").compress(data)
    path.write_bytes(data)


KINDS = ["a.jsonl.gz", "a.jsonl.zst", "a.txt.gz", "a.csv", "a.csv.gz", "a.tsv", "a.parquet"]
READING = Reading(text_unit="line")
ALL_MOMENTS = [*(i / 10 for i in range(10)), 0.97, 1.0]
"""Shares of the writes of a preparation, at which it is killed."""


@pytest.fixture(params=KINDS)
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A file of one of the kinds, with neighbours that are small."""
    folder = tmp_path / "inputs"
    folder.mkdir()
    write(folder / request.param)
    for name in ("0.jsonl", "b.jsonl"):
        (folder / name).write_text(json.dumps({"text": f"in {name}"}) + "\n")
    return folder / request.param


def plan(file: Path, tokenizer: Tokenizer, **settings: object) -> Preparation:
    settings = {"shard_tokens": 4000, "reading": READING, **settings}
    return plan_preparation([file.parent], tokenizer, Settings(**settings))  # type: ignore[arg-type]


LOOSE = PrepareOptions(max_bad_fraction=0.2)


@pytest.mark.usefixtures("small_units")
def test_the_documents_are_those_of_the_whole_in_order(file: Path, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    tally = Tally(max_bad_fraction=0.2)
    expected = [(d.source, d.text) for d in iter_documents([file.parent], READING, tally)]
    outcome = prepare(plan(file, small_tokenizer), tmp_path / "one", LOOSE)
    assert outcome.shards is not None
    assert outcome.units > 6  # the file is at least five of them
    assert len(outcome.shards.manifest.shards) > 6
    decoded = [small_tokenizer.decode(ids) for ids in outcome.shards.documents()]
    assert decoded == [text for _, text in expected]
    manifest = outcome.shards.manifest
    assert manifest.num_documents == len(expected)
    assert (manifest.empty_documents, manifest.bad_records) == (tally.empty, dict(sorted(tally.bad.items())))
    seen: list[int] = []
    again = prepare(plan(file, small_tokenizer), tmp_path / "three", replace(LOOSE, workers=3), on_text=seen.append)
    assert contents(tmp_path / "three") == contents(tmp_path / "one")
    assert sum(seen) == sum(len(text.encode()) for _, text in expected) == again.text_bytes
    # Places of broken records are those in the file.
    if tally.bad:
        found = [json.loads(line) for line in (tmp_path / "one" / "bad_records.jsonl").read_text().splitlines()]
        names = ("source", "record", "offset", "reason", "detail", "excerpt")
        assert [[b[n] for n in names] for b in found] == [[getattr(b, n) for n in names] for b in tally.bad_samples]
    # The manifest's account of the inputs is that of an undivided reading.
    [entry] = [entry for entry in manifest.inputs if entry.name == file.name]
    assert entry.bytes == file.stat().st_size
    assert prepare(plan(file, small_tokenizer), tmp_path / "one").already_complete


@pytest.mark.usefixtures("small_units")
def test_an_interrupted_run_keeps_the_parts_that_are_done(
    file: Path, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    crash_after(4, plan(file, small_tokenizer), tmp_path / "out", LOOSE)
    outcome = prepare(plan(file, small_tokenizer), tmp_path / "out", replace(LOOSE, workers=2))
    assert outcome.units_reused == 4
    prepare(plan(file, small_tokenizer), tmp_path / "whole", LOOSE)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("file", ["a.csv.gz", "a.parquet"], indirect=True)
@pytest.mark.parametrize("dedup", [None, "exact"])
@pytest.mark.parametrize("count", [2, 5])
def test_jobs_of_an_array_share_a_file(
    file: Path, dedup: str | None, count: int, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    settings = {"dedup": Dedup.parse(dedup) if dedup else None, "filters": Filters.parse(["max-chars=300"])}
    prepare(plan(file, small_tokenizer, **settings), tmp_path / "whole", LOOSE)
    out = tmp_path / "out"
    for _ in range(2 if dedup else 1):
        for index in reversed(range(count)):
            part = replace(LOOSE, part=JobPart(index, count))
            outcome = prepare(plan(file, small_tokenizer, **settings), out, part)
            assert outcome.units > 0  # each has something to do
    assert not list((out / ".work").glob("copy-*"))
    last = prepare(plan(file, small_tokenizer, **settings), out, LOOSE)
    assert last.units_reused == last.units
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("file", ["a.jsonl.gz"], indirect=True)
def test_a_changed_file_is_done_anew(file: Path, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    crash_after(4, plan(file, small_tokenizer), tmp_path / "out", LOOSE)
    file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes()).replace(b"document 3", b"document x"), 1))
    assert prepare(plan(file, small_tokenizer), tmp_path / "out", LOOSE).units_reused == 1  # 0.jsonl
    prepare(plan(file, small_tokenizer), tmp_path / "whole", LOOSE)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("file", ["a.jsonl.gz"], indirect=True)
def test_errors_name_the_file_and_its_line_and_leave_no_copies(
    workers: int, file: Path, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    how = PrepareOptions(workers=workers, max_bad_fraction=0)
    # Of two processes the one that is first meets the second fault as well as the first.
    first = "line 13: not a JSON record"
    place = first if workers == 1 else f"({first}|line 201: a record must be a JSON object)"
    with pytest.raises(UserError, match=rf"a\.jsonl\.gz, {place}"):
        prepare(plan(file, small_tokenizer), tmp_path / "out", how)
    assert not list((tmp_path / "out" / ".work").glob("copy*"))
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"a\.jsonl\.gz: the gzip compression is damaged or cut short"):
        prepare(plan(file, small_tokenizer), tmp_path / "out", replace(LOOSE, workers=workers))
    assert not list((tmp_path / "out" / ".work").glob("copy*"))


@pytest.mark.parametrize(
    ("kinds", "moments"),
    [
        (KINDS[:1], [0.2, 0.6, 0.97]),
        pytest.param(KINDS[:1] + KINDS[3:4], ALL_MOMENTS, marks=pytest.mark.slow),
        pytest.param(KINDS[-1:], ALL_MOMENTS, marks=pytest.mark.slow),
    ],
)
def test_killed_at_any_write_it_ends_with_the_same_bytes(
    kinds: list[str], moments: list[float], small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    for kind in kinds:
        # Without broken records: the run allows no more than one in a thousand.
        text = "".join(json.dumps({"text": text}) + "\n" for text in LONG).encode()
        if kind.endswith(".gz"):
            (inputs / kind).write_bytes(gzip.compress(text, 1))
        elif kind.endswith(".csv"):
            (inputs / kind).write_text("text\n" + "".join(f'"{text},\n"\n' for text in LONG))
        else:
            pq.write_table(pa.table({"text": LONG}), inputs / kind)
    kill_at(moments, inputs, small_tokenizer, tmp_path)


def read_all(
    piece: Piece, reading: Reading, target: int, folder: Path
) -> tuple[list[object], list[object], int, str | None]:
    """Documents, broken records, number of chunks and digest of a piece that is read in chunks."""
    documents: list[object] = []
    tally = Tally(max_bad_fraction=1.0)
    digests: list[str | None] = []
    count = 0
    copy = folder / "chunk"
    for chunk in read_chunks(piece, reading.wanted, target, digests.append):
        count += 1
        copy.write_bytes(chunk.data)
        part = replace(
            piece,
            kind=piece.format,
            begin=0,
            end=len(chunk.data),
            total=len(chunk.data),
            excerpt=Excerpt(str(copy), chunk.before, chunk.header),
        )
        documents += read_piece(part, reading, tally)
    return documents, [*tally.bad_samples], count, digests[0]


@pytest.mark.parametrize("quotes", ["csv", "none"])
@pytest.mark.parametrize("seed", range(40))
def test_chunks_of_random_csv_give_its_rows_and_faults(seed: int, quotes: str, tmp_path: Path) -> None:
    rng = random.Random(seed)
    tokens = ["a", "bc", '"', '""', ",", "\n", "\r\n", "\n\n", '"x\ny"', '"z",', "\ufeff", "\r", "é", " ", "\n1,2\n"]
    text = rng.choice(["", "\ufeff", "\n\n", "\ufeff\r\n"]) + rng.choice(["text,n\n", 'n,"text"\n', 'text,"a\nb"\r\n'])
    text += "".join(rng.choices(tokens, k=400))
    path = tmp_path / "a.csv"
    path.write_bytes(text.encode() + rng.choice([b"", b"\xff\n", b'"\n']))
    reading = Reading(quotes=quotes)  # type: ignore[arg-type]
    [piece] = open_corpus([path]).pieces(1 << 30, reading)
    tally = Tally(max_bad_fraction=1.0)
    expected, refusal = [], ""
    try:
        expected = list(read_piece(piece, reading, tally))
    except UserError as error:
        refusal = str(error)
    if refusal:
        with pytest.raises(UserError) as found:
            read_all(piece, reading, 1, tmp_path)
        assert str(found.value) == refusal
        return
    for target in (1, 30, 200, 10_000):
        documents, bad, count, digest = read_all(piece, reading, target, tmp_path)
        assert documents == expected
        assert bad[:100] == tally.bad_samples
        assert digest == tally.digest
        assert count == 1 if target == 10_000 else count > 1 or len(expected) < 2


@pytest.mark.parametrize("kind", ["jsonl.gz", "txt.gz"])
def test_edges_of_chunks_are_ends_of_lines_wherever_blocks_end(kind: str, tmp_path: Path) -> None:
    lines = [b'{"text": "%d%s"}' % (i, b"x" * (i * i % 97)) for i in range(200)]
    path = tmp_path / f"a.{kind}"
    text = b"\n".join(lines)
    path.write_bytes(gzip.compress(text))
    many = tmp_path / "many" / path.name
    many.parent.mkdir()
    # The same text in members of 7 bytes, which are blocks of their own.
    many.write_bytes(b"".join(gzip.compress(text[i : i + 7]) for i in range(0, len(text), 7)))
    for target in (1, 20, 100, 3000):
        found = []
        for each in (path, many):
            [piece] = open_corpus([each]).pieces(1 << 30, READING)
            found.append([c.data for c in read_chunks(piece, READING.wanted, target, lambda digest: None)])
        assert found[0] == found[1]
        assert b"".join(found[0]) == text
        assert all(chunk.endswith(b"\n") for chunk in found[0][:-1])
        assert all(target <= len(chunk) < target + 130 for chunk in found[0][:-1])


def test_parquet_rows_keep_their_values_and_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    columns = {
        "kind": pa.array(["red", "green", None, "blue"] * 600).dictionary_encode(),
        "meta": pa.array([{"n": i, "text": f"row {i}"} for i in range(2400)]),
    }
    pq.write_table(pa.table(columns), path, row_group_size=1100)
    reading = Reading(template="{kind}: {meta.n} {meta.text}")
    [piece] = open_corpus([path]).pieces(1 << 30, reading)
    expected = list(read_piece(piece, reading, Tally()))
    documents, bad, count, _ = read_all(piece, reading, max(1, piece.size // 7), tmp_path)
    assert documents == expected
    assert [d.record for d in expected] == list(range(1, 2401))
    assert 7 <= count <= 8
    assert not bad


def test_uneven_rows_of_parquet_are_cut_by_bytes(tmp_path: Path) -> None:
    """Short rows and then long ones, one of them above a part: equal numbers of rows had 20 times the text."""
    path = tmp_path / "a.parquet"
    texts = [f"row {i}" for i in range(5000)] + [f"{i} " * 400 for i in range(300)] + ["x" * 50_000, "end"]
    pq.write_table(pa.table({"text": texts}), path, use_dictionary=False)
    [piece] = open_corpus([path]).pieces(1 << 30, READING)
    target = 16_000
    found: list[str | None] = []
    chunks = list(read_chunks(piece, READING.wanted, target, found.append))
    before = [chunk.before for chunk in chunks]
    assert before[0] == 0
    assert before == sorted(set(before))
    sizes = [sum(map(len, texts[a:b])) for a, b in pairwise([*before, len(texts)])]
    assert max(sizes) == 50_000
    assert sorted(sizes)[-2] <= 2 * target
    assert sum(sizes) // len(sizes) > target // 2
    documents, bad, count, _ = read_all(piece, READING, target, tmp_path)
    assert ([d.text for d in documents], bad, count) == (texts, [], len(chunks))
    assert [d.record for d in documents] == list(range(1, len(texts) + 1))


def test_a_division_by_other_rules_is_not_taken_up(
    small_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unfinished folder of a version that cut Parquet otherwise: its parts are made anew."""
    folder = tmp_path / "inputs"
    folder.mkdir()
    pq.write_table(pa.table({"text": [*LONG, "x" * 9000] * 2}), folder / "a.parquet", use_dictionary=False)
    monkeypatch.setattr("data_pipeline.prepare.plan.unit_bytes", lambda size: 4000)
    planned = plan(folder / "a.parquet", small_tokenizer)
    now = Parquet.division
    monkeypatch.setattr(Parquet, "division", 1)
    crash_after(3, planned, tmp_path / "out", LOOSE)
    monkeypatch.setattr(Parquet, "division", now)
    assert prepare(planned, tmp_path / "out", LOOSE).units_reused == 0
    prepare(planned, tmp_path / "whole", LOOSE)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_file_goes_to_as_many_jobs_as_it_has_shares(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "inputs"
    folder.mkdir()
    rng = np.random.default_rng(0)
    (folder / "a.jsonl.gz").write_bytes(rng.bytes(4_000_000))  # 12 MB of text, it is thought
    plain = plan_preparation([folder], small_tokenizer)
    assert [unit.divide for unit in plain.units] == [4 << 20]
    assert Deal.of(plain.units, 2).idle() == []
    assert Deal.of(plain.units, 5).idle() == [3, 4]  # three parts
    for i in range(6):
        (folder / f"b{i}.jsonl").write_bytes(b"\n" * 4_000_000)
    mixed = plan_preparation([folder], small_tokenizer)
    deal = Deal.of(mixed.units, 3)  # the file is a third of all
    assert [deal.job((0, part)) for part in range(3)] == [0, 0, 0]
    assert [deal.job((unit, 0)) for unit in range(1, 4)] == [1, 2, 0]
    deal = Deal.of(mixed.units, 6)
    assert [deal.job((0, part)) for part in range(4)] == [0, 1, 0, 1]
    assert [deal.job((unit, 0)) for unit in range(1, 4)] == [2, 3, 4]
    assert Deal.of(mixed.units, 9).idle() == []
