"""A checkpoint as a folder for transformers with its own code: every form and block, right where stock is not.

Backbone and head are two modules there: our ``layers.0...`` is ``model.layers.0...``, and ``head...`` stays.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from data_pipeline.tokenization.tokenizer import Tokenizer
from pretrain.convert.code import carried_code
from pretrain.convert.folder import CONFIG, DTYPES, SHARD_SIZE, cast, write_json, write_weights
from pretrain.convert.tokenizer import FACTS, tokenizer_files
from pretrain.model.config import ModelConfig

if TYPE_CHECKING:
    from pretrain.checkpoint.load import LoadedModel

MODEL_TYPE = "nystrom_lm"
_HEAD = "head."
_BACKBONE = "model."
Value = TypeVar("Value")


def to_theirs(weights: Mapping[str, Value]) -> dict[str, Value]:
    """Values by our names -> by those of the folder."""
    return {name if name.startswith(_HEAD) else _BACKBONE + name: value for name, value in weights.items()}


def to_ours(weights: Mapping[str, Value]) -> dict[str, Value]:
    """Values by the names of a folder -> by ours."""
    return {name.removeprefix(_BACKBONE): value for name, value in weights.items()}


def write_own(loaded: LoadedModel, out: Path, *, dtype: str = "fp32", max_shard_size: str = SHARD_SIZE) -> None:
    """Write configuration, code, weights and tokenizer into the empty folder ``out``."""
    from pretrain.checkpoint.load import unique_weights
    from pretrain.initialize import source_length

    config, causal = loaded.model_config, loaded.model_config.objective == "clm"
    length = source_length(loaded)
    files, changes = tokenizer_files(loaded.tokenizer, causal=causal, max_length=length)
    for name, text in carried_code(config).items():
        (out / name).write_text(text, encoding="utf-8")
    for name, data in files.items():
        (out / name).write_bytes(data)
    write_json(out / CONFIG, config_json(config, loaded.tokenizer, dtype))
    if causal:
        write_json(out / "generation_config.json", token_ids(loaded.tokenizer))
    write_json(
        out / FACTS,
        {
            "weights_hash": loaded.weights_hash,
            "tokens": loaded.tokens,
            "trained_length": length,
            "run": json.loads(loaded.run_config.model_dump_json(exclude_unset=True)),
            "tokenizer": changes,
        },
    )
    write_weights(to_theirs(cast(unique_weights(loaded.model), dtype)), out, max_shard_size)


def config_json(config: ModelConfig, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    """What ``AutoConfig`` reads."""
    head = "NystromForCausalLM" if config.objective == "clm" else "NystromForMaskedLM"
    auto = "AutoModelForCausalLM" if config.objective == "clm" else "AutoModelForMaskedLM"
    classes = {
        "AutoModel": "NystromModel",
        auto: head,
        "AutoModelForSequenceClassification": "NystromForSequenceClassification",
        "AutoModelForTokenClassification": "NystromForTokenClassification",
    }
    return {
        "network": config.model_dump(),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.ffn_size,
        **token_ids(tokenizer),
        "model_type": MODEL_TYPE,
        "architectures": [head],
        "auto_map": {
            "AutoConfig": "configuration_nystrom.NystromConfig",
            **{name: f"modeling_nystrom.{kind}" for name, kind in classes.items()},
        },
        "tie_word_embeddings": config.tie_embeddings,
        "dtype": DTYPES[dtype],
    }


def token_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Ids of special tokens by transformers' names, as far as there are."""
    found = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
        "mask_token_id": tokenizer.mask_id,
    }
    return {name: number for name, number in found.items() if number is not None}
