"""The names of `nystrom_pretrain`: cheap to import, and strict about what they are given."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import nystrom_pretrain as nystrom
from data_pipeline import bars
from data_pipeline.shards.shardset import ShardSet

REPOSITORY = Path(__file__).resolve().parents[2]
TEXTS = [f"the river number {number} runs under the stone bridge" for number in range(40)]


def documents(shards: ShardSet) -> list[list[int]]:
    return [document.tolist() for document in shards.documents()]


def test_the_import_brings_nothing_heavy() -> None:
    code = "import nystrom_pretrain, sys; dir(nystrom_pretrain); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert not loaded & {"torch", "numpy", "deepspeed", "pydantic", "yaml", "launch", "eval", "pretrain"}


def test_every_name_is_there_and_no_other() -> None:
    assert [name for name in dir(nystrom) if not name.startswith("__")] == sorted(nystrom.__all__)
    for name in ("UserError", "prepare", "train", "Run", "Results"):
        assert getattr(nystrom, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = nystrom.nothing


def test_a_package_in_the_way_is_an_import_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nystrom, "_hidden", lambda words: "'eval' is found in /elsewhere")
    with pytest.raises(ImportError, match="'eval' is found in /elsewhere"):
        nystrom.__getattr__("evaluate")


def test_texts_rows_and_files_give_the_same_tokens(tmp_path: Path) -> None:
    shards = nystrom.prepare(TEXTS, tmp_path / "list", vocab_size=300)
    assert shards.num_documents == 40
    assert shards.tokenizer().decode(documents(shards)[0]) == TEXTS[0]
    before = (tmp_path / "list" / "manifest.json").read_bytes()
    assert nystrom.prepare(TEXTS, tmp_path / "list", vocab_size=300).num_tokens == shards.num_tokens
    assert (tmp_path / "list" / "manifest.json").read_bytes() == before

    rows = nystrom.prepare(({"body": text} for text in TEXTS), tmp_path / "r", tokenizer=shards, text_field="body")
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    for named in (file, str(tmp_path / "*.jsonl"), [file]):
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        files = nystrom.prepare(named, out, tokenizer=tmp_path / "list")
        assert documents(files) == documents(shards)
    assert documents(rows) == documents(shards)
    own = nystrom.prepare(file, tmp_path / "own", vocab_size=300)
    assert own.tokenizer_hash == shards.tokenizer_hash


def test_prepare_names_what_it_cannot_take(tmp_path: Path) -> None:
    out = tmp_path / "out"
    file = tmp_path / "t.txt"
    file.write_text("text")
    for texts, options, message in (
        (iter(TEXTS), {}, "an iterator is read once"),
        ([str(file)], {}, "is the name of a file"),
        ([{"body": "x"}], {}, "row 0 has no field 'text' but body"),
        (["x", 3], {}, "row 1 is int, not text"),
        ([], {}, "no documents"),
        (3, {}, "not int"),
        ({"text": "x"}, {}, "not dict"),
        (TEXTS, {"dedup": "exact"}, "dedup reads the texts twice"),
        (TEXTS, {"workers": 0}, "workers must be at least 1"),
        (TEXTS, {"vocab_size": 10}, "a vocabulary of 10 is too small"),
        (TEXTS, {"filters": ["nothing"]}, "nothing"),
        (tmp_path / "none.txt", {}, "none.txt"),
    ):
        with pytest.raises(nystrom.UserError, match=message):
            nystrom.prepare(texts, out, **options)  # type: ignore[arg-type]
    assert not out.exists()


def test_train_names_what_is_wrong_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    config = {
        "name": "r",
        "output_dir": str(tmp_path),
        "model": {"objective": "mlm"},
        "data": {"train": tmp_path / "no-shards"},
        "curriculum": [{"until_tokens": 1024, "seq_len": 32, "micro_batch": 3}],
        "batch_tokens": 256,
    }
    for wrong, options, message in (
        (config, {"resume": "maybe"}, "resume 'maybe'"),
        (config, {"nproc": 0}, "nproc 0"),
        (config, {"modle__objective": "clm"}, "modle"),
        (config, {"optimizer__lr": "fast"}, "optimizer.lr"),
        (config, {"curriculum.3.seq_len": 1}, "a list of 1"),
        (config, {}, "no-shards"),
        ({**config, "seed": object()}, {}, "object cannot be written"),
        (tmp_path / "none.yaml", {}, "does not exist"),
    ):
        with pytest.raises(nystrom.UserError, match=message):
            nystrom.train(wrong, **options)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == []
    assert config["data"] == {"train": tmp_path / "no-shards"}  # the caller's own


def test_a_run_is_read_from_its_files(tmp_path: Path) -> None:
    run = nystrom.Run(tmp_path)
    assert (run.state, run.metrics(), run.loss, run.export) == ("unknown", [], None, None)
    lines = [{"kind": "train", "step": 1, "loss": 3.0}, {"kind": "event"}, {"kind": "train", "step": 2, "loss": 2.0}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"kind": "tra')
    (tmp_path / "status.json").write_text('{"state": "preempted"}')
    assert [row["step"] for row in run.metrics()] == [1, 2]
    assert (run.loss, run.state) == (2.0, "preempted")
    with open(tmp_path / "metrics.jsonl", "w") as stream:
        stream.write(text + '{"kind": "valid", "loss": 2.5}\n')
    assert run.loss == 2.5


def test_evaluate_names_what_is_wrong(tmp_path: Path) -> None:
    for arguments, settings, message in (
        ((tmp_path, []), {}, "no suite is named"),
        ((tmp_path, "nothing"), {}, "no suite 'nothing'"),
        ((None, "lm"), {}, "give a checkpoint"),
        ((tmp_path, "lm"), {"lenght": 3}, "'lenght' has no effect.*did you mean 'length'"),
        ((tmp_path, "lm"), {"pppl__length": 3}, "no suite 'pppl' is run"),
        ((tmp_path / "none", "lm"), {}, "does not exist"),
    ):
        with pytest.raises(nystrom.UserError, match=message):
            nystrom.evaluate(*arguments, **settings)  # type: ignore[arg-type]


def test_a_report_is_written_to_a_file(tmp_path: Path) -> None:
    with pytest.raises(nystrom.UserError, match="is a folder: name the page"):
        nystrom.report(tmp_path, tmp_path)
    with pytest.raises(nystrom.UserError, match="not a run folder"):
        nystrom.report(tmp_path, tmp_path / "r.html")


def test_a_notebook_gets_a_bar_and_a_file_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with bars.progress_bar(total=2) as bar:
        assert bar.disable
    assert not bars.in_notebook()
    module = ModuleType("IPython")
    shell = SimpleNamespace(config={})
    monkeypatch.setattr(module, "get_ipython", lambda: shell, raising=False)
    monkeypatch.setitem(sys.modules, "IPython", module)
    assert not bars.in_notebook()  # at a terminal
    shell.config["IPKernelApp"] = {}
    assert bars.in_notebook()
    # Without ipywidgets: text on standard output, where what is printed goes too, and no warning of tqdm's.
    monkeypatch.setattr(bars, "find_spec", lambda name: None)
    with bars.progress_bar(total=2, desc="counting") as bar:
        assert not bar.disable
        bar.update(2)
    captured = capsys.readouterr()
    assert "counting: 100%" in captured.out
    assert captured.err == ""
