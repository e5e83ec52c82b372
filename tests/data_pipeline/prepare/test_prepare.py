"""Preparing shards: equal bytes for equal inputs, and no mixing of one plan with another."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
from prepare_case import TEXTS, Crash, contents, crash_after, plan

from data_pipeline.errors import UserError
from data_pipeline.prepare.plan import MIB, Settings, plan_preparation, unit_bytes
from data_pipeline.prepare.run import PrepareOptions, prepare
from data_pipeline.shards.manifest import read_manifest
from data_pipeline.shards.shardset import ShardSet, verify_shards
from data_pipeline.tokenization.tokenizer import Tokenizer
from data_pipeline.tokenization.training import train_tokenizer

pytestmark = pytest.mark.usefixtures("small_units")


def opened(shards: ShardSet | None) -> ShardSet:
    assert shards is not None
    return shards


def test_equal_inputs_give_equal_bytes_wherever_they_lie(
    inputs: Path, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    prepare(plan(inputs, small_tokenizer), tmp_path / "one")
    elsewhere = tmp_path / "elsewhere" / "deep"
    elsewhere.parent.mkdir()
    inputs.rename(elsewhere)
    time.sleep(0.01)
    prepare(plan(elsewhere, small_tokenizer), tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert str(tmp_path).encode() not in (tmp_path / "one" / "manifest.json").read_bytes()


def test_the_stream_is_every_document_in_order(inputs: Path, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    shards = opened(prepare(plan(inputs, small_tokenizer), tmp_path / "out").shards)
    assert [shards.tokenizer().decode(ids) for ids in shards.documents()] == TEXTS
    assert shards.manifest.text_bytes == sum(len(text.encode()) for text in TEXTS)


def test_a_large_file_is_cut_at_line_ends_and_loses_nothing(
    inputs: Path, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    one = tmp_path / "one.jsonl"
    one.write_bytes(b"".join(file.read_bytes() for file in sorted(inputs.iterdir())))
    preparation = plan_preparation([one], small_tokenizer)
    assert len(preparation.units) > 3
    shards = opened(prepare(preparation, tmp_path / "out").shards)
    assert [shards.tokenizer().decode(ids) for ids in shards.documents()] == TEXTS
    assert [entry.name for entry in shards.manifest.inputs] == ["one.jsonl"]


def test_a_complete_folder_is_left_alone(inputs: Path, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    first = prepare(plan(inputs, small_tokenizer), tmp_path / "out")
    assert not first.already_complete
    assert first.documents == len(TEXTS)
    stamps = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    again = prepare(plan(inputs, small_tokenizer), tmp_path / "out")
    assert again.already_complete
    assert again.documents == 0
    assert stamps == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    assert opened(again.shards).fingerprint == opened(first.shards).fingerprint


def test_finished_units_are_not_done_again(inputs: Path, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    crash_after(3, plan(inputs, small_tokenizer), tmp_path / "out")
    with pytest.raises(UserError, match="has not finished"):
        read_manifest(tmp_path / "out")
    outcome = prepare(plan(inputs, small_tokenizer), tmp_path / "out")
    assert outcome.units_reused == 3
    assert 0 < outcome.documents < len(TEXTS)
    prepare(plan(inputs, small_tokenizer), tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_unit_whose_file_was_cut_is_done_again(inputs: Path, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    crash_after(3, plan(inputs, small_tokenizer), tmp_path / "out")
    first = tmp_path / "out" / "tokens-00000-00000.bin"
    first.write_bytes(first.read_bytes()[:-2])
    assert prepare(plan(inputs, small_tokenizer), tmp_path / "out").units_reused == 2
    assert verify_shards(tmp_path / "out") == []


def test_another_plan_in_the_same_folder_is_refused(inputs: Path, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    done, undone = tmp_path / "done", tmp_path / "undone"
    prepare(plan(inputs, small_tokenizer), done)
    crash_after(2, plan(inputs, small_tokenizer), undone)
    before = contents(done), contents(undone)
    for other, message in [
        (plan(inputs, train_tokenizer(TEXTS, 300)), "shards of another tokenizer"),
        (plan(inputs, small_tokenizer, shard_tokens=501), "shards made with another shard_tokens: 500, now 501"),
        (plan_preparation([inputs / "0.jsonl"], small_tokenizer, Settings(shard_tokens=500)), "shards of other inputs"),
    ]:
        with pytest.raises(UserError, match=message):
            prepare(other, done)
        with pytest.raises(UserError, match="an unfinished run with other inputs"):
            prepare(other, undone)
    assert (contents(done), contents(undone)) == before


@pytest.mark.parametrize("size", ["same", "other"])
def test_changed_contents_are_another_plan(size: str, inputs: Path, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    prepare(plan(inputs, small_tokenizer), tmp_path / "done")
    text = (inputs / "3.jsonl").read_text()
    changed = "document 13x" if size == "same" else "document 130b"
    (inputs / "3.jsonl").write_text(text.replace("document 130", changed))
    with pytest.raises(UserError, match=r"shards of another 3\.jsonl"):
        prepare(plan(inputs, small_tokenizer), tmp_path / "done")


def test_overwrite_replaces_shards(inputs: Path, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    done, undone = tmp_path / "done", tmp_path / "undone"
    prepare(plan(inputs, small_tokenizer), done)
    crash_after(3, plan(inputs, small_tokenizer), undone)
    other = plan_preparation([inputs / "0.jsonl"], small_tokenizer, Settings(shard_tokens=300))
    prepare(other, tmp_path / "fresh")
    for folder in (done, undone):
        prepare(other, folder, PrepareOptions(overwrite=True))
        assert contents(folder) == contents(tmp_path / "fresh")
    outcome = prepare(
        other, done, PrepareOptions(overwrite=True)
    )  # asked for explicitly: done again though it is the same
    assert (outcome.already_complete, outcome.units_reused) == (False, 0)


def test_an_interrupted_overwrite_goes_on(inputs: Path, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    crash_after(3, plan(inputs, small_tokenizer), tmp_path / "out")
    assert prepare(plan(inputs, small_tokenizer), tmp_path / "out", PrepareOptions(overwrite=True)).units_reused > 0


def test_a_folder_with_other_things_is_not_touched(inputs: Path, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("irreplaceable")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"holds files that are not shards \(thesis\.txt\)"):
            prepare(plan(inputs, small_tokenizer), out, PrepareOptions(overwrite=overwrite))
    assert contents(out) == {"thesis.txt": b"irreplaceable"}
    with pytest.raises(UserError, match="is a file, not a folder"):
        prepare(plan(inputs, small_tokenizer), out / "thesis.txt")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "manifest.json", "bad_records.jsonl"])
def test_a_file_of_the_users_with_one_of_our_names_is_not_touched(
    name: str, inputs: Path, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """A tokenizer's own folder as --out lost the tokenizer, and --overwrite any manifest.json."""
    out, other = tmp_path / "out", tmp_path / "other"
    small_tokenizer.save(out)
    for path in out.iterdir():
        if path.name != name:
            path.unlink()
    (out / name).write_bytes((out / name).read_bytes() if (out / name).exists() else b'{"name": "my extension"}')
    crash_after(3, plan(inputs, small_tokenizer), other)  # a run's own leavings do not make it ours
    shutil.copy(out / name, other / f"{name}.mine.tmp")
    for folder in (out, other):
        before = contents(folder)
        for overwrite in (False, True):
            refusal = "is not a manifest|is damaged" if name == "manifest.json" and not overwrite else "that are not sh"
            with pytest.raises(UserError, match=refusal if folder == out else "that are not shards"):
                prepare(plan(inputs, small_tokenizer), folder, PrepareOptions(overwrite=overwrite))
        assert contents(folder) == before
    assert not (out / ".work").exists()


