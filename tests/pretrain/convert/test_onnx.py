"""``nystrom convert to-onnx``: what is written, that onnxruntime agrees with the model, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from form_case import config, logits, model_of, tokens
from safetensors.torch import save_file

from data_pipeline.errors import UserError, run_cli
from data_pipeline.tokenization.training import train_tokenizer
from pretrain.checkpoint.load import LoadedModel, unique_weights, weights_hash
from pretrain.config import RunConfig
from pretrain.convert import cli
from pretrain.convert.onnx import check, file, folder
from pretrain.convert.onnx.check import Difference
from pretrain.convert.onnx.graph import TracedEncoder
from pretrain.model.transformer import NystromformerLM

REPOSITORY = Path(__file__).resolve().parents[3]
FILE_MEASURED = 7e-5
"""Logits, absolute, float32: 7e-6 with landmarks, 6e-6 pooled, 5e-6 with a window."""
TEXTS = ["A short text.", "Another text, which has a few more words than the first."]


def loaded_model(**changes: Any) -> LoadedModel:
    tokenizer = train_tokenizer(TEXTS * 5, 280)
    model = model_of(**{"objective": "mlm", "vocab_size": tokenizer.vocab_size, "num_layers": 1} | changes).float()
    run = RunConfig.model_validate(
        {
            "name": "tiny",
            "model": model.config.model_copy(update={"trained_positions": None}).model_dump(),
            "data": {"train": "shards"},
            "curriculum": [{"until_tokens": 1024, "seq_len": 64, "micro_batch": 2}],
            "batch_tokens": 128,
        }
    )
    return LoadedModel(model, model.config, run, tokenizer, "0" * 64, 1024, Path("runs/tiny"), None)


class TorchSession:
    """Answers as onnxruntime would, and can be wrong on purpose."""

    def __init__(self, model: NystromformerLM, spoil: Any = lambda name, x: x) -> None:
        self.encoder, self.spoil = TracedEncoder(model).eval(), spoil
        self.shapes: list[tuple[int, ...]] = []

    def run(self, outputs: list[str], inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        self.shapes.append(inputs["input_ids"].shape)
        with torch.no_grad():
            got = self.encoder(*(torch.from_numpy(inputs[name]) for name in file.INPUTS))
        return [self.spoil(name, x.numpy()) for name, x in zip(outputs, got, strict=True)]


# The comparison.


@pytest.mark.parametrize(
    ("changes", "limit"),
    [
        ({}, 11),
        ({"landmark_inverse": False}, 6),
        ({"attention": "softmax"}, 64),
        ({"attention": ["window", "nystrom"]}, 11),
    ],
)
def test_batches_lie_on_both_sides_of_where_landmarks_begin(changes: dict[str, Any], limit: int) -> None:
    batches = list(check.batches(config(objective="mlm", **changes)))
    lengths = {n for batch in batches for n in batch.lengths}
    assert {0, 1, limit - 1, limit, limit + 1, 3 * limit} <= lengths
    assert {len(batch.lengths) for batch in batches} == {1, 3, 4}
    padded = [batch for batch in batches if (batch.mask == 0).any()]
    assert {batch.side for batch in padded} == {"left", "right"}
    for batch in padded:
        edge = 0 if batch.side == "left" else -1
        assert (batch.mask[:, edge] == 0).all()
        assert batch.mask.shape == batch.ids.shape
    assert str(batches[0]) == "1 tokens"
    assert str(padded[0]) == f"{5 * limit + 3} + 0 + {limit + 1} + {limit} tokens, padding right"


def test_batches_fit_the_learned_positions() -> None:
    settings = config(objective="mlm", positions="learned", max_positions=20)
    assert max(n for batch in check.batches(settings) for n in batch.lengths) == 20


def test_the_largest_difference_is_found() -> None:
    model = model_of(objective="mlm").float()
    session = TorchSession(model)
    right = check.compare(session, model, file.OUTPUTS)
    assert set(right) == set(file.OUTPUTS)
    assert all(found.share < 1e-5 for found in right.values())
    assert len(set(session.shapes)) == 6

    def spoil(name: str, x: np.ndarray) -> np.ndarray:
        if name == "logits" and x.shape[0] == 3:
            x = x.copy()
            x[2, 5, 7] += 0.5  # of 10 tokens, on the right of them or within them
        return x

    found = check.compare(TorchSession(model, spoil), model, file.OUTPUTS)["logits"]
    assert found.absolute == pytest.approx(0.5, rel=1e-4)
    assert found.share > 0.005
    assert found.where == "23 + 1 + 10 tokens, padding right"


def test_padding_is_not_compared_but_must_be_finite() -> None:
    model = model_of(objective="mlm").float()

    def spoil_with(value: float) -> Any:
        def spoil(name: str, x: np.ndarray) -> np.ndarray:
            x = x.copy()
            if x.shape[0] == 4:
                x[1] = value  # the empty row
            return x

        return spoil

    found = check.compare(TorchSession(model, spoil_with(1e6)), model, file.OUTPUTS)
    assert found["logits"].share < 1e-5
    with pytest.raises(UserError, match=r"gives last_hidden_state that are not finite for 58 [+] 0"):
        check.compare(TorchSession(model, spoil_with(np.nan)), model, file.OUTPUTS)


# What is refused, and what is left behind.


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stands in for the exporter and onnxruntime: ``share`` is what they differ by, ``calls`` what was asked for."""
    state: dict[str, Any] = {"share": 1e-6, "calls": []}

    def write(model: NystromformerLM, path: Path, *, dtype: str, head: bool) -> file.Written:
        path.write_bytes(b"graph")
        outputs = file.OUTPUTS if head else file.OUTPUTS[:1]
        state["calls"].append((dtype, outputs))
        return file.Written(20, 10, outputs, 5)

    def compare(session: Any, model: NystromformerLM, outputs: tuple[str, ...]) -> dict[str, Difference]:
        return {name: Difference(state["share"], 2 * state["share"], "3 tokens") for name in outputs}

    monkeypatch.setattr(file, "write_model", write)
    monkeypatch.setattr(check, "open_session", lambda path: None)
    monkeypatch.setattr(check, "compare", compare)
    monkeypatch.setattr("pretrain.checkpoint.load.load_model", lambda path: loaded_model())
    return state


