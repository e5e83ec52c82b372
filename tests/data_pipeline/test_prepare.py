"""Preparing shards: the same bytes however often it is killed, and no mixing of one plan with another."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from data_pipeline.errors import UserError
from data_pipeline.prepare.run import Preparation, UnitResult, plan_preparation, prepare
from data_pipeline.shards.manifest import read_manifest
from data_pipeline.shards.verify import verify_shards
from data_pipeline.sources.documents import Document
from data_pipeline.tokenization.tokenizer import Tokenizer, train_tokenizer

TEXTS = [f"document {i} says {'word ' * (i % 23)}and {i * i}" for i in range(240)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 320)


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    folder = tmp_path / "inputs"
    folder.mkdir()
    for part in range(6):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[part * 40 : part * 40 + 40])
        (folder / f"{part}.jsonl").write_text(lines)
    return folder


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units of two of the files above, instead of 64 MB."""
    monkeypatch.setattr("data_pipeline.prepare.run.UNIT_BYTES", 9000)


def plan(inputs: Path, tokenizer: Tokenizer) -> Preparation:
    preparation = plan_preparation([inputs], tokenizer, shard_tokens=500)
    assert len(preparation.units) > 2
    return preparation


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_equal_inputs_give_equal_bytes_wherever_they_lie(inputs: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    prepare(plan(inputs, tokenizer), tmp_path / "one")
    elsewhere = tmp_path / "elsewhere" / "deep"
    elsewhere.parent.mkdir()
    inputs.rename(elsewhere)
    time.sleep(0.01)
    prepare(plan(elsewhere, tokenizer), tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert str(tmp_path).encode() not in (tmp_path / "one" / "manifest.json").read_bytes()


def test_a_complete_folder_is_left_alone(inputs: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    first = prepare(plan(inputs, tokenizer), tmp_path / "out")
    assert not first.already_complete
    assert first.documents == len(TEXTS)
    stamps = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    again = prepare(plan(inputs, tokenizer), tmp_path / "out")
    assert again.already_complete
    assert again.documents == 0
    assert stamps == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    assert again.shards.fingerprint == first.shards.fingerprint


# Runs in a process of its own: one import, then for each point a forked child that kills itself there with SIGKILL.
KILLER = """
import os, signal, sys, traceback
from pathlib import Path
import datasets, pyarrow
import data_pipeline.prepare.run as p, data_pipeline.files as files
from data_pipeline.tokenization.tokenizer import Tokenizer

p.UNIT_BYTES = 9000
inputs, tokenizer, out, points = sys.argv[1], Tokenizer.load(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]

def forked(action):
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            action()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def run(folder, kill_at):
    calls = 0
    def counted(real):
        def call(*args, **options):
            nonlocal calls
            calls += 1
            if calls == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)
        return call
    os.fsync, os.replace, os.rmdir = counted(os.fsync), counted(os.replace), counted(os.rmdir)
    os.unlink = counted(os.unlink)
    p.prepare(p.plan_preparation([inputs], tokenizer, shard_tokens=500), folder)
    (folder.parent / "calls").write_text(str(calls))

p.prepare(p.plan_preparation([inputs], tokenizer, shard_tokens=500), out / "warm")  # late imports, for all
assert forked(lambda: run(out / "whole", None)) == 0
total = int((out / "calls").read_text())
for point in sorted({min(total, 1 + int(float(point) * total)) for point in points}):
    folder = out / f"killed-{point}"
    codes = [forked(lambda: run(folder, kill)) for kill in (point, 5, None)]  # killed again soon after the restart
    assert codes[0] == -signal.SIGKILL and codes[1] in (-signal.SIGKILL, 0) and codes[2] == 0, (point, codes)
print(total)
"""


def kill_at(points: list[float], inputs: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer")
    out = tmp_path / "out"
    out.mkdir()
    root = Path(__file__).parents[2]
    arguments = [str(inputs), str(tmp_path / "tokenizer"), str(out), *map(str, points)]
    done = subprocess.run(
        [sys.executable, "-c", KILLER, *arguments],
        cwd=root,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    whole = contents(out / "whole")
    folders = sorted(out.glob("killed-*"))
    assert folders
    for folder in folders:
        assert contents(folder) == whole, folder.name


def test_killed_at_any_write_it_ends_with_the_same_bytes(inputs: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    kill_at([i / 12 for i in range(12)] + [0.96, 0.98, 1.0], inputs, tokenizer, tmp_path)


@pytest.mark.slow
def test_killed_at_every_single_write(inputs: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    kill_at([i / 1000 for i in range(1001)], inputs, tokenizer, tmp_path)


@pytest.mark.slow
def test_killed_from_outside_at_random_moments(inputs: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer")
    script = textwrap.dedent(
        """
        import sys, time
        import data_pipeline.prepare.run as p
        from data_pipeline.tokenization.tokenizer import Tokenizer
        p.UNIT_BYTES = 9000
        plan = p.plan_preparation([sys.argv[1]], Tokenizer.load(sys.argv[2]), shard_tokens=500)
        print("started", flush=True)
        p.prepare(plan, sys.argv[3], on_document=lambda document: time.sleep(0.002))
        """
    )
    out = tmp_path / "out"
    command = [sys.executable, "-c", script, str(inputs), str(tmp_path / "tokenizer"), str(out)]
    killed = 0
    for attempt in range(8):
        process = subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.02 + 0.11 * attempt)
        process.kill()
        killed += process.wait() != 0
    assert killed > 3
    prepare(plan(inputs, tokenizer), out)
    prepare(plan(inputs, tokenizer), tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


class Crash(BaseException):
    pass


def crash_after(documents: int, inputs: Path, tokenizer: Tokenizer, folder: Path) -> None:
    left = documents

    def count(document: Document) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise Crash

    with pytest.raises(Crash):
        prepare(plan(inputs, tokenizer), folder, on_document=count)


def test_finished_units_are_not_done_again(inputs: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    crash_after(200, inputs, tokenizer, tmp_path / "out")
    with pytest.raises(UserError, match="has not finished"):
        read_manifest(tmp_path / "out")
    reused: list[UnitResult] = []
    seen: list[Document] = []
    outcome = prepare(plan(inputs, tokenizer), tmp_path / "out", on_document=seen.append, on_reused=reused.append)
    assert outcome.units_reused == len(reused) > 0
    assert sum(result.documents for result in reused) + len(seen) == len(TEXTS)
    assert outcome.documents == len(seen) < len(TEXTS)
    prepare(plan(inputs, tokenizer), tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_unit_whose_file_was_cut_is_done_again(inputs: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    crash_after(200, inputs, tokenizer, tmp_path / "out")
    first = tmp_path / "out" / "tokens-00000-00000.bin"
    first.write_bytes(first.read_bytes()[:-2])
    prepare(plan(inputs, tokenizer), tmp_path / "out")
    assert verify_shards(tmp_path / "out") == []


def test_another_plan_in_the_same_folder_is_refused(inputs: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    done, undone = tmp_path / "done", tmp_path / "undone"
    prepare(plan(inputs, tokenizer), done)
    crash_after(200, inputs, tokenizer, undone)
    other_tokenizer = train_tokenizer(TEXTS, 300)
    others = [
        plan(inputs, other_tokenizer),
        plan_preparation([inputs], tokenizer, shard_tokens=501),
        plan_preparation([inputs / "0.jsonl"], tokenizer, shard_tokens=500),
    ]
    before = contents(done), contents(undone)
    for other in others:
        with pytest.raises(UserError, match="shards of other inputs, another tokenizer or other settings"):
            prepare(other, done)
        with pytest.raises(UserError, match="an unfinished run with other inputs"):
            prepare(other, undone)
    assert (contents(done), contents(undone)) == before


def test_changed_contents_are_another_plan(inputs: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    prepare(plan(inputs, tokenizer), tmp_path / "done")
    text = (inputs / "3.jsonl").read_text()
    (inputs / "3.jsonl").write_text(text.replace("document 130", "document 13x"))  # the same name and size
    with pytest.raises(UserError, match="shards of other inputs"):
        prepare(plan(inputs, tokenizer), tmp_path / "done")


def test_overwrite_replaces_shards(inputs: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    done, undone = tmp_path / "done", tmp_path / "undone"
    prepare(plan(inputs, tokenizer), done)
    crash_after(200, inputs, tokenizer, undone)
    other = plan_preparation([inputs / "0.jsonl"], tokenizer, shard_tokens=300)
    prepare(other, tmp_path / "fresh")
    for folder in (done, undone):
        prepare(other, folder, overwrite=True)
        assert contents(folder) == contents(tmp_path / "fresh")
    outcome = prepare(other, done, overwrite=True)  # asked for explicitly: done again though it is the same
    assert (outcome.already_complete, outcome.units_reused) == (False, 0)


def test_an_interrupted_overwrite_goes_on(inputs: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    crash_after(200, inputs, tokenizer, tmp_path / "out")
    assert prepare(plan(inputs, tokenizer), tmp_path / "out", overwrite=True).units_reused > 0


def test_a_folder_with_other_things_is_not_touched(inputs: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("irreplaceable")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"holds files that are not shards \(thesis\.txt\)"):
            prepare(plan(inputs, tokenizer), out, overwrite=overwrite)
    assert contents(out) == {"thesis.txt": b"irreplaceable"}
    with pytest.raises(UserError, match="is a file, not a folder"):
        prepare(plan(inputs, tokenizer), out / "thesis.txt")


def test_shards_that_lost_their_manifest_are_not_overwritten_unasked(
    inputs: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    prepare(plan(inputs, tokenizer), tmp_path / "out")
    (tmp_path / "out" / "manifest.json").unlink()
    with pytest.raises(UserError, match="shards without a manifest"):
        prepare(plan(inputs, tokenizer), tmp_path / "out")


def test_two_processes_in_one_folder_are_refused(inputs: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    def second(document: Document) -> None:
        with pytest.raises(UserError, match="another process is preparing"):
            prepare(plan(inputs, tokenizer), tmp_path / "out")
        raise Crash

    with pytest.raises(Crash):
        prepare(plan(inputs, tokenizer), tmp_path / "out", on_document=second)


@pytest.mark.parametrize("content", ["", '{"text": ""}\n{"text": null}\n{"text": " \\n"}\n'])
def test_zero_documents_are_refused(content: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    message = "no documents: .*a.jsonl.*" + ("3 record.*without text in 'text'" if content else "no records")
    for _ in range(2):  # and again: nothing of the first attempt is in the way
        with pytest.raises(UserError, match=message):
            prepare(plan_preparation([tmp_path / "a.jsonl"], tokenizer), tmp_path / "out")
    (tmp_path / "a.jsonl").write_text('{"text": "something"}\n')
    assert prepare(plan_preparation([tmp_path / "a.jsonl"], tokenizer), tmp_path / "out").documents == 1


def test_empty_documents_and_empty_files_are_counted_and_left_out(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": ""}\n{"text": "y"}\n')
    (tmp_path / "b.jsonl").write_text("")
    (tmp_path / "c.txt").write_text(" \n")
    shards = prepare(plan_preparation([tmp_path], tokenizer), tmp_path / "out").shards
    assert (shards.num_documents, shards.manifest.empty_documents) == (2, 1 + 1)
    assert [shards.tokenizer().decode(ids) for ids in shards.documents()] == ["x", "y"]


def test_a_finished_unit_whose_input_changed_is_done_again(inputs: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    crash_after(200, inputs, tokenizer, tmp_path / "out")
    first = inputs / "0.jsonl"
    first.write_text(first.read_text().replace("document 3 ", "document 4 "))  # the same name and size
    prepare(plan(inputs, tokenizer), tmp_path / "out")
    prepare(plan(inputs, tokenizer), tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


@pytest.mark.parametrize("at", [0, 3, 5])
def test_bad_input_stops_and_the_mended_run_goes_on(
    inputs: Path, tokenizer: Tokenizer, tmp_path: Path, at: int
) -> None:
    broken = inputs / f"{at}.jsonl"
    whole = broken.read_text()
    broken.write_text(whole[:-10] if at else whole * 5 + "x\n")  # larger or smaller, so that other files share its unit
    with pytest.raises(UserError, match=rf"{at}\.jsonl, line {40 if at else 201}: not a JSON record"):
        prepare(plan(inputs, tokenizer), tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()
    broken.write_text(whole)
    outcome = prepare(plan(inputs, tokenizer), tmp_path / "out")
    assert (outcome.units_reused > 0) == (at > 0)
    prepare(plan(inputs, tokenizer), tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_compressed_and_plain_text_give_the_same_tokens(inputs: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    packed.mkdir()
    for path in inputs.iterdir():
        (packed / (path.name + ".gz")).write_bytes(gzip.compress(path.read_bytes()))
    plain = prepare(plan(inputs, tokenizer), tmp_path / "a").shards
    unpacked = prepare(plan_preparation([packed], tokenizer), tmp_path / "b").shards
    assert [d.tolist() for d in plain.documents()] == [d.tolist() for d in unpacked.documents()]


def test_units_follow_the_sizes_of_files_only(inputs: Path, tokenizer: Tokenizer) -> None:
    (inputs / "2.jsonl").write_text('{"text": "large"}\n' * 1000)
    units = plan_preparation([inputs], tokenizer).units
    assert [number for unit in units for number in unit.files] == list(range(6))
    assert (2,) in [unit.files for unit in units]  # larger than a unit: alone


def test_a_full_disk_is_said(
    inputs: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"writing to .*out failed: .*No space left on device"):
        prepare(plan(inputs, tokenizer), tmp_path / "out")
    monkeypatch.undo()
    prepare(plan_preparation([inputs], tokenizer, shard_tokens=500), tmp_path / "out", overwrite=True)
    assert verify_shards(tmp_path / "out") == []


def test_impossible_settings_are_refused(inputs: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="shard_tokens must be positive"):
        plan_preparation([inputs], tokenizer, shard_tokens=0)