def test_a_tokenizer_that_came_into_a_folder_of_shards_is_kept(
    inputs: Path, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    crash_after(3, plan(inputs, small_tokenizer), tmp_path / "out")
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds shards without a manifest, and files .*\(tokenizer\.json\).*move them"):
        prepare(plan(inputs, small_tokenizer), tmp_path / "out", PrepareOptions(overwrite=True))
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


def test_an_overwrite_that_dies_while_it_clears_goes_on(
    inputs: Path, small_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = plan_preparation([inputs / "0.jsonl"], small_tokenizer, Settings(shard_tokens=300))
    prepare(other, tmp_path / "fresh")
    left = [0]

    def dying(folder: Path, names: Iterable[str]) -> None:
        for name in names:
            if (folder / name).exists():
                left[0] -= 1
                if not left[0]:
                    raise Crash
                (folder / name).unlink()

    shards = 2 * len(opened(prepare(plan(inputs, small_tokenizer), tmp_path / "out").shards).manifest.shards)
    for last in (1, 2, shards + 2, shards + 3):  # the manifest, a shard, the two files of the tokenizer
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        prepare(plan(inputs, small_tokenizer), tmp_path / "out")
        left[0] = last
        with monkeypatch.context() as patch:
            patch.setattr("data_pipeline.prepare.folder.remove_files", dying)
            with pytest.raises(Crash):
                prepare(other, tmp_path / "out", PrepareOptions(overwrite=True))
        prepare(other, tmp_path / "out", PrepareOptions(overwrite=True))
        assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_shards_that_lost_their_manifest_are_not_overwritten_unasked(
    inputs: Path, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    prepare(plan(inputs, small_tokenizer), tmp_path / "out")
    (tmp_path / "out" / "manifest.json").unlink()
    with pytest.raises(UserError, match="shards without a manifest"):
        prepare(plan(inputs, small_tokenizer), tmp_path / "out")


def test_two_processes_in_one_folder_are_refused(inputs: Path, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    def second(size: int) -> None:
        with pytest.raises(UserError, match="another process is preparing"):
            prepare(plan(inputs, small_tokenizer), tmp_path / "out")
        raise Crash

    with pytest.raises(Crash):
        prepare(plan(inputs, small_tokenizer), tmp_path / "out", on_text=second)


@pytest.mark.parametrize("content", ["", '{"text": ""}\n{"text": null}\n{"text": " \\n"}\n'])
def test_zero_documents_are_refused(content: str, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    message = "no documents: .*a.jsonl.*" + ("3 without text" if content else "no records")
    for _ in range(2):  # and again: nothing of the first attempt is in the way
        with pytest.raises(UserError, match=message):
            prepare(plan_preparation([tmp_path / "a.jsonl"], small_tokenizer), tmp_path / "out")
    (tmp_path / "a.jsonl").write_text('{"text": "something"}\n')
    assert prepare(plan_preparation([tmp_path / "a.jsonl"], small_tokenizer), tmp_path / "out").documents == 1


def test_empty_documents_and_empty_files_are_counted_and_left_out(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": ""}\n{"text": "y"}\n')
    (tmp_path / "b.jsonl").write_text("")
    (tmp_path / "c.txt").write_text(" \n")
    shards = opened(prepare(plan_preparation([tmp_path], small_tokenizer), tmp_path / "out").shards)
    assert (shards.num_documents, shards.manifest.empty_documents) == (2, 1 + 1)
    assert [entry.name for entry in shards.manifest.inputs] == ["a.jsonl", "b.jsonl", "c.txt"]
    assert [shards.tokenizer().decode(ids) for ids in shards.documents()] == ["x", "y"]


def test_a_finished_unit_whose_input_changed_is_done_again(
    inputs: Path, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    crash_after(3, plan(inputs, small_tokenizer), tmp_path / "out")
    first = inputs / "0.jsonl"
    first.write_text(first.read_text().replace("document 3 ", "document 4 "))  # the same name and size
    prepare(plan(inputs, small_tokenizer), tmp_path / "out")
    prepare(plan(inputs, small_tokenizer), tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_an_input_that_grows_while_it_is_read_is_refused(
    inputs: Path, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    preparation = plan(inputs, small_tokenizer)
    with open(inputs / "3.jsonl", "a") as f:
        f.write('{"text": "late"}\n')
    with pytest.raises(UserError, match=r"3\.jsonl.*changed"):
        prepare(preparation, tmp_path / "out")


def test_compressed_and_plain_text_give_the_same_tokens(
    inputs: Path, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    packed = tmp_path / "packed"
    packed.mkdir()
    for path in inputs.iterdir():
        (packed / (path.name + ".gz")).write_bytes(gzip.compress(path.read_bytes()))
    plain = opened(prepare(plan(inputs, small_tokenizer), tmp_path / "a").shards)
    unpacked = opened(prepare(plan_preparation([packed], small_tokenizer), tmp_path / "b").shards)
    assert [d.tolist() for d in plain.documents()] == [d.tolist() for d in unpacked.documents()]


def test_units_follow_the_sizes_alone(
    inputs: Path, small_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.prepare.plan.unit_bytes", lambda size: 1000)
    (inputs / "2.jsonl").write_text("not even JSON " * 1000)
    units = plan_preparation([inputs], small_tokenizer).units
    assert [unit.number for unit in units] == list(range(len(units)))
    ranges = [(piece.name, piece.begin, piece.end) for unit in units for piece in unit.pieces if piece.name[0] == "2"]
    assert len(ranges) > 10
    assert [begin for _, begin, _ in ranges] == [0, *(end for _, _, end in ranges[:-1])]


def test_units_are_many_for_small_corpora_and_not_too_many_for_huge_ones() -> None:
    assert unit_bytes(0) == unit_bytes(100 * MIB) == 4 * MIB
    assert unit_bytes(1024 * MIB) == 16 * MIB
    assert unit_bytes(1024 * 64 * MIB) == 64 * MIB
    assert unit_bytes(10**12) == 10**12 // 4096


def test_a_full_disk_is_said(
    inputs: Path, small_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, left = os.fsync, 30

    def full(fd: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(28, "No space left on device")
        real(fd)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"writing to .*out failed: No space left on device.*run the command again"):
        prepare(plan(inputs, small_tokenizer), tmp_path / "out")
    monkeypatch.setattr(os, "fsync", real)
    outcome = prepare(plan(inputs, small_tokenizer), tmp_path / "out")
    assert outcome.units_reused > 0
    prepare(plan(inputs, small_tokenizer), tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(UserError, match="shard_tokens must be positive"):
        Settings(shard_tokens=0)


def test_the_manifest_keeps_the_settings(inputs: Path, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    prepare(plan(inputs, small_tokenizer), tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]
    assert settings["shard_tokens"] == 500
    assert settings["reading"]["text_field"] == "text"
    assert (settings["filters"], settings["dedup"]) == ([], None)
