"""Runs that start with trained weights: what is taken of them, what is refused, and what a resume needs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks, values
from torch import nn
from training_case import STAGES, events, metrics, settings, write_config

from data_pipeline.errors import UserError, run_cli
from data_pipeline.tokenization.tokenizer import Tokenizer
from data_pipeline.tokenization.training import train_tokenizer
from pretrain.checkpoint.account import Entry, account, in_words
from pretrain.checkpoint.commit import Manifest, TrainState
from pretrain.checkpoint.load import LoadedModel
from pretrain.checkpoint.resume import check_resume, identity
from pretrain.checks import check_inputs
from pretrain.config import parse_config
from pretrain.config.load import load_config
from pretrain.curriculum.stages import stage_model
from pretrain.initialize import check_tokenizer, load_initial, resized_positions, settle, target_shapes
from pretrain.model.config import ModelConfig
from pretrain.model.transformer import build_model

POSITIONS = "embeddings.position_embeddings.weight"
NO_STEP = {"lr": 1e-30, "weight_decay": 0.0}
"""A rate at which no weight moves."""


def train(config: str, *words: str) -> int:
    """Runs in the ranks: the command itself."""
    from pretrain.cli import main

    return run_cli(main, "nystrom train", ["--config", config, *words])


def train_anew(config: str) -> int:
    """Runs in the ranks."""
    return train(config, "--resume", "never")


def train_until(config: str, step: int) -> int:
    """Runs in the ranks: as :func:`train`, but asked to stop in a step."""
    import os
    import signal

    from pretrain.engine.training import TrainingEngine

    take_step, count = TrainingEngine.step, {"steps": 0}

    def counting_step(self: Any, lr: float) -> Any:
        count["steps"] += 1
        if count["steps"] == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(self, lr)

    TrainingEngine.step = counting_step  # type: ignore[method-assign]
    return train(config)


def masters(config: str) -> dict[str, Any]:
    """Runs in the ranks: the master weights when training begins, whole, as this process sees them."""
    from pretrain.engine.state.fragments import MASTER, get_full
    from pretrain.trainer import Trainer

    found: dict[str, Any] = {}

    def look(self: Any) -> int:
        engine = self.engine
        found.update({n: get_full(engine._engine, p, MASTER).numpy() for n, p in engine.model.named_parameters()})
        return 75

    Trainer.run = look  # type: ignore[method-assign]
    assert train(config) == 75
    return found


def exported(run: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    return load_file(run / "export" / "model.safetensors")


def run_of(corpus: Path, folder: Path, name: str, **changes: Any) -> str:
    """The path of a configuration with validation on the held-out text."""
    base = {"data": {"valid": str(corpus / "valid")}, "validation": {"tokens": 1024, "samples": 0}, "name": name}
    return write_config(folder / f"{name}.yaml", settings(corpus, folder, **{**base, **changes}))


@pytest.fixture(scope="module")
def source(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a masked run with learned positions of up to 64 tokens, which nobody writes to."""
    folder = tmp_path_factory.mktemp("source")
    model = {"positions": "learned", "max_positions": 64}
    assert values(run_ranks(train, 1, config=run_of(corpus, folder, "books", model=model))) == [0]
    return folder / "books"


# The account, without a run.


def shapes(**model: Any) -> tuple[dict[str, tuple[int, ...]], ModelConfig]:
    """Shapes of a small model's tensors, and its configuration."""
    small = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 40, "conv_kernel": 5, **model}
    raw = {"name": "t", "model": small, "data": {"train": "x"}, "curriculum": STAGES, "batch_tokens": 256}
    run = parse_config(raw)
    return target_shapes(run), stage_model(run, 0)


def fates(there: dict[str, Any], here: dict[str, Any]) -> dict[str, dict[str, Entry]]:
    old, new = shapes(**there), shapes(**here)
    out: dict[str, dict[str, Entry]] = {"taken": {}, "new": {}, "left over": {}}
    for entry in account(old[0], new[0], old[1], new[1], "there"):
        out[entry.fate][entry.name] = entry
    # Nothing of either model is without a fate.
    assert out["taken"].keys() | out["new"].keys() == new[0].keys()
    assert out["left over"].keys() == old[0].keys() - out["taken"].keys()
    return out


def test_an_equal_model_is_taken_whole() -> None:
    found = fates({}, {})
    assert (len(found["taken"]), found["new"], found["left over"]) == (len(shapes()[0]), {}, {})


