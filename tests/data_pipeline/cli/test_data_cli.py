"""``nystrom data`` as it is typed."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.cli import main
from data_pipeline.errors import UserError, run_cli
from data_pipeline.shards.shardset import ShardSet, verify_shards

TEXTS = [f"the document number {i} is about {'many words ' * (i % 9)}" for i in range(200)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate([*TEXTS, " "])))
    return path


def nystrom(*words: object) -> None:
    assert not main([str(word) for word in words])


def make_tokenizer(corpus: Path, size: int = 300) -> Path:
    nystrom("tokenizer", "--input", corpus, "--vocab-size", size, "--out", corpus.parent / "tok")
    return corpus.parent / "tok"


def test_from_text_to_shards(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = make_tokenizer(corpus)
    assert "300 tokens" in capsys.readouterr().out
    out = corpus.parent / "out"
    prepare = ("prepare", "--input", corpus, "--tokenizer", tokenizer, "--out", out, "--shard-tokens", 1000)
    nystrom(*prepare)
    said = capsys.readouterr().out
    assert "200 documents (1 without text skipped)" in said
    assert "uint16, " in said
    assert re.search(r" KiB of text in [\d.]+ s, [\d.]+ \w+/s", said)
    nystrom(*prepare)
    assert "already complete" in capsys.readouterr().out
    nystrom("verify", out)
    assert "all as the manifest says" in capsys.readouterr().out
    nystrom("inspect", out)
    said = capsys.readouterr().out
    for part in ("documents", "bytes per token", "unigram entropy", "nats per token", "'the document number 20 is"):
        assert part in said


def test_several_inputs(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = make_tokenizer(corpus)
    (tmp_path / "b.txt").write_text("one more")
    (tmp_path / "c.txt").write_text("and another")
    words = ["--input", corpus, tmp_path / "b.txt", "--input", tmp_path / "c.txt"]
    nystrom("prepare", *words, "--tokenizer", tokenizer, "--out", tmp_path / "out")
    assert "202 documents" in capsys.readouterr().out


def test_a_trained_tokenizer_is_not_trained_again(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = make_tokenizer(corpus)
    stamp = (tokenizer / "tokenizer.json").stat().st_mtime_ns
    capsys.readouterr()
    make_tokenizer(corpus)
    assert "already trained on this text" in capsys.readouterr().out
    assert (tokenizer / "tokenizer.json").stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match="already holds a tokenizer trained otherwise"):
        make_tokenizer(corpus, 290)
    corpus.write_text(corpus.read_text().replace("document number 7 ", "document number 8 "))
    with pytest.raises(UserError, match="already holds a tokenizer trained otherwise"):
        make_tokenizer(corpus)
    nystrom("tokenizer", "--input", corpus, "--vocab-size", 290, "--out", tokenizer, "--overwrite")
    assert "290 tokens" in capsys.readouterr().out


def test_overwriting_the_folder_that_the_tokenizer_comes_from_is_refused(corpus: Path) -> None:
    out = corpus.parent / "out"
    nystrom("prepare", "--input", corpus, "--tokenizer", make_tokenizer(corpus), "--out", out)
    for tokenizer in (out, out / "tokenizer.json"):
        with pytest.raises(UserError, match="--overwrite would remove the tokenizer"):
            nystrom("prepare", "--input", corpus, "--tokenizer", tokenizer, "--out", out, "--overwrite")
    nystrom("prepare", "--input", corpus, "--tokenizer", out, "--out", out)  # complete already


def test_a_vocabulary_that_could_not_be_filled_is_said(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_tokenizer(corpus, 5000)
    said = capsys.readouterr().out
    assert "5,000 were asked for" in said


def test_damage_is_named(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = corpus.parent / "out"
    nystrom("prepare", "--input", corpus, "--tokenizer", make_tokenizer(corpus), "--out", out)
    path = out / "tokens-00000-00000.bin"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"1 fault\(s\):\n.*tokens-00000-00000.bin, block 0"):
        nystrom("verify", out)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tokenizer", "--input", "none.jsonl", "--out", "t"], "input none.jsonl does not exist"),
        (["tokenizer", "--input", "*.parquet", "--out", "t"], r"pattern \*.parquet matches no file"),
        (["tokenizer", "--input", "a.jsonl", "--vocab-size", "100", "--out", "t"], "vocabulary of 100 is too small"),
        (["tokenizer", "--input", "a.jsonl", "--text-field", "body", "--out", "t"], "no field 'body'.*: text, id"),
        (["tokenizer", "--input", "-", "--out", "t"], "save standard input to a file first"),
        (["prepare", "--tokenizer", "tok", "--out", "o"], "either --input or --dataset"),
        (["prepare", "--input", "a.jsonl", "--dataset", "x", "--tokenizer", "tok", "--out", "o"], "either --input or"),
        (["prepare", "--input", "a.jsonl", "-", "--tokenizer", "tok", "--out", "o"], "cannot be mixed with files"),
        (
            ["prepare", "--input", "a.jsonl", "--tokenizer", "tok", "--out", "o", "--shard-index", "1"],
            "belong together",
        ),
        (["prepare", "--input", "a.jsonl", "--tokenizer", "tok", "--out", "o", "--workers", "0"], "at least 1, got 0"),
        (["prepare", "--input", "a.jsonl", "--tokenizer", "tok", "--out", "o", "--max-bad-fraction", "2"], "got 2.0"),
        (["prepare", "--input", "a.jsonl", "--tokenizer", "tok", "--out", "o", "--filter", "gofer"], "gofer"),
        (["prepare", "--input", "a.jsonl", "--tokenizer", "none", "--out", "o"], "no tokenizer at none"),
        (["prepare", "--input", "x.jsonl", "--tokenizer", "tok", "--out", "o"], "input x.jsonl does not exist"),
        (["prepare", "--input", "a.jsonl", "--tokenizer", "tok", "--out", "."], "holds files that are not shards"),
        (["prepare", "--input", "a.jsonl", "--tokenizer", "tok", "--out", "a.jsonl"], "is a file, not a folder"),
        (["verify", "none"], "shard folder none does not exist"),
        (["inspect", "tok"], "has no manifest.json"),
    ],
)
def test_mistakes_are_told_without_a_traceback(
    words: list[str], message: str, corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tokenizer(corpus)
    monkeypatch.chdir(corpus.parent)
    with pytest.raises(UserError, match=message):
        main(words)
    capsys.readouterr()
    assert run_cli(main, "nystrom data", words) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if not line.endswith(" ...")]  # that it began
    assert said[0].startswith("nystrom data: error: ")


def test_zero_documents_for_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(UserError, match="no documents to train a tokenizer on"):
        nystrom("tokenizer", "--input", tmp_path / "a.jsonl", "--out", tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_help_is_instant_and_has_an_example() -> None:
    root = Path(__file__).parents[3]
    script = "import sys; from data_pipeline.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\n" + (
        "heavy = {'torch', 'datasets', 'pyarrow', 'tokenizers', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    )
    for words in (["--help"], ["stdlib", "-h"], ["tokenizer", "-h"], ["prepare", "-h"], ["verify", "-h"]):
        done = subprocess.run(
            [sys.executable, "-c", script, *words], cwd=root, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "example" in done.stdout
        assert "nystrom data" in done.stdout


def test_it_runs_as_a_module(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "data_pipeline", "verify", str(tmp_path)],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("nystrom data: error: ")
    assert "Traceback" not in done.stderr


def test_a_reader_that_goes_away_is_no_traceback(corpus: Path) -> None:
    out = corpus.parent / "out"
    nystrom("prepare", "--input", corpus, "--tokenizer", make_tokenizer(corpus), "--out", out)
    command = f"{sys.executable} -m data_pipeline inspect {out} --samples 200 | head -n 1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == str(out)
    assert re.sub(r"^(counting [\d,]+ tokens \.\.\.|next: nystrom init .*)\n", "", done.stderr, flags=re.M) == ""


def test_the_filters_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["prepare", "--list-filters"])
    assert ended.value.code == 0
    listed = capsys.readouterr().out
    assert "gopher-quality" in listed
    assert "(Gopher, A.1.1)" in listed
    assert "Rae et al. 2021" in listed
    assert "()" not in listed


def test_settings_that_differ_are_named(corpus: Path) -> None:
    tokenizer, out = make_tokenizer(corpus), corpus.parent / "out"
    words = ["prepare", "--input", corpus, "--tokenizer", tokenizer, "--out", out]
    nystrom(*words)
    with pytest.raises(UserError, match=r"shards made with another normalize: None, now nfc: choose another folder"):
        nystrom(*words, "--normalize", "nfc")


def run_data(*words: object, before: str = "", stdin: str = "", env: dict[str, str] | None = None) -> Any:
    """The command in a process of its own, through a shell with other words before and behind it."""
    command = " ".join(shlex.quote(str(word)) for word in (sys.executable, "-m", "data_pipeline", *words))
    repository = Path(__file__).parents[3]
    return subprocess.run(
        ["bash", "-c", f"{before} {command} {stdin}"],
        capture_output=True,
        encoding="latin-1",
        env={**os.environ, "PYTHONPATH": str(repository), **(env or {})},
        timeout=300,
    )


def test_characters_that_the_output_lacks_are_escaped(tmp_path: Path) -> None:
    path = tmp_path / "日本.jsonl"
    path.write_text(json.dumps({"text": "日本 ☃ 😀 été " * 30}) + "\n")
    tokenizer = make_tokenizer(path)
    nystrom("prepare", "--input", path, "--tokenizer", tokenizer, "--out", tmp_path / "out")
    for env in ({"PYTHONIOENCODING": "latin1"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}):
        done = run_data("inspect", tmp_path / "out", env=env)
        assert done.returncode == 0
        assert [line.split()[0] for line in done.stderr.splitlines()] == ["counting", "next:"]
        assert "\\u65e5\\u672c.jsonl (1 documents)" in done.stdout
        done = run_data("inspect", tmp_path / "out", "--json", env=env)
        assert json.loads(done.stdout)["samples"][0]["text"].startswith("日本 ☃ 😀 été")


@pytest.mark.parametrize("closed", ["<&-", "<&- >&- 2>&-"])
def test_closed_standard_streams(corpus: Path, closed: str) -> None:
    words = ["prepare", "--tokenizer", make_tokenizer(corpus), "--out", corpus.parent / "out", "--workers", 2]
    done = run_data(*words, "--input", "-", stdin=closed)
    assert done.returncode == 2
    if closed == "<&-":
        assert "error: --input - reads standard input, which is closed" in done.stderr
        assert "Traceback" not in done.stderr
    done = run_data(*words, "--input", corpus, stdin=closed)
    assert done.returncode == 0, done.stderr
    assert verify_shards(corpus.parent / "out") == []


@pytest.mark.parametrize("command", ["prepare", "tokenizer", "contamination"])
def test_a_pipe_as_input_is_refused_with_the_remedy(corpus: Path, command: str) -> None:
    tokenizer = make_tokenizer(corpus)
    nystrom("prepare", "--input", corpus, "--tokenizer", tokenizer, "--out", corpus.parent / "out")
    pipe = corpus.parent / "pipe.jsonl"
    os.mkfifo(pipe)
    words: list[object] = {
        "prepare": ["--input", pipe, "--tokenizer", tokenizer, "--out", corpus.parent / "other"],
        "tokenizer": ["--input", pipe, "--out", corpus.parent / "other"],
        "contamination": ["--shards", corpus.parent / "out", "--eval", pipe],
    }[command]
    with pytest.raises(UserError, match=r"pipe\.jsonl is a pipe or a device.*save it to a file; .*--input - --stdin"):
        nystrom(command, *words)


def test_an_output_folder_inside_the_inputs_is_not_an_input(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its bad_records.jsonl made the same command say, the second time, that the shards are of other inputs."""
    tokenizer = make_tokenizer(corpus)
    folder = corpus.parent / "text"
    folder.mkdir()
    shutil.copy(corpus, folder)
    with open(folder / "a.jsonl", "a") as f:
        f.write("broken\n")
    for given in (folder, folder / "**" / "*.jsonl"):
        out = folder / "shards" / given.name.strip("*")
        words = ["prepare", "--input", given, "--tokenizer", tokenizer, "--out", out, "--max-bad-fraction", "0.1"]
        nystrom(*words)
        assert (out / "bad_records.jsonl").exists()
        capsys.readouterr()
        nystrom(*words)
        assert "already complete" in capsys.readouterr().out
        shutil.rmtree(out)
    words = ["tokenizer", "--input", folder, "--vocab-size", 300, "--out", folder / "tokenizer"]
    (folder / "a.jsonl").write_bytes(corpus.read_bytes())
    nystrom(*words)
    nystrom(*words)
    assert "already trained on this text" in capsys.readouterr().out


