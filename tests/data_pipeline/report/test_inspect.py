"""What a shard folder holds, in numbers, in the terminal and on the page."""

from __future__ import annotations

import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from data_pipeline.cli import main
from data_pipeline.errors import UserError
from data_pipeline.report.contents import left_out, token_text, visible
from data_pipeline.report.page import percent, render, setting
from data_pipeline.shards.shardset import ShardSet
from data_pipeline.shards.summary import Lengths, sample_documents, summarise

EVIL = "<script>alert('x')</script> & <b>bold</b> {{ 7 * 7 }}"
TEXTS = [EVIL, *(" ".join(f"w{(i * k) % 17}" for k in range(1 + (i * i) % 700)) for i in range(1, 120))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    for name, part in (("a.jsonl", [" ", *TEXTS[:50]]), ("b.jsonl", TEXTS[50:])):
        (root / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    inputs = ["--input", str(root / "a.jsonl"), str(root / "b.jsonl")]
    main(["tokenizer", *inputs, "--vocab-size", "300", "--out", str(root / "tokenizer")])
    words = ["prepare", *inputs, "--tokenizer", str(root / "tokenizer"), "--out", str(root / "train")]
    main([*words, "--shard-tokens", "9000"])
    return root / "train"


@pytest.fixture(scope="module")
def shards(folder: Path) -> ShardSet:
    made = ShardSet.open(folder)
    assert len(made.manifest.shards) > 3
    return made


@pytest.fixture(scope="module")
def lengths_of_texts(shards: ShardSet) -> list[int]:
    tokenizer = shards.tokenizer()
    return [len(tokenizer.encode(text)) + 1 for text in TEXTS]


def printed(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert not main(["inspect", *map(str, words)])
    return capsys.readouterr().out


def test_the_summary_is_what_counting_the_texts_gives(shards: ShardSet, lengths_of_texts: list[int]) -> None:
    tokens: list[int] = []
    summary = summarise(shards, tokens.append)
    tokenizer = shards.tokenizer()
    counts = Counter(i for text in TEXTS for i in [*tokenizer.encode(text), tokenizer.eos_id])
    assert (summary.tokens, summary.documents) == (sum(lengths_of_texts), len(TEXTS)) == (sum(tokens), len(TEXTS))
    assert {i: int(n) for i, n in enumerate(summary.token_counts) if n} == counts
    assert summary.distinct_tokens == len(counts)
    expected = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    assert summary.frequent_tokens(12) == expected[:12]
    assert summary.frequent_tokens(999) == expected
    assert sorted(lengths_of_texts) == np.repeat(summary.lengths.values, summary.lengths.counts).tolist()
    assert summary.sources == {
        "b.jsonl": (70, sum(lengths_of_texts[50:])),
        "a.jsonl": (50, sum(lengths_of_texts[:50])),
    }
    assert list(summary.sources) == ["b.jsonl", "a.jsonl"]


def test_lengths_agree_with_a_sorted_list() -> None:
    rng = np.random.default_rng(0)
    everything = rng.lognormal(6, 1.5, 5000).astype(np.uint64) + 2
    lengths = Lengths()
    for part in np.array_split(everything, 7):
        lengths.add(part)
    assert lengths.documents == 5000
    assert lengths.tokens == everything.sum()
    assert lengths.longest == everything.max()
    for percentage in (1, 10, 37, 50, 90, 99, 100):
        expected = np.percentile(everything.astype(float), percentage, method="inverted_cdf")
        assert lengths.percentile(percentage) == expected
    for limit in (1, 512, 1024, int(everything.max()) - 1, int(everything.max())):
        documents, tokens = lengths.longer_than(limit)
        longer = everything[everything > limit]
        assert documents == pytest.approx(len(longer) / 5000)
        assert tokens == pytest.approx(longer.sum() / everything.sum())
    for parts in (1, 2, 3):
        edges = lengths.log2_edges(parts)
        documents, tokens = lengths.histogram(edges)
        np.testing.assert_array_equal(documents, np.histogram(everything, edges)[0])
        np.testing.assert_array_equal(tokens, np.histogram(everything, edges, weights=everything.astype(float))[0])
        assert edges[0] <= everything.min() < edges[1]
        assert edges[-2] <= everything.max() < edges[-1]


@pytest.mark.parametrize("length", [1, 2, 3, 511, 512, 513, 1024, 65536])
def test_lengths_of_one_document(length: int) -> None:
    lengths = Lengths()
    lengths.add(np.array([length]))
    assert {lengths.percentile(p) for p in (1, 50, 100)} == {length}
    edges = lengths.log2_edges()
    assert len(edges) == 2
    assert edges[0] <= length < edges[1] == 2 * edges[0]
    assert lengths.limits()[-1] < max(length, 513)


def test_samples_come_from_all_over_the_stream(shards: ShardSet, lengths_of_texts: list[int]) -> None:
    samples = sample_documents(shards, 6)
    assert [sample.document for sample in samples] == [10, 30, 50, 70, 90, 110]
    for sample in samples:
        text = TEXTS[sample.document]
        assert sample.tokens == lengths_of_texts[sample.document]
        assert sample.source == ("a.jsonl" if sample.document < 50 else "b.jsonl")
        assert sample.whole == (sample.tokens <= 257)
        assert sample.text == text if sample.whole else text.startswith(sample.text)
        assert len(sample.text) > 100 or sample.whole
    assert {sample.whole for sample in samples} == {True, False}
    every = sample_documents(shards, 1000)
    assert [sample.document for sample in every] == list(range(len(TEXTS)))
    assert every[0].text == EVIL
    assert sample_documents(shards, 0) == []


def test_a_token_outside_the_vocabulary_is_damage(folder: Path, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    file = sorted(copy.glob("tokens-*.bin"))[1]
    file.write_bytes(file.read_bytes()[:-2] + b"\xff\xff")
    with pytest.raises(UserError, match="it holds token 65535, outside the vocabulary of"):
        summarise(ShardSet.open(copy))


def test_the_terminal_shows_all_of_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = printed(capsys, folder)
    for part in (
        "documents            120 from 2 input(s)",
        "left out             no text: 1",
        "nats per token",
        "most frequent tokens",
        "all 1,",
        "(70 documents)",
    ):
        assert part in said
    bars = re.findall(r"^ +([\d,]+) - ([\d,]+) +([\d,]+)  (#*)$", said, flags=re.MULTILINE)
    assert sum(int(count) for _, _, count, _ in bars) == 120
    assert max(len(bar) for *_, bar in bars) == 40
    assert [low for low, *_ in bars[1:]] == [f"{int(high.replace(',', '')) + 1:,}" for _, high, *_ in bars[:-1]]


def test_json_is_complete(
    folder: Path, shards: ShardSet, lengths_of_texts: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    found = json.loads(printed(capsys, folder, "--json", "--samples", "2"))
    assert (found["documents"], found["tokens"], found["fingerprint"]) == (120, shards.num_tokens, shards.fingerprint)
    assert found["left_out"] == [{"reason": "no text", "records": 1}]
    assert found["length_percentiles"]["100"] == max(lengths_of_texts)
    longer = [n for n in lengths_of_texts if n > 512]
    assert found["longer_than"][0]["documents"] == pytest.approx(len(longer) / 120)
    assert found["longer_than"][0]["tokens"] == pytest.approx(sum(longer) / sum(lengths_of_texts))
    assert sum(row["documents"] for row in found["length_histogram"]) == 120
    assert len(found["samples"]) == 2
    assert all(not token["text"].startswith(" ") for token in found["frequent_tokens"])
    assert any(token["text"].startswith("␣w") for token in found["frequent_tokens"])


def test_equal_shards_give_equal_pages(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pages = [tmp_path / "deep" / "one.html", tmp_path / "two.html"]
    for page in pages:
        assert f"page written to {page}" in printed(capsys, folder, "--page", page)
    assert pages[0].read_bytes() == pages[1].read_bytes()


class Page(HTMLParser):
    """The tags of a page, with their attributes, and its text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def source(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    printed(capsys, folder, "--page", tmp_path / "page.html", "--samples", "120")
    return (tmp_path / "page.html").read_text()


def test_the_page_shows_documents_as_text_and_loads_nothing(source: str) -> None:
    page = Page(source)
    assert not page.open  # every tag is closed
    assert not {"script", "b", "link", "img", "iframe"} & set(page.tags)
    assert EVIL in page.text  # as it stands in the document: neither run, nor rendered, nor expanded
    links = [value or "" for name, value in page.attributes if name in ("href", "src", "xlink:href")]
    assert all(link.startswith("#") for link in links)
    assert "http" not in source.replace("http-equiv", "")
    assert not re.search(r"@import|url\((?!#)", source)
    assert "prefers-color-scheme: dark" in source


def test_the_picture_takes_the_colours_of_the_page(source: str) -> None:
    pictures = re.findall(r"<svg.*?</svg>", source, re.DOTALL)
    for svg in pictures:
        for variable in ("--bars", "--line", "--grid", "--muted", "--ink"):
            assert f"var({variable})" in svg
            assert f"{variable}: #" in source
        assert not re.search(r"#[0-9a-f]{6}\b", svg)  # no colour of matplotlib's own, no white paper
        for label in ("tokens in the document (log scale)", "share", "median "):
            assert label in svg
    # One for a desk, and one for a phone: within 360 pixels its labels are at least nine tenths of their size.
    wide, narrow = (float(re.search(r'viewBox="0 0 ([\d.]+)', svg)[1]) for svg in pictures)  # type: ignore[index]
    assert (wide, narrow <= 360 / 0.9) == (504.0, True)
    ids = re.findall(r'\bid="([^"]+)"', source)
    assert len(ids) == len(set(ids))


def test_the_page_says_what_was_left_out_and_how_it_was_made(shards: ShardSet) -> None:
    from data_pipeline.report.contents import contents

    summary = summarise(shards)
    found = contents(shards, summary, [])
    found["left_out"] = [{"reason": "dropped: <near> duplicate", "records": 1234567}]
    found["reports"] = ["dropped.jsonl"]
    found["settings"] = {"text_field": "text", "filters": ["min-chars=200", "gopher"], "dedup": None, "tokens": 1000}
    text = Page(render(found, summary.lengths)).text
    for part in ("dropped: <near> duplicate1,234,567", "dropped.jsonl", "text fieldtext", "min-chars=200, gopher"):
        assert part in text
    assert "dedupnone" in text
    assert "tokens1,000" in text


def test_broken_and_dropped_records_are_named() -> None:
    manifest: Any = SimpleNamespace(
        empty_documents=2, bad_records={"not JSON": 3}, dropped_documents={"duplicate": 4, "min-chars=200": 0}
    )
    assert left_out(manifest) == [
        {"reason": "no text", "records": 2},
        {"reason": "broken record: not JSON", "records": 3},
        {"reason": "dropped: duplicate", "records": 4},
    ]


def test_tokens_are_shown_so_that_they_can_be_told_apart(shards: ShardSet) -> None:
    assert token_text(shards, shards.eos_id, "") == "<eos>"
    assert token_text(shards, 77, "") == "<77>"
    assert token_text(shards, 77, " the") == "␣the"


def test_how_numbers_and_white_space_are_shown() -> None:
    assert [percent(x) for x in (0, 1e-9, 0.0153, 0.1, 0.9999, 1)] == [
        "0%",
        "<0.001%",
        "1.53%",
        "10.0%",
        "100%",
        "100%",
    ]
    assert setting({"a": [1000, True], "b": None}) == "a 1,000, yes, b none"
    assert visible(" a\tb\n\x00" + " " * 6) == "␣a⇥b↵\\u0000␣×6"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--samples", "-1"], "--samples -1: must be 0 or more"),
        (["--page", "."], "is a folder: name the page"),
        (["--page", "file/page.html"], "cannot be written"),
    ],
)
def test_mistakes_are_told(
    words: list[str], message: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=message):
        main(["inspect", str(folder), *words])