def test_a_causal_model_takes_the_backbone_of_a_masked_one() -> None:
    found = fates({}, {"objective": "clm", "landmark_inverse": True})
    old_only = {"head.dense.weight", "head.dense.bias", "head.norm.weight", "head.norm.bias", "head.decoder.bias"}
    conv = {f"layers.{i}.attention.conv_weight" for i in (0, 1)}
    gamma = {f"layers.{i}.attention.gamma_logit" for i in (0, 1)}
    assert found["left over"].keys() == old_only | conv
    assert found["new"].keys() == conv | gamma
    assert "embeddings.word_embeddings.weight" in found["taken"]
    assert found["left over"]["head.dense.weight"].why == "the head of objective mlm"


def test_forms_of_attention_take_each_others_projections() -> None:
    causal = {"objective": "clm", "landmark_inverse": True}
    to_softmax = fates(causal, {**causal, "attention": "softmax"})
    gamma = {f"layers.{i}.attention.gamma_logit" for i in (0, 1)}
    assert (to_softmax["new"], to_softmax["left over"].keys()) == ({}, gamma)
    back = fates({**causal, "attention": "softmax"}, causal)
    assert (back["new"].keys(), back["left over"]) == (gamma, {})
    assert back["new"]["layers.0.attention.gamma_logit"].why == "learned by attention nystrom"


def test_forms_by_layer_take_and_leave_by_layer() -> None:
    causal = {"objective": "clm", "landmark_inverse": True, "attention": ["nystrom", "softmax"]}
    moved = fates(causal, {**causal, "attention": ["softmax", "nystrom"]})
    first, second = (f"layers.{i}.attention.gamma_logit" for i in (0, 1))
    assert (moved["left over"].keys(), moved["new"].keys()) == ({first}, {second})
    assert moved["new"][second].why == "learned by attention nystrom"
    assert first in fates(causal, {**causal, "attention": "nystrom"})["taken"]


def test_a_head_of_its_own_starts_as_the_word_table_it_was() -> None:
    assert "head.decoder.weight" in fates({}, {"tie_embeddings": False})["taken"]
    left = fates({"tie_embeddings": False}, {})["left over"]
    assert left["head.decoder.weight"].why == "the head shares the word table here (model.tie_embeddings)"


@pytest.mark.parametrize(
    ("here", "words"),
    [
        ({"vocab_size": 48}, r"word_embeddings.weight is \(40, 16\) there and \(48, 16\) here: model.vocab_size is 40"),
        ({"hidden_size": 32}, r"\(40, 16\) there and \(40, 32\) here: model.hidden_size is 16 there and 32 here"),
        ({"intermediate_size": 24}, "feed_forward.*model.intermediate_size is 64 there and 24 here"),
        ({"ffn": "relu2"}, "model.ffn is gelu there and relu2 here"),  # of the same shapes
        ({"ffn": "swiglu"}, "feed_forward.*model.intermediate_size is 64 there and 48 here"),
        ({"norm_kind": "rmsnorm"}, "model.norm_kind is layernorm there and rmsnorm here"),
        ({"qk_norm": True}, "model.qk_norm is False there and True here"),
        ({"bias": False}, "model.bias is True there and False here"),
        ({"conv_kernel": 7}, "conv_weight is .*model.conv_kernel is 5 there and 7 here"),
        ({"num_heads": 4}, r"conv_weight is \(2, 1, 5, 1\) there .*model.num_heads is 2 there and 4 here"),
        ({"num_heads": 4, "conv_kernel": 0}, "model.num_heads is 2 there and 4 here"),
        ({"num_layers": 3}, "model.num_layers is 2 there and 3 here"),
        ({"norm": "post"}, "model.norm is pre there and post here"),
    ],
)
def test_what_does_not_fit_is_named_with_its_key(here: dict[str, Any], words: str) -> None:
    old, new = shapes(), shapes(**here)
    with pytest.raises(UserError, match=words) as refusal:
        account(old[0], new[0], old[1], new[1], "init_from books")
    assert "the weights of init_from books do not fit" in str(refusal.value)
    assert str(refusal.value).count("\n") <= 8


def test_nothing_taken_is_an_error() -> None:
    target, model = shapes()
    with pytest.raises(UserError, match="nothing of there fits"):
        account({"encoder.weight": (3, 3)}, target, model, model, "there")


def test_the_account_is_readable() -> None:
    lines = in_words([Entry(f"layers.{i}.a", "taken", (2, 3)) for i in (0, 1, 2, 5)] + [Entry("b", "new", (1,), "why")])
    assert lines == [
        "taken from there: 4",
        "  layers.0-2,5.a (2, 3)",
        "newly initialised: 1",
        "  b (1,): why",
        "left over there, not used: none",
    ]


