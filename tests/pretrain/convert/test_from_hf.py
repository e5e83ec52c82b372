"""``nystrom convert from-hf``: what is written, what is refused, and that nothing of a file is run. No transformers."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands_case import next_commands
from safetensors.torch import load_file, save_file
from stock_case import change_json, mlpen_folder, our_logits, tiny_model, tiny_tokenizer

from data_pipeline.errors import UserError
from data_pipeline.tokenization.tokenizer import Tokenizer
from launch import program
from pretrain.checkpoint.load import LoadedModel, load_model, unique_weights
from pretrain.convert.source import SOURCES, find_source
from pretrain.convert.stock import write_stock

BASE = "nystromformer.embeddings."
QUERY = "nystromformer.encoder.layer.1.attention.self.query.weight"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def loaded(tokenizer: Tokenizer) -> LoadedModel:
    return tiny_model(tokenizer)


@pytest.fixture
def folder(loaded: LoadedModel, tmp_path: Path) -> Path:
    """A folder of transformers, in one file."""
    write_stock(loaded, tmp_path / "theirs", 64)
    return tmp_path / "theirs"


def convert(source: Path, out: Path, *words: str) -> int:
    return program.main(["convert", "from-hf", str(source), str(out), *words])


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def refusal(source: Path) -> str:
    with pytest.raises(UserError) as refused:
        find_source(source).read(source)
    return str(refused.value)


# What is written.


def test_the_folder_is_an_export_that_says_where_it_is_from(
    folder: Path, loaded: LoadedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert convert(folder, out) == 0
    said, following = capsys.readouterr()
    assert next_commands(following) == [["fill", "--checkpoint", str(out), "--text", "The [MASK] of the book"]]
    assert f"{out}: mlm of 2 layers of 16, attention nystrom, up to 64 tokens, from {folder} (nystromformer)" in said
    assert "layers.0-1.attention.query.weight (16, 16)" in said
    assert "newly initialised: none\n" in said
    back = load_model(out)
    assert convert(folder, tmp_path / "again", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["objective"], answer["length"], answer["kind"]) == ("mlm", 64, "nystromformer")
    assert answer["weights_hash"] == back.weights_hash == loaded.weights_hash
    assert back.tokenizer.hash == loaded.tokenizer.hash
    assert (back.tokens, back.model_config.max_positions, back.run_config.name) == (0, 64, "theirs")
    ids = torch.randint(0, 280, (2, 64))
    assert our_logits(back, ids).equal(our_logits(loaded, ids))
    info = json.loads((out / "export.json").read_text())
    assert info["converted_from"] == {"kind": "nystromformer", "path": str(folder)}
    assert (out / "config.yaml").read_text().startswith(f"# Converted from {folder} (nystromformer).")
    # Every tensor of both sides, each once.
    account = json.loads((out / "converted.json").read_text())
    theirs = [name for row in account["tensors"] for name in row.get("from", [row["name"]])]
    assert sorted(theirs) == sorted(load_file(folder / "model.safetensors"))
    ours = [row["name"] for row in account["tensors"] if row["fate"] != "left over"]
    assert sorted(ours) == sorted(unique_weights(loaded.model))
    # A second time it is not overwritten.
    assert convert(folder, out) == 2
    assert "is there already" in capsys.readouterr().err


def test_a_checkpoint_without_a_head_gets_a_new_one(folder: Path, tmp_path: Path, loaded: LoadedModel) -> None:
    change_tensors(folder, lambda t: [t.pop(name) for name in list(t) if name.startswith("cls.")])
    change_tensors(folder, lambda t: t.update({"classifier.dense.weight": torch.zeros(2, 16)}))
    converted = find_source(folder).read(folder)
    fates = {entry.name: (entry.fate, entry.why) for entry in converted.entries}
    assert {name for name, (fate, _) in fates.items() if fate == "new"} == {
        f"head.{name}" for name in ("dense.weight", "dense.bias", "norm.weight", "norm.bias", "decoder.bias")
    }
    assert fates["classifier.dense.weight"] == ("left over", "the head of another task")
    for name in ("one", "two"):
        assert convert(folder, tmp_path / name) == 0
    one, two = load_model(tmp_path / "one"), load_model(tmp_path / "two")
    assert one.weights_hash == two.weights_hash  # drawn by the seed in its configuration
    assert float(one.model.head.dense.weight.detach().std()) > 0.1
    assert one.model.layers[0].attention.query.weight.equal(loaded.model.layers[0].attention.query.weight)


def test_an_encoder_saved_alone_has_no_prefix(folder: Path, loaded: LoadedModel) -> None:
    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            value = tensors.pop(name)
            if name.startswith("nystromformer."):
                tensors[name.removeprefix("nystromformer.")] = value
        tensors["embeddings.position_ids"] = torch.arange(64)

    change_tensors(folder, strip)
    converted = find_source(folder).read(folder)
    key = "layers.1.feed_forward.output.weight"
    assert converted.weights[key].equal(unique_weights(loaded.model)[key])
    assert [(e.name, e.why) for e in converted.entries if e.fate == "left over"] == [
        ("embeddings.position_ids", "a constant")
    ]


def test_a_layer_norm_of_both_names_is_refused(folder: Path) -> None:
    name = BASE + "LayerNorm.gamma"
    change_tensors(folder, lambda t: t.update({name: torch.ones(16)}))
    assert "has a layer norm twice" in refusal(folder)


def test_token_type_0_goes_into_the_positions(folder: Path, loaded: LoadedModel) -> None:
    types = torch.randn(2, 16)
    change_tensors(folder, lambda t: t.update({"nystromformer.embeddings.token_type_embeddings.weight": types}))
    converted = find_source(folder).read(folder)
    key = "embeddings.position_embeddings.weight"
    assert converted.weights[key].equal(unique_weights(loaded.model)[key] + types[0])
    assert "with token type 0 added" in {entry.why for entry in converted.entries}
    assert any("token types other than 0 are not used" in note for note in converted.notes)


def test_float64_is_rounded_and_said(folder: Path, loaded: LoadedModel) -> None:
    value = unique_weights(loaded.model)["layers.1.attention.query.weight"].double()
    change_tensors(folder, lambda t: t.update({QUERY: value + 1e-12}))
    converted = find_source(folder).read(folder)
    assert "1 tensors are float64 there; they are rounded to float32" in converted.notes
    assert converted.weights["layers.1.attention.query.weight"].equal((value + 1e-12).float())


def test_a_name_that_no_run_may_have_is_changed(folder: Path, tmp_path: Path) -> None:
    for name, expected in (("my model (2)", "my-model-2"), ("_", "converted")):
        shutil.copytree(folder, tmp_path / name)
        assert convert(tmp_path / name, tmp_path / f"{name}-out") == 0
        assert load_model(tmp_path / f"{name}-out").run_config.name == expected


# What is refused.


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(QUERY), f"{QUERY} is missing"),
        (lambda t: t.pop("cls.predictions.transform.dense.bias"), "cls.predictions.transform.dense.bias is missing"),
        (lambda t: t.pop("cls.predictions.bias"), "cls.predictions.bias is missing"),
        (lambda t: t.pop(BASE + "position_embeddings.weight"), "position_embeddings.weight is missing"),
        (lambda t: t.update({QUERY: torch.zeros(16, 8)}), rf"{QUERY} is (16, 8), and (16, 16) by the configuration"),
        (lambda t: t.update({QUERY: torch.zeros(16, 16, dtype=torch.int8)}), "query.weight holds int8"),
        (lambda t: t.update({QUERY: torch.full((16, 16), torch.nan)}), "query.weight has values that are not finite"),
        (
            lambda t: t.update({QUERY.replace("layer.1", "layer.2"): torch.zeros(16, 16)}),
            "layer.2.attention.self.query.weight (16, 16) has no place in this model",
        ),
        (
            lambda t: t.update({"cls.predictions.decoder.weight": torch.zeros(283, 16)}),
            "cls.predictions.decoder.weight is not the word table",
        ),
        (
            lambda t: t.update({"cls.predictions.decoder.bias": torch.ones(283)}),
            "cls.predictions.decoder.bias and cls.predictions.bias differ",
        ),
        (
            lambda t: t.update({BASE + "token_type_embeddings.weight": torch.ones(2, 8)}),
            "token_type_embeddings.weight is (2, 8)",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(folder: Path, change: Callable[..., Any], words: str) -> None:
    change_tensors(folder, change)
    said = refusal(folder)
    assert words in said
    assert f"{folder} cannot be converted" in said


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "relu"}, "hidden_act is 'relu', and this model has GELU alone"),
        ({"hidden_size": "16"}, "hidden_size is '16' and must be a whole number of at least 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0 and must be"),
        ({"hidden_dropout_prob": -1}, "hidden_dropout_prob is -1 and must be a number of at least 0"),
        ({"hidden_dropout_prob": 1.0}, "gives no model that is possible here: .*dropout"),
        ({"layer_norm_eps": 0}, "layer_norm_eps is 0 and must be a positive number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1 and must be true or false"),
        ({"num_attention_heads": 3}, "hidden_size 16 is not divisible by num_heads 3"),
        ({"add_cross_attention": True}, "add_cross_attention is True: an encoder alone"),
        ({"inv_coeff_init_option": True}, "inv_coeff_init_option is True: transformers itself raises TypeError"),
        ({"num_landmarks": 7}, "segment_means_seq_len 64 is no multiple of num_landmarks 7"),
        ({"conv_kernel_size": 6}, "conv_kernel_size is 6 and must be odd"),
        ({"num_hidden_layers": 1}, "encoder.layer.1.*has no place in this model"),
    ],
)
def test_a_configuration_that_cannot_be_ours_is_named(folder: Path, changes: dict[str, Any], words: str) -> None:
    change_json(folder / "config.json", **changes)
    with pytest.raises(UserError, match=words):
        find_source(folder).read(folder)


def test_exact_gelu_is_near_and_said(folder: Path) -> None:
    change_json(folder / "config.json", hidden_act="gelu")
    assert any("the activation is the exact GELU there" in note for note in find_source(folder).read(folder).notes)


def test_other_folders_and_files_are_refused_with_what_can_be_read(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(tmp_path / "nowhere", tmp_path / "out") == 2
    assert "does not exist: give a folder or file on this machine" in capsys.readouterr().err
    change_json(folder / "config.json", model_type="gpt2")
    assert convert(folder, tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "is a 'gpt2' of transformers, which cannot be converted" in said
    assert all(kind.description in said for kind in SOURCES.all().values())
    change_json(folder / "config.json", model_type=None)
    with pytest.raises(UserError, match=r"has a config.json without a model_type"):
        find_source(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json cannot be read as JSON"):
        find_source(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"has no config.json"):
        find_source(folder)
    with pytest.raises(UserError, match="is another file"):
        find_source(folder / "model.safetensors")


def test_the_tokenizer_must_be_there_and_fit(
    folder: Path, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_json(folder / "config.json", vocab_size=100)
    keys = ("nystromformer.embeddings.word_embeddings.weight", "cls.predictions.bias")
    change_tensors(folder, lambda t: t.update({key: t[key][:100].clone() for key in keys}))
    assert convert(folder, tmp_path / "out") == 2
    assert "and the word table of" in capsys.readouterr().err
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert convert(folder, tmp_path / "out") == 2
    assert "give the tokenizer of the weights as --tokenizer FOLDER" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# Files.


def test_shards_and_pickles_hold_the_same(loaded: LoadedModel, folder: Path, tmp_path: Path) -> None:
    whole = find_source(folder).read(folder).weights
    write_stock(loaded, tmp_path / "shards", 64, max_shard_size="4KB")
    assert not (tmp_path / "shards/model.safetensors").exists()
    tensors = load_file(folder / "model.safetensors")
    for name in ("pickle", "pickles"):
        shutil.copytree(folder, tmp_path / name)
        (tmp_path / name / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "pickle/pytorch_model.bin")
    placed = {name: f"part-{i % 2}.bin" for i, name in enumerate(tensors)}
    for part in set(placed.values()):
        torch.save({name: tensors[name] for name in tensors if placed[name] == part}, tmp_path / "pickles" / part)
    (tmp_path / "pickles/pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": placed}))
    for name in ("shards", "pickle", "pickles"):
        found = find_source(tmp_path / name).read(tmp_path / name).weights
        assert found.keys() == whole.keys()
        assert all(found[key].equal(whole[key]) for key in whole)


class Attack:
    """Runs a program where it is unpickled."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("ATTACKED"),)


