"""``to-hf`` and back: the weights, the tokenizer and the run, to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hf_folder_case import export, loaded_model

from data_pipeline.errors import UserError
from pretrain.checkpoint.load import LoadedModel, load_model, unique_weights, weights_hash
from pretrain.convert.cli import main
from pretrain.convert.folder import cast

BLOCKS = [
    {"objective": "clm"},
    {"objective": "clm", "landmark_inverse": True, "learn_landmark_query": True, "tie_embeddings": False},
    {"objective": "clm", "landmark_inverse": True, "attention": ["nystrom", "softmax"]},
    {"objective": "mlm", "norm": "post", "positions": "learned"},
]


def there_and_back(loaded: LoadedModel, folder: Path, **options: object) -> LoadedModel:
    export(loaded, folder / "hf", **options)
    assert main(["from-hf", str(folder / "hf"), str(folder / "back")]) == 0
    return load_model(folder / "back")


@pytest.mark.parametrize("block", BLOCKS)
def test_in_float32_everything_is_as_it_was(block: dict[str, object], tmp_path: Path) -> None:
    loaded = loaded_model(**block)
    back = there_and_back(loaded, tmp_path, max_shard_size="10KB")
    assert back.weights_hash == loaded.weights_hash
    assert (back.model_config, back.run_config, back.tokens) == (loaded.model_config, loaded.run_config, loaded.tokens)
    assert back.tokenizer.hash == loaded.tokenizer.hash
    fates = {tensor["fate"] for tensor in json.loads((tmp_path / "back" / "converted.json").read_text())["tensors"]}
    assert fates == {"taken"}


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_in_16_bits_the_weights_are_those_rounded(
    dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = loaded_model(objective="clm")
    back = there_and_back(loaded, tmp_path, dtype=dtype)
    rounded = {name: value.float() for name, value in cast(unique_weights(loaded.model), dtype).items()}
    assert back.weights_hash == weights_hash(rounded) != loaded.weights_hash
    assert "rounded to 16 bits, or trained since" in capsys.readouterr().out


def test_a_model_fine_tuned_elsewhere_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    loaded = loaded_model(objective="mlm")
    folder = export(loaded, tmp_path / "hf")
    weights = load_file(folder / "model.safetensors")
    weights = {name: value for name, value in weights.items() if not name.startswith("head.")}
    save_file({**weights, "classifier.weight": torch.zeros(2, 16), "classifier.bias": torch.zeros(2)},
              folder / "model.safetensors")  # fmt: skip
    (folder / "nystrom.json").unlink()
    assert main(["from-hf", str(folder), str(tmp_path / "back")]) == 0
    said = capsys.readouterr().out
    assert "there is no nystrom.json" in said
    assert "the head of another task" in said
    back = load_model(tmp_path / "back")
    got = unique_weights(back.model)["layers.0.attention.query.weight"]
    torch.testing.assert_close(got, weights["model.layers.0.attention.query.weight"], rtol=0, atol=0)
    assert back.tokens == 0


def test_damage_is_named(tmp_path: Path) -> None:
    folder = export(loaded_model(objective="mlm"), tmp_path / "hf")
    config, facts = (json.loads((folder / name).read_text()) for name in ("config.json", "nystrom.json"))
    for name, body, said in (
        ("nystrom.json", {}, "nystrom.json is damaged"),
        ("nystrom.json", {**facts, "run": {"name": 3}}, "nystrom.json"),
        ("config.json", {**config, "network": {"hidden_sise": 3}}, "hidden_sise"),
        ("config.json", {k: v for k, v in config.items() if k != "network"}, "has no block `network`"),
        ("config.json", {**config, "network": {**config["network"], "num_layers": 3}}, r"layers\.2.* is missing"),
    ):
        before = (folder / name).read_text()
        (folder / name).write_text(json.dumps(body))
        with pytest.raises(UserError, match=said):
            main(["from-hf", str(folder), str(tmp_path / "back")])
        (folder / name).write_text(before)
        assert not (tmp_path / "back").exists()


def test_whoever_gives_a_folder_of_transformers_to_another_command_is_told_what_to_do(tmp_path: Path) -> None:
    folder = export(loaded_model(objective="mlm"), tmp_path / "hf")
    with pytest.raises(UserError, match=r"`nystrom convert from-hf .*hf OUT` makes an export"):
        load_model(folder)