def test_tables_of_positions_grow_and_shrink_as_stages_do() -> None:
    import torch

    table = torch.arange(6.0)[:, None]  # rows 0 and 1, then positions 0 to 3
    assert resized_positions(table, None, 9)[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 2, 3, 4]
    assert resized_positions(table, 2, 7)[:, 0].tolist() == [0, 1, 2, 3, 2, 3, 2]
    assert resized_positions(table, None, 4)[:, 0].tolist() == [0, 1, 2, 3]


def test_a_foreign_tokenizer_is_refused() -> None:
    one, other = (train_tokenizer([text * 50], 280) for text in ("many small words ", "quite different text "))
    assert check_tokenizer(one, one, "books") is None
    with pytest.raises(UserError, match=r"ids mean other tokens \(id \d+ is .* there and .* here\)"):
        check_tokenizer(one, other, "books")


def staged(lengths: list[int], **changes: Any) -> list[tuple[float, float]]:
    """Base and scale of the rotary angles in each stage."""
    stages = [{"until_tokens": 1024 * (i + 1), "seq_len": n, "micro_batch": 1} for i, n in enumerate(lengths)]
    raw = {"name": "t", "data": {"train": "x"}, "curriculum": stages, "batch_tokens": max(lengths), **changes}
    run = parse_config(raw)
    models = [stage_model(run, i) for i in range(len(lengths))]
    return [(round(m.rope_theta), m.rope_position_scale) for m in models]


@pytest.mark.parametrize("rule", ["ntk", "linear", "none"])
def test_rules_for_rotary_angles_begin_at_the_length_of_the_source(rule: str) -> None:
    model = {"hidden_size": 16, "num_heads": 2, "rope_scaling": rule}
    whole = staged([64, 32, 128, 256], model=model)
    assert staged([32, 128, 256], model=model, init_from="x", init_length=64) == whole[1:]
    assert len(set(whole)) == (1 if rule == "none" else 3)


def loaded(model: dict[str, Any], length: int) -> LoadedModel:
    """A model at the end of a run of a stage of 32 tokens and one of ``length``, without weights."""
    stages = [STAGES[0], {**STAGES[1], "seq_len": length, "until_tokens": 8192}]
    run = parse_config({**minimal(model), "curriculum": stages, "batch_tokens": length * 4})
    config = stage_model(run, 1)
    return LoadedModel(nn.Module(), config, run, train_tokenizer(["a b"], 270), "hash", 10**6, Path("books"), None)


def minimal(model: dict[str, Any]) -> dict[str, Any]:
    small = {"hidden_size": 16, "num_heads": 2, **model}
    return {"name": "t", "model": small, "data": {"train": "x"}, "curriculum": STAGES, "batch_tokens": 256}


def test_rotary_angles_continue_from_where_the_source_ended() -> None:
    books = loaded({"rope_scaling": "ntk"}, 128)
    ended = books.model_config.rope_theta
    assert ended == pytest.approx(10_000 * 4 ** (8 / 6))
    run = parse_config({**minimal({}), "init_from": "books"})
    settled, notes = settle(run, books)
    assert (settled.model.rope_theta, settled.init_length) == (ended, 128)
    assert "continue from 128 tokens: base 63,49" in notes[0]
    # What the configuration names wins, and is told.
    settled, notes = settle(parse_config({**minimal({"rope_theta": 5e5}), "init_from": "books"}), books)
    assert settled.model.rope_theta == 5e5
    assert "base 500,000, scale 1; the source ended with base 63,49" in notes[0]
    # Other positions have nothing to continue.
    settled, notes = settle(parse_config({**minimal({"positions": "learned"}), "init_from": "books"}), books)
    assert settled.init_length is None
    assert "rotary there and learned here" in notes[0]


def test_a_resume_keeps_what_the_start_settled_and_old_checkpoints_know_nothing_of_it(corpus: Path) -> None:
    inputs = check_inputs(parse_config(settings(corpus, corpus, init_from="books")), 1)
    began, _ = settle(inputs.config, loaded({"rope_scaling": "ntk"}, 128))
    facts = {"path": "books", "weights_hash": "hash"}

    def resume(kept: dict[str, Any], **changes: Any) -> dict[str, Any]:
        now = check_inputs(parse_config(settings(corpus, corpus, **changes)), 1)
        manifest = Manifest("step4", TrainState(step=4, tokens=1024), kept, {})
        return check_resume(manifest, now.config, now.plan, now.fingerprint, 1)

    kept = json.loads(json.dumps(identity(began, inputs.fingerprint, 1, source=facts)))
    assert kept["init_from"] == facts
    assert resume(kept, init_from="books") == {}
    with pytest.raises(UserError, match=r"curriculum.0.rope_theta was 63496.* and is now 20000"):
        resume(kept, init_from="books", model={"rope_theta": 2e4})
    plain = parse_config(settings(corpus, corpus))
    old = json.loads(json.dumps(identity(check_inputs(plain, 1).config, inputs.fingerprint, 1)))
    del old["config"]["init_from"], old["config"]["init_length"]
    assert resume(old) == {}
    with pytest.raises(UserError, match="init_from was None and is now 'books'"):
        resume(old, init_from="books")