def test_a_pickle_that_needs_more_is_refused_and_not_run(
    folder: Path, loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({**tensors, "extra": Attack()}, folder / "pytorch_model.bin")
    assert "loading it could run a program" in refusal(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Attack()}))
    assert "pytorch_model.bin cannot be read" in refusal(folder)
    file = mlpen_folder(tmp_path / "mlpen", loaded)
    torch.save({"model_state_dict": {}, "lr_scheduler_state_dict": {"anneal_func": Attack()}}, file.with_suffix(".cp"))
    assert "The .model file of the same epoch has the weights alone" in refusal(file.with_suffix(".cp"))
    assert not (tmp_path / "ATTACKED").exists()


def torch_file() -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(100)}, buffer)
    return buffer.getvalue()


def test_damaged_and_missing_files_are_named(folder: Path, loaded: LoadedModel, tmp_path: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert "model.safetensors cannot be read" in refusal(folder)
    (folder / "model.safetensors").unlink()
    assert "has no weights: expected one of model.safetensors, " in refusal(folder)
    pointer = b"version https://git-lfs.github.com/spec/v1\n"
    (folder / "pytorch_model.bin").write_bytes(pointer)
    assert "pytorch_model.bin is a pointer of Git LFS" in refusal(folder)
    for broken in (b"", b"hello", b"\x80\x02junk", pickle.dumps({"a": 1}, protocol=4)[:-3], torch_file()[:300]):
        (folder / "pytorch_model.bin").write_bytes(broken)
        assert "pytorch_model.bin cannot be read as tensors of torch.save" in refusal(folder)
    torch.save([1, 2], folder / "pytorch_model.bin")
    assert "holds no tensors by name, but list" in refusal(folder)
    torch.save({"epoch": 3}, folder / "pytorch_model.bin")
    assert "'epoch' is int" in refusal(folder)


def test_shards_must_be_whole_and_in_the_folder(loaded: LoadedModel, tmp_path: Path) -> None:
    write_stock(loaded, tmp_path, 64, max_shard_size="4KB")
    index = tmp_path / "model.safetensors.index.json"
    body = json.loads(index.read_text())
    name = body["weight_map"][QUERY]
    shard = load_file(tmp_path / name)
    del shard[QUERY]
    save_file(shard or {"x": torch.zeros(1)}, tmp_path / name)
    assert f"lacks {QUERY}, which model.safetensors.index.json lists" in refusal(tmp_path)
    (tmp_path / name).unlink()
    assert f"{name} is missing" in refusal(tmp_path)
    index.write_text(json.dumps({"weight_map": {QUERY: "../secret.safetensors"}}))
    assert "it must be a file in the same folder" in refusal(tmp_path)
    for broken in ("{", "[]", '{"weight_map": {}}'):
        index.write_text(broken)
        assert "is no index of shards" in refusal(tmp_path)


# mlpen/Nystromformer.


@pytest.mark.parametrize("ending", [".model", ".cp"])
def test_files_of_the_authors_code_come_with_a_tokenizer_of_your_own(
    loaded: LoadedModel, tmp_path: Path, ending: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = mlpen_folder(tmp_path / "nystrom-64", loaded).with_suffix(ending)
    assert convert(file, tmp_path / "out") == 2
    assert "has no tokenizer: give the one that it was trained with as --tokenizer" in capsys.readouterr().err
    loaded.tokenizer.save(tmp_path / "tokenizer")
    assert convert(file, tmp_path / "out", "--tokenizer", str(tmp_path / "tokenizer")) == 0
    back = load_model(tmp_path / "out")
    assert back.weights_hash == loaded.weights_hash
    keys = {"attention", "num_landmarks", "inverse_init", "conv_kernel", "max_positions", "intermediate_size"}
    assert back.model_config.model_dump(include=keys) == loaded.model_config.model_dump(include=keys)
    assert "mlm.mlm_class.weight (283, 16): the word table, which the head shares" in capsys.readouterr().out


def test_their_configurations_are_read_as_their_program_reads_them(loaded: LoadedModel, tmp_path: Path) -> None:
    def read(name: str, **changes: Any) -> Any:
        file = mlpen_folder(tmp_path / name, loaded, **changes)
        return find_source(file).read(file)

    # As nystrom-512/config.json is published.
    swapped = read("swapped", num_landmarks=64, seq_len=8)
    assert (swapped.model.attention, swapped.model.num_landmarks) == ("nystrom", 8)
    assert "are exchanged in" in swapped.notes[0]
    assert "inverse_init is original" in swapped.notes[1]
    assert read("exact", num_landmarks=64).model.attention == "softmax"
    other = read("start", inv_coeff_init_option=1, inv_init_coeff_option="exact")
    assert (other.model.inverse_init, other.notes) == ("block", ())
    with pytest.raises(UserError, match="attn_type is 'linformer'"):
        read("linformer", attn_type="linformer")
    with pytest.raises(UserError, match="no multiple of num_landmarks 7"):
        read("seven", num_landmarks=7)
    with pytest.raises(UserError, match="embedding_dim is 8: this model has it follow from the width, 16"):
        read("narrow", embedding_dim=8)
    file = mlpen_folder(tmp_path / "softmax", loaded, attn_type="softmax")
    assert find_source(file).read(file).model.conv_kernel == 5  # it is there, so it was used


def test_the_reorganized_code_has_other_names_and_positions_from_row_0(loaded: LoadedModel, tmp_path: Path) -> None:
    file = mlpen_folder(tmp_path, loaded, dim=16, hidden_dim=24)
    state = torch.load(file)["model_state_dict"]
    names = {".ff1.": ".ff.0.", ".ff2.": ".ff.2.", "model.transformer_": "model.backbone.backbone.encoders."}
    renamed = {}
    for name, value in state.items():
        for old, new in names.items():
            name = name.replace(old, new)
        renamed[name] = value
    table = "model.embeddings.position_embeddings.weight"
    renamed[table] = renamed[table][2:].clone()
    renamed["model.pooler.weight"] = renamed["sen_class.weight"] = torch.zeros(16, 16)
    torch.save({"model_state_dict": renamed}, file)
    change = json.loads((tmp_path / "config.json").read_text())
    del change["model"]["seq_len"], change["model"]["transformer_dim"]
    (tmp_path / "config.json").write_text(json.dumps(change))
    converted = find_source(file).read(file)
    ours = unique_weights(loaded.model)
    key = "embeddings.position_embeddings.weight"
    assert converted.weights[key][2:].equal(ours[key][2:])
    assert all(converted.weights[name].equal(value) for name, value in ours.items() if name != key)
    assert any("the activation is the exact GELU there" in note for note in converted.notes)
    left = {entry.name for entry in converted.entries if entry.fate == "left over"}
    assert left == {"model.pooler.weight", "sen_class.weight", "mlm.mlm_class.weight"}


def test_their_folder_names_its_files_and_a_file_needs_their_configuration(loaded: LoadedModel, tmp_path: Path) -> None:
    file = mlpen_folder(tmp_path / "nystrom-64", loaded)
    assert f"give one of its checkpoints ({file.with_suffix('.cp')}, {file})" in refusal(tmp_path / "nystrom-64")
    torch.save({"weights": 1}, file)
    assert "has no model_state_dict" in refusal(file)
    (tmp_path / "nystrom-64/config.json").unlink()
    assert "has no config.json of mlpen/Nystromformer beside it" in refusal(file)
