"""`nystrom fill`: the softmax of a plain forward pass at each mask."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.tokenization.tokenizer import Tokenizer
from eval.shell import fill as command
from eval.shell.masks import masked_ids, token_text
from launch import program
from pretrain.checkpoint.load import LoadedModel, load_model

TEXT = "river [MASK] and the quiet <mask>."


@pytest.fixture(scope="module")
def loaded(masked: Path) -> LoadedModel:
    return load_model(masked)


@pytest.fixture(scope="module")
def tokenizer(loaded: LoadedModel) -> Tokenizer:
    return loaded.tokenizer


def run(capsys: pytest.CaptureFixture[str], checkpoint: Path, *words: str) -> str:
    assert program.main(["fill", "--checkpoint", str(checkpoint), *words]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], checkpoint: Path, *words: str) -> str:
    assert program.main(["fill", "--checkpoint", str(checkpoint), *words]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    return said.err


def test_masks_take_the_place_of_words_with_their_space(tokenizer: Tokenizer) -> None:
    mask = tokenizer.mask_id
    assert mask is not None
    own = tokenizer.name_of(mask)
    before, after = tokenizer.encode("river"), tokenizer.encode(" stone")
    for name in ("[MASK]", "<mask>", own):
        assert masked_ids(f"river {name} stone", tokenizer) == ([*before, mask, *after], [len(before)])
        assert masked_ids(f"river{name} stone", tokenizer) == ([*before, mask, *after], [len(before)])
    ids, places = masked_ids("[MASK] [MASK]\n[MASK]", tokenizer)
    assert ids == [mask, mask, *tokenizer.encode("\n"), mask]
    assert [ids[place] for place in places] == [mask] * 3
    with pytest.raises(ValueError, match="no mask"):
        masked_ids("river [mask]", tokenizer)


def test_it_is_the_softmax_at_each_mask(
    masked: Path, loaded: LoadedModel, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    [record] = map(json.loads, run(capsys, masked, "--text", TEXT, "--top", "7", "--jsonl").splitlines())
    ids, places = masked_ids(TEXT, tokenizer)
    with torch.no_grad():
        probabilities = loaded.model(torch.tensor([ids])).logits[0].softmax(-1)
    assert record["text"] == TEXT
    assert len(record["masks"]) == len(places) == 2
    for place, candidates in zip(places, record["masks"], strict=True):
        best = probabilities[place].topk(7)
        assert [c["id"] for c in candidates] == best.indices.tolist()
        assert [c["probability"] for c in candidates] == pytest.approx(best.values.tolist(), abs=1e-6)
        assert [c["token"] for c in candidates] == [token_text(tokenizer, i) for i in best.indices.tolist()]
    [everything] = map(json.loads, run(capsys, masked, "--text", TEXT, "--top", "100000", "--jsonl").splitlines())
    assert sum(c["probability"] for c in everything["masks"][0]) == pytest.approx(1)


def test_tokens_without_a_text_of_their_own_have_their_name(tokenizer: Tokenizer) -> None:
    assert token_text(tokenizer, tokenizer.encode(" stone")[0]).startswith(" ")
    assert token_text(tokenizer, tokenizer.eos_id) == tokenizer.name_of(tokenizer.eos_id) != ""
    cut = next(i for i in range(tokenizer.vocab_size) if "�" in tokenizer.decode([i]))
    assert token_text(tokenizer, cut) == tokenizer.name_of(cut)
    assert token_text(tokenizer, 10**6) == "<1000000>"


def test_people_read_a_line_for_each_token(masked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [record] = map(json.loads, run(capsys, masked, "--text", TEXT, "--jsonl").splitlines())
    lines = run(capsys, masked, "--text", TEXT, "--text", "[MASK]").splitlines()
    assert lines[0] == TEXT
    assert lines[1] == "  mask 1 of 2"
    first = record["masks"][0][0]
    assert lines[2] == f"  {first['probability']:.4f}  {json.dumps(first['token'], ensure_ascii=False)}"
    assert lines[7] == "  mask 2 of 2"
    assert lines[13] == "[MASK]"
    assert len(lines) == 13 + 6


def test_texts_come_from_files_and_standard_input(
    masked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [TEXT, "a <mask>"]
    want = run(capsys, masked, *(word for text in texts for word in ("--text", text)))
    file, out = tmp_path / "t.jsonl", tmp_path / "out.txt"
    file.write_text("".join(json.dumps({"q": text}) + "\n" for text in texts))
    assert run(capsys, masked, "--texts", str(file), "--text-field", "q", "--out", str(out)) == ""
    assert out.read_text(encoding="utf-8") == want
    for words in (["--texts", "-"], []):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(texts).encode()), "utf-8"))
        assert run(capsys, masked, *words) == want
    typed = iter(["no mask", *texts])

    def ask(*_: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr(command, "at_terminal", lambda: True)
    assert run(capsys, masked) == want


def test_mistakes_are_named(
    causal: Path, masked: Path, export: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, causal, "--text", TEXT)
    assert "causal model" in said
    assert f"nystrom generate --checkpoint {causal}" in said
    assert "there is no mask in the text" in refused(capsys, masked, "--text", "no mask here")
    assert "--text 2 of 2: there is no mask" in refused_after_one(capsys, masked, "--text", TEXT, "--text", "")
    assert "none.txt does not exist" in refused(capsys, masked, "--texts", str(tmp_path / "none.txt"))
    assert "checkpoint none does not exist" in refused(capsys, Path("none"), "--text", TEXT)
    assert "give --texts too" in refused(capsys, masked, "--text", TEXT, "--text-field", "q")
    learned = export("learned-mlm", objective="mlm", positions="learned", max_positions=64)
    said = refused(capsys, learned, "--text", "river stone " * 80 + "[MASK]")
    assert "longer than the 64 learned positions" in said
    with pytest.raises(SystemExit):
        program.main(["fill", "--checkpoint", str(masked), "--top", "0", "--text", TEXT])


def test_weights_that_are_not_finite_fill_nothing(
    masked: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> torch.Tensor:
        return torch.full((1, 5), torch.nan)

    monkeypatch.setattr("eval.subject.Subject.target_logits", broken)
    assert "not finite" in refused(capsys, masked, "--text", "a [MASK]")


def refused_after_one(capsys: pytest.CaptureFixture[str], checkpoint: Path, *words: str) -> str:
    assert program.main(["fill", "--checkpoint", str(checkpoint), *words]) == 2
    said = capsys.readouterr()
    assert said.out.startswith(TEXT)
    return said.err
