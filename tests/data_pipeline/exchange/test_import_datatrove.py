"""datatrove's .ds files become shards: the same ids, and whatever does not fit is refused with its place."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from exchange_case import write_datatrove
from prepare_case import TEXTS

from data_pipeline.errors import UserError
from data_pipeline.exchange.datatrove import DatatroveFile
from data_pipeline.exchange.imports import import_tokens
from data_pipeline.exchange.plan import plan_import
from data_pipeline.exchange.tokenfile import TokenFormat
from data_pipeline.tokenization.tokenizer import Tokenizer


def imported(source: Path, tokenizer: Tokenizer, out: Path, **options: object) -> list[list[int]]:
    plan = plan_import([source], tokenizer, **options)  # type: ignore[arg-type]
    return [document.tolist() for document in import_tokens(plan, out).shards.documents()]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("beside", [{"index": True}, {"index": False, "metadata": True}, {"metadata": True}])
def test_documents_with_end_tokens(
    size: int, beside: dict[str, bool], tmp_path: Path, small_tokenizer: Tokenizer
) -> None:
    ids = [small_tokenizer.encode(text) for text in TEXTS[:9]]
    source = write_datatrove(tmp_path / "a.ds", [[*i, small_tokenizer.eos_id] for i in ids], size, **beside)  # type: ignore[arg-type]
    assert imported(source, small_tokenizer, tmp_path / "out") == ids


@pytest.mark.parametrize("index", [True, False])
def test_wherever_a_file_is_cut_each_document_is_read_once(index: bool, tmp_path: Path) -> None:
    documents = [[1, 2, 9], [9], [3, 9], [4, 5, 6, 7, 8, 9], [9]]
    file = DatatroveFile(write_datatrove(tmp_path / "a.ds", documents, index=index), TokenFormat(2, split_at=9))
    for target in range(2, 30):
        pieces = file.pieces("a.ds", target)
        assert [(a.end, b.begin) for a, b in itertools.pairwise(pieces)] == [(b.begin,) * 2 for b in pieces[1:]]
        found = [document for piece in pieces for document in file.read(piece)]
        assert [document.ids.tolist() for document in found] == documents
        assert [document.offset for document in found] == [0, 6, 8, 12, 24]


def test_without_end_tokens_the_index_tells_documents(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    source = write_datatrove(tmp_path / "a.ds", [[10, 11], [], [12]])
    assert imported(source, small_tokenizer, tmp_path / "out") == [[10, 11], [12]]
    bare = write_datatrove(tmp_path / "b.ds", [[10, 11], [12]], index=False)
    with pytest.raises(UserError, match=r"neither .index nor .metadata beside it.*give --token-size 2"):
        plan_import([bare], small_tokenizer)
    with pytest.raises(
        UserError, match=r"has no .index beside it, so only an end token tells.*name it with --end-token"
    ):
        plan_import([bare], small_tokenizer, end_token="none", form=TokenFormat(2))
    with pytest.raises(UserError, match=r"b.ds, at byte 4: the document does not end with the end token 12"):
        imported(write_datatrove(tmp_path / "b.ds", [[10, 12], [13]], index=False), small_tokenizer, tmp_path / "b",
                 end_token="12", form=TokenFormat(2))  # fmt: skip


def test_the_end_token_and_size_may_be_given(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    source = write_datatrove(tmp_path / "a.ds", [[10, 300], [11, 12, 300]], 4, index=False)
    found = imported(source, small_tokenizer, tmp_path / "out", end_token="300", form=TokenFormat(4))
    assert found == [[10], [11, 12]]


def test_a_loss_mask_is_refused_unless_it_hides_nothing(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    source = write_datatrove(tmp_path / "a.ds", [[10, 11], [12]], loss=[1, 1, 1])
    assert imported(source, small_tokenizer, tmp_path / "out") == [[10, 11], [12]]
    write_datatrove(source, [[10, 11], [12]], loss=[1, 0, 0])
    with pytest.raises(UserError, match=r"a.ds.loss: 2 of 3 tokens are no targets, and shards keep no loss mask"):
        plan_import([source], small_tokenizer)
    assert imported(source, small_tokenizer, tmp_path / "all", form=TokenFormat(ignore_loss=True)) == [[10, 11], [12]]
    (tmp_path / "a.ds.loss").write_bytes(b"\1\1")
    with pytest.raises(UserError, match=r"has 2 bytes for 3 tokens: it was cut short"):
        plan_import([source], small_tokenizer)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.ds", b"", "a.ds is empty"),
        ("a.ds", bytes(5), "has 5 bytes, its index ends at token 3, and tokens have 2 or 4 bytes"),
        ("a.ds", bytes(24), "has 24 bytes, its index ends at token 3"),
        ("a.ds", bytes(12), "bytes of a token are 4 by the index, 2 by the metadata"),
        ("a.ds.index", bytes(7), "7 bytes are no list of 64-bit numbers"),
        ("a.ds.index", b"", "0 bytes are no list of 64-bit numbers"),
        ("a.ds.index", bytes(16), "its index ends at token 0"),
        ("a.ds.index", b"\4" + bytes(7) + b"\3" + bytes(7), "document 1 ends before the one in front of it"),
        ("a.ds.metadata", b"gpt2|2\n4\n4 T", "its metadata says 4 tokens: it was cut short"),
        ("a.ds.metadata", b"what is this", "is not metadata of datatrove"),
        ("a.ds.metadata", b"x|3\n3\n", "bytes of a token are 2 by the index, 3 by the metadata"),
    ],
)
def test_files_that_do_not_fit_each_other_are_refused(
    name: str, data: bytes, message: str, tmp_path: Path, small_tokenizer: Tokenizer
) -> None:
    write_datatrove(tmp_path / "a.ds", [[10, 11], [12]], metadata=True)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        plan_import([tmp_path / "a.ds"], small_tokenizer)


def test_an_id_outside_the_vocabulary_is_named(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    source = write_datatrove(tmp_path / "a.ds", [[10, 11], [12, 320]])
    with pytest.raises(
        UserError, match=r"a.ds, document 1 at byte 4: token 1 \(byte 6\) is id 320, which the vocabulary"
    ):
        imported(source, small_tokenizer, tmp_path / "out")


def test_what_datatrove_writes_is_read(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    tokens = pytest.importorskip("datatrove.pipeline.tokens.tokenizer", reason="needs datatrove (extra benchmarks)")
    ids = [[*small_tokenizer.encode(text), small_tokenizer.eos_id] for text in TEXTS[:20]]
    file = tokens.TokenizedFile(str(tmp_path / "in"), "a.ds", save_loss_metadata=True, save_final_metadata=True,
                                tokenizer_name_or_path="mine", token_size=4)  # fmt: skip
    for document in ids:
        file.write(document, [True] * len(document))
    file.close()
    assert imported(tmp_path / "in", small_tokenizer, tmp_path / "out") == [document[:-1] for document in ids]
