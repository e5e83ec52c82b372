"""The sources of a run: what is refused before it starts, what identifies them, and what is told about them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from training_case import settings

from data_pipeline.errors import UserError
from data_pipeline.prepare.plan import plan_preparation
from data_pipeline.prepare.run import prepare
from data_pipeline.shards.shardset import ShardSet
from data_pipeline.tokenization.training import train_tokenizer
from pretrain.checks import check_inputs
from pretrain.config import parse_config
from pretrain.describe import describe
from pretrain.sources import Inputs


def add_shards(folder: Path, name: str, texts: list[str], tokenizer: Any) -> Path:
    text = folder / f"{name}.jsonl"
    text.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare(plan_preparation([text], tokenizer), folder / name)
    return folder / name


def opened(corpus: Path, *paths: Path, **changes: Any) -> Inputs:
    sources = [{"path": str(path), "weight": i + 1} for i, path in enumerate(paths)]
    data = {"train": sources, **changes.pop("data", {})}
    return check_inputs(parse_config(settings(corpus, corpus, data=data, **changes)), 1)


def test_sources_of_two_tokenizers_are_refused_by_folder(corpus: Path, tmp_path: Path) -> None:
    texts = ["other words than before, and more of them than a block holds " * 10] * 3
    other = add_shards(tmp_path, "other", texts, train_tokenizer(texts, 280))
    with pytest.raises(UserError, match=rf"{corpus}/train were made with another tokenizer than those in {other}"):
        opened(corpus, corpus / "train", other)


def test_each_source_must_hold_a_block(corpus: Path, tmp_path: Path) -> None:
    tokenizer = ShardSet.open(corpus / "train").tokenizer()
    small = add_shards(tmp_path, "small", ["a few words"], tokenizer)
    for packing in ("stream", "documents"):
        with pytest.raises(UserError, match=rf"shards in {small} hold \d+ tokens, less than one block of 64"):
            opened(corpus, corpus / "train", small, data={"packing": packing})


def test_a_missing_source_and_weights_without_effect_are_refused(corpus: Path) -> None:
    with pytest.raises(UserError, match=r"shard folder .*/none does not exist"):
        opened(corpus, corpus / "train", corpus / "none")
    raw = settings(corpus, corpus, data={"train": [{"path": str(corpus / "train"), "weight": 0}]})
    with pytest.raises(UserError, match=r"all weights are 0 \(train\)"):
        check_inputs(parse_config(raw), 1)


def test_fingerprints_tell_everything_apart_that_changes_the_rows(corpus: Path) -> None:
    train, valid = corpus / "train", corpus / "valid"
    found = {
        "single": check_inputs(parse_config(settings(corpus, corpus)), 1).fingerprint,
        "both": opened(corpus, train, valid).fingerprint,
        "packed": opened(corpus, train, data={"packing": "documents"}).fingerprint,
        "packed tighter": opened(corpus, train, data={"packing": "documents", "max_padding": 0.01}).fingerprint,
        "both packed": opened(corpus, train, valid, data={"packing": "documents"}).fingerprint,
        "other block": opened(corpus, train, data={"packing": "documents", "block_length": 128}).fingerprint,
    }
    assert len(set(found.values())) == len(found)
    assert found["single"] == ShardSet.open(train).fingerprint  # as checkpoints from before there were mixtures have it
    assert found["single"] == opened(corpus, train).fingerprint
    assert found["both"] == opened(corpus, valid, train).fingerprint


def told(inputs: Inputs, precision: str | None = None) -> str:
    world = SimpleNamespace(world_size=1, device=SimpleNamespace(type="cpu"))
    return describe(inputs.config, inputs.plan, inputs.train, 1000, cast(Any, world), precision)


def test_the_description_names_sources_shares_and_epochs(corpus: Path) -> None:
    single = check_inputs(parse_config(settings(corpus, corpus)), 1)
    blocks = single.train.blocks[0]
    epochs = single.plan.total_tokens / 64 / blocks.num_blocks
    assert (
        f"Reads 2,048 tokens, {epochs:.2f} times the {blocks.shards.num_tokens:,} of {corpus}/train, in 8 steps of 256."
        in told(single)
    )
    assert "On 1 CPU process(es), fp32, ZeRO stage 0" in told(single)
    assert "On 1 CPU process(es), fp32 (auto: why), ZeRO stage 0" in told(single, "fp32 (auto: why)")
    assert "compile: true" not in told(single)
    compiled = check_inputs(parse_config(settings(corpus, corpus, compile=True)), 1)
    assert "compiled at the first step of each of 2 lengths, at each start anew. On CPUs that takes minutes" in told(
        compiled
    )
    one = [{"until_tokens": 256, "seq_len": 64, "micro_batch": 1}]
    short = told(check_inputs(parse_config(settings(corpus, corpus, curriculum=one, schedule={"warmup_tokens": 0})), 1))
    assert "in 1 step of 256." in short
    assert "Lengths: 1 step of 4 x 64, 1 row at a time." in short
    both = opened(corpus, corpus / "train", corpus / "valid", data={"packing": "documents", "max_padding": 0.1})
    text = told(both)
    assert "Reads 2,048 tokens of 2 sources in 8 steps of 256:" in text
    assert "  train: 33.3% of the tokens; " in text
    assert "  valid: 66.7% of the tokens; " in text
    assert f"{both.train.epochs(32)['valid']:.2f} times the" in text
    assert re.search(r"none of which attends to another; padding \(\d+\.\d\d% of train, \d+\.\d\d% of valid\)", text)
    stages = [{**settings(corpus, corpus)["curriculum"][0], "weights": {"train": 3, "valid": 1}}]
    stages += settings(corpus, corpus)["curriculum"][1:]
    assert "train: 75.0%, then 33.3% of the tokens" in told(
        opened(corpus, corpus / "train", corpus / "valid", curriculum=stages)
    )