# Runs.


def test_a_run_that_does_not_move_has_the_loss_of_its_source(corpus: Path, source: Path, tmp_path: Path) -> None:
    """To the bit, at the longest length; from the export, the run and a checkpoint alike."""
    model = {"positions": "learned", "max_positions": 64}
    stage = [{"until_tokens": 512, "seq_len": 64, "micro_batch": 2}]
    config = run_of(
        corpus, tmp_path, "same", model=model, curriculum=stage, optimizer=NO_STEP, init_from=str(source),
        schedule={"warmup_tokens": 0},
    )  # fmt: skip
    (ended,) = run_ranks(train, 1, config=config)
    assert ended.value == 0, ended.output
    assert f"Starts with the weights of {source} (2,048 tokens, hash " in ended.output
    assert "  newly initialised: none\n  left over there, not used: none\n" in ended.output
    assert "layers.0-1.attention.query.weight (16, 16)" in ended.output
    assert metrics(tmp_path / "same", "valid")[-1]["loss"] == metrics(source, "valid")[-1]["loss"]
    account = json.loads((tmp_path / "same/init_from.json").read_text())
    assert account["weights_hash"] == json.loads((source / "export/export.json").read_text())["weights_hash"]
    assert {tensor["fate"] for tensor in account["tensors"]} == {"taken"}
    before = exported(source)
    assert all((value == before[name]).all() for name, value in exported(tmp_path / "same").items())
    # What `nystrom replay` computes with where a run has no checkpoint.
    run = load_config(tmp_path / "same/config.yaml")
    fresh, tokenizer = build_model(stage_model(run, 0)), Tokenizer.load(source / "tokenizer")
    load_initial(fresh, run, tokenizer, tmp_path / "same")
    assert all((value.detach().numpy() == before[name]).all() for name, value in fresh.named_parameters())
    (tmp_path / "same/init_from.json").write_text(json.dumps({**account, "weights_hash": "0"}))
    with pytest.raises(UserError, match="has other weights by now"):
        load_initial(fresh, run, tokenizer, tmp_path / "same")


@pytest.mark.parametrize(
    ("zero_stage", "precision", "world_size"),
    [
        (1, "bf16", 1),
        (3, "fp32", 2),
        pytest.param(0, "fp32", 2, marks=pytest.mark.slow),
        pytest.param(2, "bf16", 2, marks=pytest.mark.slow),
        pytest.param(3, "bf16", 2, marks=pytest.mark.slow),
    ],
)
def test_master_weights_are_those_of_the_source_to_the_bit(
    corpus: Path, source: Path, tmp_path: Path, zero_stage: int, precision: str, world_size: int
) -> None:
    """With a longer table of positions, whose new rows repeat the old ones."""
    import numpy as np

    stages = [{"until_tokens": 1024, "seq_len": 128, "micro_batch": 1}]
    config = run_of(
        corpus, tmp_path, "longer", model={"positions": "learned"}, curriculum=stages, zero_stage=zero_stage,
        precision=precision, init_from=str(source / "checkpoints/step000000008"),
    )  # fmt: skip
    before = exported(source)
    for found in values(run_ranks(masters, world_size, config=config)):
        assert found.keys() == before.keys()
        assert found[POSITIONS].shape == (512 + 2, 16)
        assert np.array_equal(found[POSITIONS][:66], before[POSITIONS])
        assert np.array_equal(found[POSITIONS][66:130], before[POSITIONS][2:])
        assert all(np.array_equal(found[name], before[name]) for name in before if name != POSITIONS)