def convert(*words: object) -> int:
    return run_cli(cli.main, "nystrom convert", ["to-onnx", *map(str, words)])


def test_the_folder(tmp_path: Path, written: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "out"
    assert convert("runs/tiny", out) == 0
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert {path.name for path in out.iterdir()} == {
        "model.onnx", "config.json", "README.md", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    settings = json.loads((out / "config.json").read_text())
    assert (settings["opset"], settings["ir_version"], settings["dtype"]) == (20, 10, "fp32")
    assert settings["differences"]["logits"] == {"share": 1e-6, "absolute": 2e-6, "where": "3 tokens"}
    assert settings["model"]["num_landmarks"] == 6
    readme = (out / "README.md").read_text()
    assert "- `logits`: 1.0e-06 of the largest value (2.0e-06 absolute)." in readme
    assert "A text may have any number of tokens." in readme
    printed = capsys.readouterr()
    assert "model.onnx of 5 bytes (opset 20, IR version 10, fp32), written in 0 s" in printed.out
    assert "and the model, logits: 1.0e-06 of the largest value (2.0e-06 absolute)" in printed.out
    assert printed.err == ""
    assert convert("runs/tiny", tmp_path / "again", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["largest_differences"]["logits"] == 1e-6
    assert Path(found["file"]).stat().st_size == found["bytes"] == 5


def test_options(tmp_path: Path, written: dict[str, Any]) -> None:
    (tmp_path / "out").mkdir()  # an empty one is taken
    assert convert("runs/tiny", tmp_path / "out", "--dtype", "fp16", "--no-head") == 0
    assert written["calls"] == [("fp16", ("last_hidden_state",))]
    assert "logits" not in (tmp_path / "out" / "README.md").read_text()


def test_outputs_that_differ_leave_nothing_behind(
    tmp_path: Path, written: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    written["share"] = 2e-4
    assert convert("runs/tiny", tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert "differ in last_hidden_state by 2.0e-04 of the largest value (3 tokens) and logits by 2.0e-04" in message
    assert "1e-04 is allowed (--tolerance): nothing was written" in message
    assert list(tmp_path.iterdir()) == []
    assert convert("runs/tiny", tmp_path / "out", "--tolerance", "1e-3") == 0
    written["share"] = float("nan")
    assert convert("runs/tiny", tmp_path / "other") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_there_is_not_touched(
    tmp_path: Path, written: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    assert convert("runs/tiny", tmp_path / "out") == 2
    assert "exists and is not an empty folder" in capsys.readouterr().err
    assert (tmp_path / "out" / "mine").read_text() == "kept"
    assert convert("runs/tiny", tmp_path / "out" / "mine") == 2
    assert convert("runs/tiny", tmp_path / "out" / "mine" / "below") == 2
    assert "cannot be written" in capsys.readouterr().err
    assert convert("runs/tiny", tmp_path / "new", "--tolerance", "0") == 2
    assert "--tolerance 0.0 is not a positive number" in capsys.readouterr().err
    assert written["calls"] == []


def test_missing_packages_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "onnxscript" else find(name, *more)
    )
    assert convert("runs/tiny", tmp_path / "out") == 2
    assert "to-onnx needs onnxscript: pip install 'nystrom-pretrain[onnx]'" in capsys.readouterr().err


def test_a_causal_model_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in folder.PACKAGES:
        pytest.importorskip(name)
    monkeypatch.setattr("pretrain.checkpoint.load.load_model", lambda path: loaded_model(objective="clm"))
    assert convert("runs/tiny", tmp_path / "out") == 2
    assert "a causal model has no ONNX export" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_failure_of_the_exporter_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnx")

    def fail(*arguments: Any, **named: Any) -> None:
        raise torch.onnx.OnnxExporterError("step 1 of 3 failed") from ValueError("no such operator: x\nmore lines")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(UserError, match=r"cannot trace attention: nystrom: no such operator: x$"):
        file.write_model(model_of(objective="mlm"), tmp_path / "model.onnx")


# The real thing.


@pytest.fixture(scope="module")
def packages() -> None:
    for name in folder.PACKAGES:
        pytest.importorskip(name)


@pytest.fixture(scope="module")
def real(packages: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LoadedModel, str]:
    """A folder that the program wrote from an export folder, the model, and what reached the terminal."""
    root = tmp_path_factory.mktemp("onnx")
    loaded = loaded_model()
    export = root / "export"
    export.mkdir()
    weights = unique_weights(loaded.model)
    save_file(weights, export / "model.safetensors")
    (export / "config.yaml").write_text(loaded.run_config.to_yaml())
    loaded.tokenizer.save(export)
    info = {"weights_hash": weights_hash(weights), "tokens": 1024, "step": 8}
    (export / "export.json").write_text(json.dumps(info))
    command = [sys.executable, "-m", "launch.program", "convert", "to-onnx", "export", "out"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return root / "out", loaded, done.stdout + done.stderr


def against_the_model(path: Path, model: NystromformerLM) -> float:
    """The largest difference of logits over all mixes of lengths, of batches that the command does not try."""
    session, worst = check.open_session(path, threads=1), 0.0
    for lengths in ([40, 0, 5, 23], [2], [11, 3], [12, 13], [100, 7, 60, 99, 1]):
        for side in ("right", "left"):
            width = max(lengths) + 3
            ids = tokens(len(lengths), width, seed=5)
            columns, counts = torch.arange(width), torch.tensor(lengths)[:, None]
            real = columns < counts if side == "right" else columns >= width - counts
            got = session.run(["logits"], {"input_ids": ids.numpy(), "attention_mask": real.long().numpy()})[0]
            assert np.isfinite(got).all()
            for row, n in enumerate(lengths):
                if n:
                    expected = logits(model, ids[row : row + 1, real[row]])[0]
                    worst = max(worst, float((torch.from_numpy(got[row])[real[row]] - expected).abs().max()))
    return worst


@pytest.mark.slow
def test_the_file_is_the_model(real: tuple[Path, LoadedModel, str]) -> None:
    import onnx

    out, loaded, _ = real
    assert against_the_model(out / "model.onnx", loaded.model) < FILE_MEASURED
    stored = onnx.load(str(out / "model.onnx"))
    shapes = {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*stored.graph.input, *stored.graph.output)
    }
    assert shapes["input_ids"] == shapes["attention_mask"] == ["batch", "sequence"]
    assert shapes["last_hidden_state"] == ["batch", "sequence", 16]
    assert shapes["logits"] == ["batch", "sequence", loaded.model_config.vocab_size]
    assert sum(node.op_type == "If" for node in stored.graph.node) == 2  # of the one layer
    # The exporter notes for every node where in the source it comes from, with the paths of this machine.
    content = (out / "model.onnx").read_bytes()
    assert b"stack_trace" not in content
    assert str(REPOSITORY).encode() not in content


@pytest.mark.slow
def test_the_terminal_gets_the_result_alone(real: tuple[Path, LoadedModel, str]) -> None:
    lines = [line for line in real[2].splitlines() if not line.startswith("loading ")]
    assert len(lines) == 3, real[2]
    assert re.fullmatch(r"out: model.onnx of .* KiB \(opset 20, IR version 10, fp32\), written in \d+ s", lines[0])
    assert all(line.startswith("largest difference between onnxruntime and the model, ") for line in lines[1:])


@pytest.mark.slow
def test_what_its_readme_says_to_do_works(real: tuple[Path, LoadedModel, str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (real[0] / "README.md").read_text(), re.DOTALL)
    # Without the project on the path.
    done = subprocess.run([sys.executable, "-c", code], cwd=real[0], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    shape, words = done.stdout.splitlines()
    assert shape == "(2, 16)"
    assert len(json.loads(words.replace("'", '"'))) == 5


@pytest.mark.slow
def test_the_page_has_lines_that_work(real: tuple[Path, LoadedModel, str], tmp_path: Path) -> None:
    page = (REPOSITORY / "docs" / "onnx.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "books").symlink_to(real[0])
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(2, 16)"


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"landmark_inverse": False, "positions": "learned", "trained_positions": 30, "norm": "post"},
        {"attention": ["window", "nystrom"], "num_layers": 2},
    ],
    ids=lambda changes: " ".join(map(str, changes.values())),
)
def test_other_forms(packages: None, tmp_path: Path, changes: dict[str, Any]) -> None:
    loaded = loaded_model(**changes)
    file.write_model(loaded.model, tmp_path / "model.onnx")
    assert against_the_model(tmp_path / "model.onnx", loaded.model) < FILE_MEASURED


@pytest.mark.slow
def test_half_precision_with_its_weights_beside_it(
    packages: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file, "EXTERNAL_BEYOND", 0)
    loaded = loaded_model(attention="softmax", positions="learned", max_positions=120)
    before = {name: x.clone() for name, x in loaded.model.state_dict().items()}
    result = folder.write_folder(loaded, tmp_path / "out", dtype="fp16")
    assert {"model.onnx", "model.onnx.data"} < {path.name for path in (tmp_path / "out").iterdir()}
    assert result.written.size == sum(path.stat().st_size for path in (tmp_path / "out").glob("model.onnx*"))
    session = check.open_session(tmp_path / "out" / "model.onnx", threads=1)  # where it was moved to
    assert 1e-5 < check.compare(session, loaded.model, file.OUTPUTS)["logits"].share < 1e-2
    assert all(torch.equal(x, before[name]) for name, x in loaded.model.state_dict().items())
    ids = torch.zeros(1, 121, dtype=torch.int64)
    long = check.Batch(ids, torch.ones_like(ids), "right")
    with pytest.raises(UserError, match=r"onnxruntime fails on 121 tokens: .*out of"):
        check.run(session, long, file.OUTPUTS)
