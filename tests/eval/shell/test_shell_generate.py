"""`nystrom generate`: what pretrain.model.generation writes, as text, streamed, in batches and as records."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from suites_case import subject_of

from data_pipeline.errors import UserError
from eval.results.schema import Metric, ModelInfo, Result, Table, write_result
from eval.shell import generate as command
from eval.shell.opening import open_model
from eval.shell.stream import Detokenizer
from eval.shell.texts import converse
from launch import program
from pretrain.checkpoint.load import LoadedModel, load_model
from pretrain.model.beam import beam_search
from pretrain.model.generation import generate

PROMPTS = ["river stone", "cloud", "the quiet münster lamp and seven windows"]
SHORT = ["--max-new-tokens", "12"]


@pytest.fixture(scope="module")
def loaded(causal: Path) -> LoadedModel:
    return load_model(causal)


def run(capsys: pytest.CaptureFixture[str], checkpoint: Path, *words: str) -> str:
    assert program.main(["generate", "--checkpoint", str(checkpoint), *SHORT, *words]) == 0
    return capsys.readouterr().out


def records(capsys: pytest.CaptureFixture[str], checkpoint: Path, *words: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run(capsys, checkpoint, "--json", *words).splitlines()]


def refused(capsys: pytest.CaptureFixture[str], checkpoint: Path | str, *words: str) -> str:
    assert program.main(["generate", "--checkpoint", str(checkpoint), *words]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    return said.err


def prompts(*texts: str) -> list[str]:
    return [word for text in texts for word in ("--prompt", text)]


def type_in(monkeypatch: pytest.MonkeyPatch, text: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), "utf-8"))


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        ([], {}),
        (["--greedy"], {"temperature": 0}),
        (["--temperature", "2", "--top-k", "0", "--top-p", "0.9"], {"temperature": 2.0, "top_k": 0, "top_p": 0.9}),
        (["--repetition-penalty", "1.5", "--top-k", "7"], {"repetition_penalty": 1.5, "top_k": 7}),
    ],
)
def test_it_writes_what_the_model_generates(
    words: list[str], settings: dict[str, Any], causal: Path, loaded: LoadedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    found = records(capsys, causal, *words, *prompts(*PROMPTS), "--seed", "5")
    tokenizer = loaded.tokenizer
    for number, (record, prompt) in enumerate(zip(found, PROMPTS, strict=True)):
        ids = tokenizer.encode(prompt)
        tokens = generate(
            loaded.model, ids, max_new_tokens=12, stop_id=tokenizer.eos_id, **({"seed": 5 + number} | settings)
        )
        assert record == {
            "prompt": prompt,
            "sample": 0,
            "text": tokenizer.decode(tokens),
            "tokens": tokens,
            "finish_reason": "length" if len(tokens) == 12 else "end",
            "seed": 5 + number,
        }


def test_the_same_seed_is_the_same_text_streamed_or_not_alone_or_in_a_batch(
    causal: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [*prompts(*PROMPTS), "--samples", "2", "--temperature", "1.5"]
    found = records(capsys, causal, *asked)
    assert [(r["sample"], r["seed"]) for r in found] == [(0, 0), (1, 1), (0, 2), (1, 3), (0, 4), (1, 5)]
    assert len({r["text"] for r in found}) == 6
    assert records(capsys, causal, *asked, "--batch-size", "4") == found
    assert (
        records(capsys, causal, *prompts(PROMPTS[1]), "--temperature", "1.5", "--seed", "3")[0]["text"]
        == found[3]["text"]
    )
    for size in ("1", "6"):
        assert run(capsys, causal, *asked, "--batch-size", size) == "\n".join(
            r["prompt"] + r["text"] + "\n" for r in found
        )
        assert run(capsys, causal, *asked, "--batch-size", size, "--no-echo") == "\n".join(
            r["text"] + "\n" for r in found
        )


def test_beams_are_those_of_the_beam_search(
    causal: Path, loaded: LoadedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    found = records(capsys, causal, *prompts(*PROMPTS), "--beams", "3", "--length-penalty", "0.5", "--batch-size", "3")
    tokenizer = loaded.tokenizer
    ids = [tokenizer.encode(prompt) for prompt in PROMPTS]
    texts, _ = beam_search(loaded.model, ids, beams=3, max_new_tokens=12, length_penalty=0.5, stop_id=tokenizer.eos_id)
    assert [record["tokens"] for record in found] == texts
    assert [record["finish_reason"] for record in found] == ["length" if len(t) == 12 else "end" for t in texts]


def test_stops_end_a_text_before_them(causal: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [whole] = records(capsys, causal, *prompts("cloud"))
    token = whole["tokens"][5]
    [record] = records(capsys, causal, *prompts("cloud"), "--stop-id", str(token))
    assert (record["tokens"], record["finish_reason"]) == (whole["tokens"][: whole["tokens"].index(token)], "stop")
    stop = whole["text"][4:7]
    for words in (["--stop", stop], ["--stop", "not in there", "--stop", stop]):
        [record] = records(capsys, causal, *prompts("cloud"), *words)
        assert (record["text"], record["finish_reason"]) == (whole["text"][: whole["text"].index(stop)], "stop")
        assert 0 < len(record["tokens"]) < 12
    [best] = records(capsys, causal, *prompts("cloud"), "--beams", "2")
    [record] = records(capsys, causal, *prompts("cloud"), "--beams", "2", "--stop", best["text"][3:5])
    assert record["text"] == best["text"][: best["text"].index(best["text"][3:5])]
    assert record["finish_reason"] == "stop"


def test_the_end_of_text_token_ends_a_text(
    causal: Path, loaded: LoadedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    """Over all tokens at a high temperature it comes up soon, in some of many samples."""
    found = records(
        capsys, causal, *prompts("cloud"), "--temperature", "9", "--top-k", "0", "--samples", "40", "--batch-size", "40"
    )
    ended = [record for record in found if record["finish_reason"] == "end"]
    assert ended
    assert all(len(r["tokens"]) < 12 and loaded.tokenizer.eos_id not in r["tokens"] for r in ended)
    assert all(len(r["tokens"]) == 12 for r in found if r["finish_reason"] == "length")


def test_an_empty_prompt_begins_a_document(
    causal: Path, loaded: LoadedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    eos = loaded.tokenizer.eos_id
    [record] = records(capsys, causal, "--prompt", "", "--greedy")
    assert record["tokens"] == generate(loaded.model, [eos], max_new_tokens=12, temperature=0, stop_id=eos)


def test_prompts_come_from_files_and_standard_input(
    causal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    want = records(capsys, causal, *prompts("river stone", "münster"))
    lines, table = tmp_path / "p.txt", tmp_path / "p.jsonl"
    lines.write_text("river stone\n\nmünster\n", encoding="utf-8")
    rows = "".join(json.dumps({"q": text}) + "\n" for text in ("river stone", "münster"))
    table.write_text(rows, encoding="utf-8")
    assert records(capsys, causal, "--prompts", str(lines)) == want
    assert records(capsys, causal, "--prompts", str(table), "--text-field", "q") == want
    for words in (["--prompts", "-"], []):
        type_in(monkeypatch, lines.read_bytes())
        assert records(capsys, causal, *words) == want
    type_in(monkeypatch, rows.encode())
    assert records(capsys, causal, "--text-field", "q") == want
    out = tmp_path / "out.jsonl"
    assert run(capsys, causal, "--prompts", str(lines), "--jsonl", "--out", str(out)) == ""
    assert [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] == want


def test_a_conversation_continues_each_line(
    causal: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = iter(["river", "", "cloud"])

    def ask(*_: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr(command, "at_terminal", lambda: True)
    said = run(capsys, causal)
    want = [record["text"] for record in records(capsys, causal, *prompts("river", "cloud"))]
    assert said == "\n".join(text + "\n" for text in want)


def test_what_is_wrong_with_a_line_ends_no_conversation(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = iter(["bad", "stopped", "good", "\udcff"])
    handled: list[str] = []

    def ask(*_: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise KeyboardInterrupt from None

    def handle(given: Any) -> None:
        if given.text == "bad":
            raise UserError("this line is too long")
        if given.text == "stopped":
            raise KeyboardInterrupt
        handled.append(given.text)

    monkeypatch.setattr("builtins.input", ask)
    converse(handle, "hello")
    said = capsys.readouterr()
    assert handled == ["good"]
    assert "error: this line is too long" in said.err
    assert "not UTF-8 at character 1" in said.err
    assert said.out == ""


def test_other_precisions_write_too(causal: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [record] = records(capsys, causal, *prompts("cloud"), "--precision", "bf16", "--greedy")
    assert record["tokens"]
    import torch

    assert next(open_model(str(causal), "clm", "cpu", "bf16").model.parameters()).dtype == torch.bfloat16


def test_mistakes_are_named(
    causal: Path,
    masked: Path,
    export: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = refused(capsys, masked, "--prompt", "x")
    assert "masked model" in said
    assert f"nystrom fill --checkpoint {masked}" in said
    assert "does not exist" in refused(capsys, tmp_path / "none", "--prompt", "x")
    assert "none.txt does not exist" in refused(capsys, causal, "--prompts", str(tmp_path / "none.txt"))
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    assert "empty.txt holds no text" in refused(capsys, causal, "--prompts", str(empty))
    learned = export("learned", objective="clm", positions="learned", max_positions=64)
    said = refused(capsys, learned, "--prompt", "river stone " * 80)
    assert "longer than the 64 learned positions" in said
    for words, message in [
        (["--beams", "2", "--top-k", "3"], "takes no --top-k"),
        (["--greedy", "--temperature", "1"], "--greedy is --temperature 0"),
        (["--greedy", "--samples", "2"], "one text for a prompt"),
        (["--length-penalty", "2"], "give --beams too"),
        (["--temperature", "-1"], "must not be negative"),
        (["--top-p", "0"], "top_p 0.0 must be above 0"),
        (["--stop", ""], "an empty text"),
        (["--stop-id", "100000"], "stop token 100000 is outside"),
        (["--text-field", "q"], "give --prompts too"),
        (["--out", str(tmp_path)], "is a folder"),
        (["--out", str(tmp_path / "no" / "o")], "there is no folder"),
        (["--device", "nothing"], "--device nothing"),
    ]:
        assert message in refused(capsys, causal, "--prompt", "x", *words)
    assert "not UTF-8" in refused(capsys, causal, "--prompt", "\udcff")
    assert "is the file that is read" in refused(capsys, causal, "--prompts", str(empty), "--out", str(empty))
    for typed, words, message in [
        (b"ok\n\xff\n", [], "line 2: not UTF-8"),
        (b"{\n", ["--text-field", "q"], "line 1: not JSON"),
        (b'{"a": 1}\n', ["--text-field", "q"], "no field 'q'"),
        (b'{"q": 1}\n', ["--text-field", "q"], "is int, not text"),
        (b"", [], "standard input holds no text"),
    ]:
        type_in(monkeypatch, typed)
        assert program.main(["generate", "--checkpoint", str(causal), "--max-new-tokens", "1", *words]) == 2
        assert message in capsys.readouterr().err
    for words in (["--seed", "-1"], ["--samples", "0"], ["--batch-size", "x"], ["--prompt", "x", "--prompts", "y"]):
        with pytest.raises(SystemExit) as ended:
            program.main(["generate", "--checkpoint", str(causal), *words])
        assert ended.value.code == 2


def test_the_gates_verdict_is_said(export: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = export("judged", objective="clm")
    info = subject_of(checkpoint, None).info()

    def judge(passed: bool, created: str, model: ModelInfo, place: str = "validity.json") -> None:
        checks = Table(
            "checks", [], [["causality", 0.25, "below 0.0001", passed, ""], ["padding", 0, "<= 1", True, ""]]
        )
        metrics = {"passed": Metric(float(passed), True, n=2)}
        result = Result(
            "validity", "validity", created, model, {}, {}, metrics, [checks], [], [], [], {}, {"count": 0}, "none",
            0.0, created, {},
        )  # fmt: skip
        write_result(checkpoint / "eval" / place, result)

    def said() -> list[str]:
        assert program.main(["generate", "--checkpoint", str(checkpoint), *SHORT, "--prompt", "x"]) == 0
        lines = capsys.readouterr().err.splitlines()
        assert lines.pop() == f"next: nystrom convert to-hf {checkpoint} hf/judged"
        return lines

    never = (
        f"note: the validity gate has not looked at these weights: nystrom eval validity --checkpoint {checkpoint} does"
    )
    assert said() == [never]
    judge(False, "2026-01-01", replace(info, weights_hash="0" * 64))
    assert said() == [never]
    judge(True, "2026-01-02", info)
    assert said() == []
    judge(False, "2026-01-03", info)
    assert said() == ["warning: the validity gate FAILED for these weights (causality: 0.25, must be below 0.0001)"]
    judge(True, "2026-01-04", info, "finished/abc/result.json")  # the newest counts, wherever it is kept
    assert said() == []


def test_text_of_the_detokenizer_is_that_of_the_tokenizer(loaded: LoadedModel) -> None:
    ids = loaded.tokenizer.encode("münster cloud")
    assert Detokenizer(loaded.tokenizer).text([], ids) == "münster cloud"


@pytest.mark.slow
def test_a_reader_that_leaves_ends_it_quietly(causal: Path) -> None:
    words = [sys.executable, "-m", "launch.program", "generate", "--checkpoint", str(causal), "--prompt", "river"]
    process = subprocess.Popen(
        [*words, "--samples", "500"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read(5) == b"river"
    process.stdout.close()
    said = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(60) == 141
    first, *others = said.splitlines()
    assert first == "loading PyTorch ..."
    assert len(others) <= 1, said  # the gate's
    assert "Traceback" not in said
