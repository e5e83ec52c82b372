"""``python -m benchmarks.long_decoding``: losses are the forward pass's, the cache is constant, mistakes are named."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from benchmarks.long_decoding.__main__ import main
from benchmarks.long_decoding.measure import groups_of, short_context, since_last, stream
from data_pipeline.errors import UserError
from data_pipeline.tokenization.training import train_tokenizer
from eval.subject import Subject, load_subject
from pretrain.checkpoint.load import unique_weights, weights_hash
from pretrain.config import RunConfig
from pretrain.model import ModelConfig, build_model

WORDS = ["one", "two", "three", "river", "stone", "bird", "cloud", "seven"]
PYRAMID: dict[str, Any] = {"landmark_levels": 16, "landmark_band": 2}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "a.txt"
    drawn = np.random.default_rng(0).choice(WORDS, size=400)
    path.write_text(" ".join(drawn) + "\n")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """An export of a random causal model with a pyramid."""
    return _export(tmp_path_factory.mktemp("model"), text, objective="clm", **PYRAMID)


def _export(folder: Path, text: Path, **model: Any) -> Path:
    torch.manual_seed(0)
    tokenizer = train_tokenizer([text.read_text()], 270)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        segment_length=4,
        conv_kernel=5,
        init_std=0.3,
        **model,
    )
    run = {
        "name": "tiny",
        "model": config.model_dump(),
        "data": {"train": "shards"},
        "curriculum": [{"until_tokens": 1024, "seq_len": 64, "micro_batch": 2}],
        "batch_tokens": 128,
    }
    weights = unique_weights(build_model(config))
    save_file(weights, folder / "model.safetensors")
    (folder / "config.yaml").write_text(RunConfig.model_validate(run).to_yaml())
    tokenizer.save(folder)
    info = {"weights_hash": weights_hash(weights), "tokens": 1024, "step": 8}
    (folder / "export.json").write_text(json.dumps(info))
    return folder


@pytest.fixture(scope="module")
def subject(folder: Path) -> Subject:
    return load_subject(folder, device="cpu")


def _tokens(subject: Subject, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.random.default_rng(1).integers(5, subject.model.config.vocab_size, size=count)


def _forward(subject: Subject, tokens: np.ndarray[Any, Any]) -> torch.Tensor:
    """-log p of all tokens but the first, by one forward pass."""
    given = torch.from_numpy(tokens)[None]
    with torch.no_grad():
        logits = subject.model(given[:, :-1]).logits[0]
    return torch.nn.functional.cross_entropy(logits, given[0, 1:], reduction="none")


def test_losses_of_the_cache_are_those_of_a_forward_pass(subject: Subject) -> None:
    tokens = _tokens(subject, 101)
    nats, _ = stream(subject, tokens, [100])
    assert nats.shape == (100,)
    assert torch.allclose(torch.from_numpy(nats).float(), _forward(subject, tokens), rtol=0, atol=2e-4)


@pytest.mark.parametrize("steps", [1, 15, 45])
def test_fewer_steps_change_no_loss(subject: Subject, steps: int) -> None:
    tokens = _tokens(subject, 61)
    nats, marks = stream(subject, tokens, [20, 30, 60], steps)
    assert torch.allclose(torch.from_numpy(nats).float(), _forward(subject, tokens), rtol=0, atol=2e-4)
    assert [mark.tokens for mark in marks] == [20, 30, 60]
    assert len({mark.allocated_bytes for mark in marks}) == 1


def test_the_allocated_cache_is_the_formula_and_does_not_grow(subject: Subject) -> None:
    _, marks = stream(subject, _tokens(subject, 161), [20, 60, 160])
    assert [mark.tokens for mark in marks] == [20, 60, 160]
    assert len({mark.allocated_bytes for mark in marks}) == 1
    assert marks[-1].allocated_bytes == marks[-1].formula_bytes
    # Of exact attention all keys and values: 2 layers, 2 tensors of width 16, 4 bytes.
    assert [mark.exact_bytes for mark in marks] == [256 * mark.tokens for mark in marks]
    assert marks[-1].share == marks[-1].allocated_bytes / (256 * 160) < 0.5
    assert all(mark.step_ms > 0 and mark.resident_bytes > 2**20 for mark in marks)


def test_a_short_context_sees_half_a_window_to_a_whole_one(subject: Subject) -> None:
    tokens = _tokens(subject, 101)
    nats = torch.from_numpy(short_context(subject, tokens, 16)).float()
    close: dict[str, Any] = {"rtol": 0, "atol": 2e-4}
    assert torch.allclose(nats[:16], _forward(subject, tokens[:17]), **close)
    # The window from token 8 predicts tokens 17 to 24, its last 8; and so on to the last window, which is shorter.
    assert torch.allclose(nats[16:24], _forward(subject, tokens[8:25])[8:], **close)
    assert torch.allclose(nats[96:], _forward(subject, tokens[88:])[8:], **close)
    whole = short_context(subject, tokens, 1000)
    assert torch.allclose(torch.from_numpy(whole).float(), _forward(subject, tokens), **close)


def test_the_last_occurrence() -> None:
    tokens = np.array([7, 8, 7, 7, 9, 8])
    assert since_last(tokens).tolist() == [0, 2, 1, 0, 4]
    assert [which.tolist() for _, _, which in groups_of([0, 1, 4], since_last(tokens))] == [
        [False, False, True, False, False],
        [False, True, False, False, True],
    ]


def test_tables_and_numbers(folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    words = ["--text", str(text), "--marks", "16,32,64", "--contexts", "8,32", "--device", "cpu", "--out", str(out)]
    assert main(["--checkpoint", str(folder), *words]) == 0
    content = json.loads(out.read_text())
    assert [mark["tokens"] for mark in content["marks"]] == [16, 32, 64]
    assert [row["tokens"] for row in content["loss by position"]] == [16, 16, 32]
    assert all(set(row["loss"]) == {"cache", "8", "32"} for row in content["loss by position"])
    assert sum(row["tokens"] for row in content["loss by tokens since the last occurrence"]) == 64
    # 16 tokens fit into a window of 32: the same context.
    first = content["loss by position"][0]["loss"]
    assert first["cache"] == pytest.approx(first["32"], abs=1e-4)
    printed = capsys.readouterr().out
    assert "| tokens | cache, MiB |" in printed
    assert "| 16 to 32 | 16 |" in printed
    # A goal that is missed: a tiny cache is more than 0.5% of a short text's.
    assert main(["--checkpoint", str(folder), *words, "--check"]) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--marks", "16,x"], "--marks 16,x: must be whole numbers of at least 2"),
        (["--contexts", "1"], "--contexts 1: must be whole numbers of at least 2"),
        (["--marks", "100000"], "tokens, and --marks 100000 needs one more than that"),
        (["--set", "num_layers=3"], "--set num_layers=3: only rope_theta=X and rope_position_scale=X"),
        (["--set", "rope_theta=0"], "rope_theta"),
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["--data", "shards"], "--text and --data both name the text"),
        (["--threads", "0"], "--threads 0: must be at least 1"),
    ],
)
def test_mistakes_are_named(folder: Path, text: Path, words: Sequence[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(["--checkpoint", str(folder), "--text", str(text), "--device", "cpu", *words])


def test_a_masked_model_is_refused(tmp_path: Path, text: Path) -> None:
    masked = _export(tmp_path, text, objective="mlm")
    with pytest.raises(UserError, match="only a causal model"):
        main(["--checkpoint", str(masked), "--text", str(text), "--marks", "16", "--device", "cpu"])


def test_other_rotary_angles_change_the_loss(folder: Path, text: Path, tmp_path: Path) -> None:
    losses = []
    for number, extra in enumerate(([], ["--set", "rope_theta=50"])):
        out = tmp_path / f"{number}.json"
        words = ["--text", str(text), "--marks", "24", "--contexts", "24", "--device", "cpu", "--out", str(out)]
        assert main(["--checkpoint", str(folder), *words, *extra]) == 0
        losses.append(json.loads(out.read_text())["loss by position"][0]["loss"]["cache"])
    assert losses[0] != pytest.approx(losses[1], abs=1e-4)
