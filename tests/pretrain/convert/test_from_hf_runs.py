"""Runs that continue from a converted checkpoint, and the commands of docs/converting.md on tiny folders."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from ranks import run_ranks
from safetensors.torch import load_file
from stock_case import change_json, mlpen_folder, tiny_model, tiny_tokenizer
from striking_case import train
from training_case import metrics, settings, write_config

from data_pipeline.tokenization.tokenizer import Tokenizer
from launch import program
from pretrain.checkpoint.load import load_model
from pretrain.convert.stock import write_stock
from pretrain.convert.tensor_names import POSITIONS

PAGE = Path(__file__).resolve().parents[3] / "docs/converting.md"


@pytest.mark.slow
def test_a_run_continues_a_converted_checkpoint_at_a_longer_length(corpus: Path, tmp_path: Path) -> None:
    """Exact attention of 32 tokens there; landmarks, 64 tokens and a table of 64 positions here."""
    there = tiny_model(Tokenizer.load(corpus / "train"), attention="softmax", max_positions=32)
    write_stock(there, tmp_path / "theirs", 32, "bf16")
    assert program.main(["convert", "from-hf", str(tmp_path / "theirs"), str(tmp_path / "converted")]) == 0
    loaded = load_model(tmp_path / "converted")
    model = yaml.safe_load((tmp_path / "converted/config.yaml").read_text())["model"]
    model |= {"attention": "nystrom", "num_landmarks": 8, "max_positions": 64}
    run = settings(
        corpus,
        tmp_path,
        model=model,
        curriculum=[{"until_tokens": 512, "seq_len": 64, "micro_batch": 2}],
        schedule={"warmup_tokens": 0},
        optimizer={"lr": 1e-30, "weight_decay": 0.0},  # no weight moves
        init_from=str(tmp_path / "converted"),
    )
    (ended,) = run_ranks(train, 1, config=write_config(tmp_path / "run.yaml", run))
    assert ended.value == 0, ended.output
    assert f"Starts with the weights of {tmp_path / 'converted'}" in ended.output
    assert "newly initialised: none" in ended.output
    assert "rows repeated from 34" in ended.output
    assert "model.attention softmax there, nystrom here" in ended.output
    account = json.loads((tmp_path / "run/init_from.json").read_text())
    assert (account["weights_hash"], account["length"]) == (loaded.weights_hash, 32)
    weights = load_file(tmp_path / "run/export/model.safetensors")
    before = dict(loaded.model.named_parameters())
    assert weights[POSITIONS][:34].equal(before[POSITIONS])
    assert weights[POSITIONS][34:].equal(before[POSITIONS][2:])
    assert all(value.equal(before[name]) for name, value in weights.items() if name != POSITIONS)
    assert len(metrics(tmp_path / "run")) == 2


def theirs(folder: Path, **changes: Any) -> None:
    """What the page calls by the names of well-known checkpoints."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer)
    write_stock(model, folder / "nystromformer-512", 64)
    file = mlpen_folder(folder / "nystrom-512", model)
    file.rename(file.with_name("cp-0099.model"))
    tokenizer.save(folder / "roberta-base")
    # BERT's layout, without its convolution.
    write_stock(model, folder / "bert", 64)
    bert = folder / "bert-base-uncased"
    shutil.move(folder / "bert", bert)
    change_json(bert / "config.json", model_type="bert", max_position_embeddings=66, **changes)
    from safetensors.torch import save_file

    tensors = load_file(bert / "model.safetensors")
    renamed = {
        name.replace("nystromformer.", "bert."): value for name, value in tensors.items() if ".conv." not in name
    }
    save_file(renamed, bert / "model.safetensors")


def test_the_pages_commands_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs(tmp_path)
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^ {4}nystrom (.*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    kinds = [command.split()[0] for command in commands]
    assert (kinds.count("convert"), kinds.count("fill"), kinds.count("train")) == (3, 1, 1)
    for command in commands:
        if not command.startswith("train "):  # test_a_run_continues_a_converted_checkpoint_at_a_longer_length
            assert program.main(shlex.split(command)) == 0, capsys.readouterr().err
    assert "taken from there" in capsys.readouterr().out
    assert load_model("converted").weights_hash == load_model("from-authors").weights_hash
    assert load_model("from-bert").model_config.max_positions == 66