def test_files_of_kinds_that_are_not_read_are_told(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = corpus.parent / "mixed"
    folder.mkdir()
    shutil.copy(corpus, folder)
    for name in ("b.jsonl.bz2", "c.jsonl.bz2", "d"):
        (folder / name).write_bytes(b"?")
    nystrom("tokenizer", "--input", folder, "--vocab-size", 300, "--out", corpus.parent / "made")
    expected = f"note: 3 file(s) are left out, of kinds that are not read (.bz2 2, no ending 1); the first: {folder}"
    assert expected in capsys.readouterr().err
    nystrom("prepare", "--input", folder, "--tokenizer", corpus.parent / "made", "--out", corpus.parent / "shards")
    assert expected in capsys.readouterr().err


def test_a_folder_that_cannot_be_locked_is_refused(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(lock: int, kind: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    words = ["prepare", "--input", corpus, "--tokenizer", make_tokenizer(corpus), "--out", corpus.parent / "out"]
    monkeypatch.setattr("fcntl.flock", unsupported)
    with pytest.raises(UserError, match=r"out cannot be locked \(Function not implemented\).*-o flock"):
        nystrom(*words)


def test_a_full_disk_leaves_no_temporary_files(corpus: Path) -> None:
    tokenizer, text, out = make_tokenizer(corpus), corpus.parent / "long.jsonl", corpus.parent / "out"
    text.write_text("".join(json.dumps({"text": "a document " * 500}) + "\n" for _ in range(100)))
    words = ["prepare", "--input", text, "--tokenizer", tokenizer, "--out", out, "--workers", "1"]
    done = run_data(*words, before="ulimit -f 100;")  # KiB a file; the shard has 195
    assert done.returncode == 2
    assert "writing to" in done.stderr
    assert "File too large" in done.stderr
    assert [path.name for path in out.rglob("*.tmp")] == []
    assert run_data(*words).returncode == 0


def test_contamination_writes_its_file_also_if_nobody_reads_what_it_says(corpus: Path) -> None:
    out = corpus.parent / "out"
    nystrom("prepare", "--input", corpus, "--tokenizer", make_tokenizer(corpus), "--out", out)
    result = corpus.parent / "result" / "c.json"
    words = ["contamination", "--shards", out, "--eval", corpus, "--workers", "1", "--out", result]
    run_data(*words, stdin="| true", env={"PYTHONUNBUFFERED": "1"})
    assert json.loads(result.read_text())["files"][0]["texts"] == 200


def test_an_output_that_cannot_be_written_is_told_before_the_work(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, blocked = corpus.parent / "out", corpus / "below a file" / "x"
    nystrom("prepare", "--input", corpus, "--tokenizer", make_tokenizer(corpus), "--out", out)
    for name in (
        "tokenization.training.train_tokenizer",
        "quality.contamination.contamination",
        "shards.summary.summarise",
    ):
        monkeypatch.setattr(f"data_pipeline.{name}", lambda *_, **__: pytest.fail("the work began"))
    for words in (
        ["tokenizer", "--input", corpus, "--out", blocked],
        ["contamination", "--shards", out, "--eval", corpus, "--out", blocked],
        ["inspect", out, "--page", blocked],
    ):
        with pytest.raises(UserError, match=r"below a file/x.* cannot be written: .*a\.jsonl: Not a directory"):
            nystrom(*words)


def test_documents_without_a_token_are_empty(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They became a lone end token."""
    tokenizer, text = corpus.parent / "lower", corpus.parent / "text.jsonl"
    nystrom(
        "tokenizer", "--input", corpus, "--model", "wordpiece", "--lowercase", "--vocab-size", 200, "--out", tokenizer
    )
    words = ["prepare", "--input", text, "--tokenizer", tokenizer, "--out", corpus.parent / "out"]
    text.write_text('{"text": "\\u200b"}\n')  # a character that BERT's normalisation takes out
    with pytest.raises(UserError, match=r"no documents: .*1 without text"):
        nystrom(*words)
    text.write_text('{"text": "the words"}\n{"text": "\\u200b\\u200b"}\n{"text": "the"}\n')
    capsys.readouterr()
    nystrom(*words)
    assert "2 documents (1 without text skipped)" in capsys.readouterr().out
    shards = ShardSet.open(corpus.parent / "out")
    assert [len(ids) > 0 for ids in shards.documents()] == [True, True]
    assert (shards.num_documents, shards.manifest.empty_documents, shards.manifest.text_bytes) == (2, 1, 12)
