"""``python -m benchmarks.token_loss``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.token_loss.__main__ import WAYS, main, ways
from data_pipeline.errors import UserError
from pretrain.model import token_loss


def test_all_ways_have_the_same_loss_and_gradients() -> None:
    torch.manual_seed(0)
    decoder = token_loss.Decoder(8, 30, bias=False)
    states, targets = torch.randn(20, 8, requires_grad=True), torch.randint(0, 30, (20,))
    found = []
    for loss_of in ways(decoder, chunk=7 * 30).values():
        loss = loss_of(states, targets)
        found.append([loss.detach(), *torch.autograd.grad(loss, [states, decoder.weight])])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


def test_a_table_and_its_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_loss, "CHUNK_ELEMENTS", token_loss.CHUNK_ELEMENTS)  # which the command sets
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    out = tmp_path / "loss.json"
    sizes = ["--targets", "64", "--hidden-size", "16", "--vocabulary", "100", "--chunk", "1000"]
    assert main([*sizes, "--rounds", "2", "--bf16", "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    assert {way: len(seconds) for way, seconds in content["seconds"].items()} == dict.fromkeys(WAYS, 2)
    assert content["settings"]["targets"] == 64
    assert "| fused | " in capsys.readouterr().out


def test_mistakes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--chunk 0: must be at least 1"):
        main(["--chunk", "0"])
    with pytest.raises(UserError, match="must be a file in a folder that is there"):
        main(["--out", str(tmp_path)])
