"""What a change of sources, weights or packing means for a run that has begun. No training: only the comparison."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from training_case import settings

from data_pipeline.errors import UserError
from pretrain.checkpoint.commit import Manifest, TrainState
from pretrain.checkpoint.resume import check_resume, describe_change, identity
from pretrain.checks import check_inputs
from pretrain.config import parse_config


def case(corpus: Path, weights: dict[str, float] | None = None, **data: Any) -> dict[str, Any]:
    """A run on a mixture of packed documents; ``weights`` are those of its second stage."""
    sources = [{"path": str(corpus / "train"), "weight": 2}, {"path": str(corpus / "valid"), "weight": 1}]
    stages = [
        {"until_tokens": 1024, "seq_len": 32, "micro_batch": 2},
        {"until_tokens": 2048, "seq_len": 64, "micro_batch": 2, "weights": weights},
    ]
    return settings(corpus, corpus, data={"train": sources, "packing": "documents", **data}, curriculum=stages)


def resume(before: dict[str, Any], now: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Start a run, stop at ``tokens``, resume with another configuration."""
    old, new = (check_inputs(parse_config(raw), 1) for raw in (before, now))
    kept = json.loads(json.dumps(identity(old.config, old.fingerprint, 1)))
    manifest = Manifest("step4", TrainState(step=tokens // 256, tokens=tokens), kept, {})
    return check_resume(manifest, new.config, new.plan, new.fingerprint, 1)


def test_the_same_sources_in_another_order_or_place_go_on(corpus: Path, tmp_path: Path) -> None:
    assert resume(case(corpus), case(corpus), 512) == {}
    turned = case(corpus)
    turned["data"]["train"].reverse()
    for source in turned["data"]["train"]:
        (tmp_path / source["path"].rsplit("/", 1)[1]).symlink_to(source["path"])
        source["path"] = str(tmp_path / source["path"].rsplit("/", 1)[1])
        source["weight"] *= 5  # only proportions count
    assert resume(case(corpus), turned, 512) == {}


def test_weights_may_change_in_stages_to_come_only(corpus: Path) -> None:
    one_to_one = {"train": 1.0, "valid": 1.0}
    for tokens in (0, 512, 1024):  # the second stage begins at 1024
        assert set(resume(case(corpus), case(corpus, one_to_one), tokens)) == {"curriculum"}
    with pytest.raises(
        UserError, match=r"weights of the sources differ in the past: at 1280 tokens, .*\(from, weights\)"
    ):
        resume(case(corpus), case(corpus, one_to_one), 1280)
    other = case(corpus)
    other["data"]["train"][0]["weight"] = 3
    with pytest.raises(UserError, match="weights of the sources differ in the past: at 256 tokens"):
        resume(case(corpus), other, 256)


def test_changes_of_the_curriculum_are_told_one_by_one() -> None:
    old = [{"until_tokens": 10, "seq_len": 2, "weights": None}, {"until_tokens": 20, "seq_len": 4, "weights": None}]
    new = [old[0], {**old[1], "until_tokens": 30, "micro_batch": 3}, {"until_tokens": 40, "seq_len": 8}]
    assert describe_change("curriculum", old, new) == [
        "curriculum.1.until_tokens from 20 to 30",
        "curriculum.1.micro_batch from None to 3",
        "curriculum.2 is new (until_tokens 40, seq_len 8)",
    ]
    assert describe_change("curriculum", old, old[:1]) == ["curriculum.1 is gone (until_tokens 20, seq_len 4)"]
    assert describe_change("seed", 1, 2) == ["seed from 1 to 2"]


def test_validation_tokens_left_out_are_those_of_the_checkpoint(corpus: Path) -> None:
    def validated(tokens: int | None) -> dict[str, Any]:
        return settings(corpus, corpus, validation={"tokens": tokens})

    assert resume(validated(512), validated(None), 512) == {}
    assert resume(validated(512), validated(1024), 512) == {"validation.tokens": [512, 1024]}


def staged(corpus: Path, model: dict[str, Any] | None = None, **stages: list[Any]) -> dict[str, Any]:
    """Three stages of 1024 tokens each; ``stages`` are lists of a key's values, None where it is left out."""
    curriculum = [
        {"until_tokens": 1024 * (i + 1), "seq_len": 16 << i, "micro_batch": 2}
        | {key: values[i] for key, values in stages.items() if values[i] is not None}
        for i in range(3)
    ]
    return settings(corpus, corpus, curriculum=curriculum, model=model or {})


@pytest.mark.parametrize(
    ("key", "was", "now", "message"),
    [
        ("batch_tokens", [None, None, None], [None, 512, None], "curriculum.1.batch_tokens was 256 and is now 512"),
        ("masking_rate", [None, None, None], [None, 0.3, None], "curriculum.1.masking_rate was 0.15 and is now 0.3"),
        ("rope_theta", [None, None, None], [None, 2e4, None], "curriculum.1.rope_theta was 10000.0 and is now 20000.0"),
    ],
)
def test_settings_of_stages_to_come_may_change(
    corpus: Path, key: str, was: list[Any], now: list[Any], message: str
) -> None:
    before, after = staged(corpus, **{key: was}), staged(corpus, **{key: now})
    for tokens in (0, 512, 1024):  # the second stage begins at 1024
        assert set(resume(before, after, tokens)) == {"curriculum"}
    for tokens in (1536, 2048, 3072):
        with pytest.raises(UserError, match="differs in its past: " + message) as refusal:
            resume(before, after, tokens)
        assert "stage 1 began at 1024 tokens and the run stands at" in str(refusal.value)
    later = staged(corpus, **{key: [*was[:2], now[1]]})  # the same change one stage later
    assert set(resume(before, later, 2048)) == {"curriculum"}


def test_what_a_stage_had_counts_and_not_where_it_was_written(corpus: Path) -> None:
    moved = staged(corpus, batch_tokens=[256, 256, None])
    moved["batch_tokens"] = 512
    assert resume(staged(corpus), moved, 2048)["batch_tokens"] == [256, 512]
    with pytest.raises(UserError, match=r"curriculum.2.batch_tokens was 256 and is now 512"):
        resume(staged(corpus), moved, 2560)
    ntk = staged(corpus, {"rope_scaling": "ntk"})
    assert resume(staged(corpus), ntk, 1024) == {"model.rope_scaling": ["none", "ntk"]}  # it changed nothing so far
    with pytest.raises(UserError, match=r"curriculum.1.rope_theta was 10000.0 and is now 25198"):
        resume(staged(corpus), ntk, 1536)
    linear = staged(corpus, {"rope_scaling": "linear"})
    with pytest.raises(UserError, match=r"curriculum.1.rope_position_scale was 1.0 and is now 0.5"):
        resume(staged(corpus), linear, 1536)
    yarn = staged(corpus, {"rope_scaling": "yarn"})
    assert resume(staged(corpus), yarn, 1024) == {"model.rope_scaling": ["none", "yarn"]}
    assert resume(yarn, yarn, 3072) == {}
    for was, now, old, new in ((linear, yarn, None, 16), (yarn, linear, 16, None)):  # the scale alone does not tell
        assert set(resume(was, now, 1024)) == {"model.rope_scaling"}
        with pytest.raises(UserError, match=rf"curriculum.1.rope_original_length was {old} and is now {new}"):
            resume(was, now, 1536)
    with pytest.raises(UserError, match=r"curriculum.0.rope_theta was 10000.0 and is now 50000.0"):
        resume(staged(corpus), staged(corpus, {"rope_theta": 5e4}), 256)


def test_other_positions_are_refused_once_and_by_their_own_name(corpus: Path) -> None:
    with pytest.raises(UserError, match=r"model.positions was 'rotary' and is now 'learned'") as refusal:
        resume(staged(corpus), staged(corpus, {"positions": "learned"}), 1536)
    assert "rope_theta" not in str(refusal.value)
    other = staged(corpus)
    other["curriculum"][1]["seq_len"] = 16
    with pytest.raises(UserError, match=r"the stages were \(from, seq_len\) \[\(0, 16\), \(1024, 32\)\] and are now"):
        resume(staged(corpus), other, 1536)
    short = {**staged(corpus), "data": {"train": str(corpus / "train"), "block_length": 64}}
    with pytest.raises(UserError, match="differs in its past: it is over after 1024 tokens, at 2048 tokens"):
        resume(short, {**short, "curriculum": short["curriculum"][:1]}, 2048)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"packing": "stream"}, "data.packing was 'documents' and is now 'stream'"),
        ({"max_padding": 0.1}, "data.max_padding was 0.02 and is now 0.1: the documents would be packed anew"),
    ],
)
def test_another_packing_is_refused_by_name(corpus: Path, data: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as refusal:
        resume(case(corpus), case(corpus, **data), 512)
    assert "are not those" not in str(refusal.value)  # said once


def test_shorter_stages_to_come_would_pack_anew(corpus: Path) -> None:
    other = case(corpus)
    other["curriculum"].append({"until_tokens": 4096, "seq_len": 16, "micro_batch": 2})
    with pytest.raises(UserError, match="common divisor of the curriculum's lengths was 32 and is now 16"):
        resume(case(corpus), other, 512)
    before, now = case(corpus, packing="stream"), {**other, "data": {**other["data"], "packing": "stream"}}
    assert set(resume(before, now, 512)) == {"curriculum"}


def test_max_padding_is_free_where_nothing_is_packed(corpus: Path) -> None:
    changed = resume(case(corpus, packing="stream"), case(corpus, packing="stream", max_padding=0.1), 512)
    assert changed == {"data.max_padding": [0.02, 0.1]}


def test_other_sources_are_refused(corpus: Path) -> None:
    renamed = case(corpus)
    renamed["data"]["train"][1]["name"] = "held out"
    with pytest.raises(UserError, match=r"not those that the run was started with \(its sources were train, valid\)"):
        resume(case(corpus), renamed, 512)
    single = settings(corpus, corpus)
    with pytest.raises(UserError, match="are not those that the run was started with"):
        resume(case(corpus, packing="stream"), {**case(corpus, packing="stream"), "data": single["data"]}, 512)


def test_where_the_same_numbers_lie_may_change(corpus: Path) -> None:
    inputs = check_inputs(parse_config(settings(corpus, corpus, precision="bf16", zero_stage=1)), 1)
    kept = json.loads(json.dumps(identity(inputs.config, inputs.fingerprint, 4)))
    manifest = Manifest("step2", TrainState(step=2, tokens=512), kept, {})
    switches = ("offload_optimizer", "activation_checkpointing", "compile")
    changes = {"zero_stage": 3, **dict.fromkeys(switches, True)}
    config = inputs.config.model_copy(update=changes)
    assert check_resume(manifest, config, inputs.plan, inputs.fingerprint, 2) == {
        "processes": [4, 2],
        "zero_stage": [1, 3],
        **{key: [False, True] for key in switches},
    }
    for precision, changed in {"auto": {}, "bf16": {}, "fp32": {"precision": ["bf16", "fp32"]}}.items():
        asked = inputs.config.model_copy(update={"precision": precision})
        assert check_resume(manifest, asked, inputs.plan, inputs.fingerprint, 4) == changed
    stage_0 = inputs.config.model_copy(update={"precision": "auto", "zero_stage": 0})
    with pytest.raises(UserError, match=r"zero_stage is now 0, .* run is in bf16 \(--set precision=fp32 changes that"):
        check_resume(manifest, stage_0, inputs.plan, inputs.fingerprint, 4)
    fp32 = stage_0.model_copy(update={"precision": "fp32"})
    assert {"precision", "zero_stage"} == set(check_resume(manifest, fp32, inputs.plan, inputs.fingerprint, 4))
    for key, value in {"precision": "fp16", "optimizer": config.optimizer.model_copy(update={"kind": "muon"})}.items():
        with pytest.raises(UserError, match=rf"{key}.* was '(bf16|adamw)' and is now '(fp16|muon)'"):
            check_resume(manifest, config.model_copy(update={key: value}), inputs.plan, inputs.fingerprint, 2)


def test_a_checkpoint_from_before_there_were_mixtures_goes_on(corpus: Path) -> None:
    inputs = check_inputs(parse_config(settings(corpus, corpus)), 1)
    kept = json.loads(json.dumps(identity(inputs.config, inputs.train.shards.fingerprint, 1)))
    for key in ("packing", "max_padding"):
        del kept["config"]["data"][key]
    for stage in kept["config"]["curriculum"]:
        del stage["weights"]
    manifest = Manifest("step2", TrainState(step=2, tokens=512), kept, {})
    assert check_resume(manifest, inputs.config, inputs.plan, inputs.fingerprint, 1) == {}


def test_other_held_out_text_is_told(corpus: Path, tmp_path: Path) -> None:
    """Losses before and after are of different texts, in one file."""

    def held_out(path: Path | None) -> dict[str, Any]:
        return settings(corpus, corpus, data={"valid": None if path is None else str(path)})

    def change(before: Path | None, now: Path | None, version: bool = True) -> Any:
        old, new = (check_inputs(parse_config(held_out(path)), 1) for path in (before, now))
        prints = [None if inputs.valid is None else inputs.valid.fingerprint for inputs in (old, new)]
        kept = json.loads(json.dumps(identity(old.config, old.fingerprint, 1, prints[0])))
        if not version:  # as it was written before this was compared
            del kept["valid_fingerprint"]
        manifest = Manifest("step4", TrainState(step=4, tokens=512), kept, {})
        return check_resume(manifest, new.config, new.plan, new.fingerprint, 1, prints[1])

    train, valid, moved = corpus / "train", corpus / "valid", tmp_path / "moved"
    moved.symlink_to(valid)
    assert change(valid, valid) == change(valid, moved) == change(None, None) == {}
    (told,) = change(valid, train).values()
    assert [text.partition(" (hash ")[0] for text in told] == [str(valid), str(train)]
    assert told[0] != told[1]
    assert change(valid, None) == {"data.valid": [str(valid), None]}
    assert change(None, valid) == {"data.valid": [None, str(valid)]}
    assert change(valid, moved, version=False) == {"data.valid": [str(valid), str(moved)]}


@pytest.mark.parametrize("name", ["train", "valid"])
def test_shards_overwritten_in_place_are_refused(corpus: Path, tmp_path: Path, name: str) -> None:
    """Same size, same manifest: nothing but the contents tells."""
    copy = tmp_path / "corpus"
    shutil.copytree(corpus, copy)
    raw = settings(copy, tmp_path, data={"valid": str(copy / "valid")})
    inputs = check_inputs(parse_config(raw), 1)
    assert inputs.valid is not None
    shards = inputs.train.shards if name == "train" else inputs.valid
    path = shards.path / shards.manifest.shards[-1].tokens.name
    data = path.read_bytes()
    path.write_bytes(data[:-2] + data[:2])
    assert data[-2:] != data[:2]
    with pytest.raises(
        UserError, match=f"{path} is not what its manifest says: block 0 of .* bytes has other contents"
    ):
        check_inputs(parse_config(raw), 1)