def test_a_causal_run_from_a_masked_one_resumes_without_it(corpus: Path, source: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(source / "export", copy)
    changes: dict[str, Any] = {"model": {"objective": "clm", "positions": "learned"}, "init_from": str(copy)}
    config = run_of(corpus, tmp_path, "causal", **changes)
    (ended,) = run_ranks(train_until, 1, config=config, step=3)
    assert ended.value == 75, ended.output
    assert "head.dense.weight (16, 16): the head of objective mlm" in ended.output
    shutil.rmtree(copy)
    run = tmp_path / "causal"
    manifest = json.loads((run / "checkpoints/step000000003/manifest.json").read_text())
    expected = json.loads((source / "export/export.json").read_text())["weights_hash"]
    assert manifest["identity"]["init_from"]["weights_hash"] == expected
    assert load_config(run / "config.yaml").init_length == 64
    for key, value, words in [
        ("init_from", "elsewhere", "init_from was .* and is now 'elsewhere'"),
        ("init_from", None, "init_from was .* and is now None"),
        ("init_length", 32, "init_length was 64 and is now 32"),
    ]:
        changed = {**changes, key: value}
        (ended,) = run_ranks(train, 1, config=run_of(corpus, tmp_path, "causal", **changed))
        assert ended.value == 2
        assert re.search(words, ended.output), ended.output
    (ended,) = run_ranks(train, 1, config=run_of(corpus, tmp_path, "causal", **changes))
    assert ended.value == 0, ended.output
    assert events(run).count("resume") == 1
    manifest = json.loads((run / "checkpoints/step000000008/manifest.json").read_text())
    assert manifest["identity"]["init_from"]["weights_hash"] == expected


def test_a_source_that_cannot_be_used_is_refused_before_anything_is_written(
    corpus: Path, source: Path, tmp_path: Path
) -> None:
    """Missing, damaged, of another model, or in the folder of the run itself."""
    damaged = tmp_path / "damaged"
    shutil.copytree(source / "export", damaged)
    weights = damaged / "model.safetensors"
    contents = weights.read_bytes()
    weights.write_bytes(contents[:-1] + bytes([contents[-1] ^ 1]))
    torn = tmp_path / "torn"
    shutil.copytree(source, torn)
    shutil.rmtree(torn / "export")
    file = next((torn / "checkpoints/step000000008").glob("*model_states.pt"))
    file.write_bytes(file.read_bytes()[:-50] + bytes(50))
    learned = {"positions": "learned"}
    for init_from, model, words in [
        (tmp_path / "none", learned, "init_from: .* does not exist"),
        (damaged, learned, "is not what export.json says: it was changed or damaged"),
        (torn, learned, "does not match its checksum"),
        (tmp_path, learned, "is neither a run folder, nor a checkpoint"),
        (source, {**learned, "hidden_size": 32}, "model.hidden_size is 16 there and 32 here"),
    ]:
        config = run_of(corpus, tmp_path, "fresh", model=model, init_from=str(init_from))
        (ended,) = run_ranks(train, 1, config=config)
        assert ended.value == 2, ended.output
        assert re.search(words, ended.output), ended.output
        assert not (tmp_path / "fresh").exists()
    (tmp_path / "fresh").mkdir()
    shutil.copytree(source / "export", tmp_path / "fresh/export")
    config = run_of(corpus, tmp_path, "fresh", model=learned, init_from=str(tmp_path / "fresh/export"))
    (ended,) = run_ranks(train_anew, 1, config=config)
    assert ended.value == 2
    assert "own folder" in ended.output
    assert "which --resume never moves aside: give the new run another `name`" in ended.output
    assert [path.name for path in (tmp_path / "fresh").iterdir()] == ["export"]


@pytest.mark.slow
def test_all_processes_end_for_a_source_that_one_cannot_read(corpus: Path, source: Path, tmp_path: Path) -> None:
    shutil.copytree(source / "export", tmp_path / "damaged")
    (tmp_path / "damaged/model.safetensors").write_bytes(b"")
    config = run_of(corpus, tmp_path, "fresh", model={"positions": "learned"}, init_from=str(tmp_path / "damaged"))
    ended = run_ranks(train, 2, config=config, grace=1)  # the second waits for the first one's message to be seen
    assert ended[0].value == 2
    assert "model.safetensors cannot be read" in ended[0].output
    assert not (tmp_path / "fresh").exists()


@pytest.mark.slow
def test_two_processes_at_stage_3_equal_one(corpus: Path, source: Path, tmp_path: Path) -> None:
    import numpy as np

    changes: dict[str, Any] = {"model": {"positions": "learned", "attention": "softmax"}, "init_from": str(source)}
    for name, zero_stage, world_size in [("one", 0, 1), ("two", 3, 2)]:
        config = run_of(corpus, tmp_path, name, zero_stage=zero_stage, **changes)
        assert values(run_ranks(train, world_size, config=config)) == [0] * world_size
    one, two = (exported(tmp_path / name) for name in ("one", "two"))
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, atol=2e-6, err_msg=name)  # as in test_training
    losses = [[row["loss"] for row in metrics(tmp_path / name)] for name in ("one", "two")]
    np.testing.assert_allclose(*losses, rtol=2e-6)
