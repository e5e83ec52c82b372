"""Tiny models of the published block, and folders of checkpoints as other libraries leave them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from data_pipeline.tokenization.tokenizer import Tokenizer
from data_pipeline.tokenization.training import train_tokenizer
from pretrain.checkpoint.load import LoadedModel, unique_weights, weights_hash
from pretrain.config import parse_config
from pretrain.model import ModelConfig, build_model

TEXTS = ["the cat sat on the mat", "a dog ran over the hill and far away", "many small words in a row"]
PUBLISHED: dict[str, Any] = {
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 2,
    "intermediate_size": 24,
    "norm": "post",
    "positions": "learned",
    "max_positions": 64,
    "num_landmarks": 8,
    "conv_kernel": 5,
    "inverse_init": "original",
    "init_std": 0.2,
}
"""64 tokens with 8 landmarks."""


def tiny_tokenizer() -> Tokenizer:
    """A byte-level vocabulary of a few hundred tokens."""
    return train_tokenizer([text * 20 for text in TEXTS], 280)


def tiny_model(tokenizer: Tokenizer, seed: int = 0, **changes: Any) -> LoadedModel:
    """A fresh model of :data:`PUBLISHED` with ``changes``, in which no tensor is all zeros or ones."""
    torch.manual_seed(seed)
    config = ModelConfig(**{**PUBLISHED, "vocab_size": tokenizer.vocab_size + 3, **changes})
    model = build_model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    length = config.trained_positions or config.max_positions
    run = parse_config(
        {
            "name": "tiny",
            "model": config.model_dump(exclude={"trained_positions"}),
            "data": {"train": "shards"},
            "curriculum": [{"until_tokens": 1024, "seq_len": length, "micro_batch": 1}],
            "batch_tokens": length,
        }
    )
    digest = weights_hash(unique_weights(model))
    return LoadedModel(model, config, run, tokenizer, digest, 1024, Path("tiny"), None)


def our_logits(loaded: LoadedModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits of a model."""
    with torch.no_grad():
        return loaded.model(ids).logits


def change_json(file: Path, **changes: Any) -> None:
    """Set keys of a JSON object; None takes a key away."""
    body = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in body.items() if value is not None}))


def mlpen_folder(folder: Path, loaded: LoadedModel, **changes: Any) -> Path:
    """``model/cp-0001.model`` and ``.cp`` with the weights of ``loaded``, as the authors' program writes them."""
    config = loaded.model_config
    ours = unique_weights(loaded.model)

    def both(name: str, of: str) -> dict[str, torch.Tensor]:
        return {f"{name}.{part}": ours[f"{of}.{part}"] for part in ("weight", "bias")}

    words = ours["embeddings.word_embeddings.weight"]
    state = {
        "model.embeddings.word_embeddings.weight": words,
        "model.embeddings.position_embeddings.weight": ours["embeddings.position_embeddings.weight"],
        "model.embeddings.token_type_embeddings.weight": torch.zeros(1, config.hidden_size),
        **both("model.embeddings.norm", "embeddings.norm"),
    }
    for i in range(config.num_layers):
        to, of = f"model.transformer_{i}.", f"layers.{i}."
        for name, source in (("W_q", "query"), ("W_k", "key"), ("W_v", "value"), ("ff", "output")):
            state |= both(f"{to}mha.{name}", f"{of}attention.{source}")
        state[to + "mha.attn.conv.weight"] = ours[of + "attention.conv_weight"]
        state |= both(to + "norm1", of + "attention_norm") | both(to + "norm2", of + "feed_forward_norm")
        state |= both(to + "ff1", of + "feed_forward.intermediate") | both(to + "ff2", of + "feed_forward.output")
    state |= both("mlm.dense", "head.dense") | both("mlm.norm", "head.norm")
    state |= {"mlm.mlm_class.weight": words, "mlm.mlm_class.bias": ours["head.decoder.bias"]}
    (folder / "model").mkdir(parents=True)
    torch.save({"model_state_dict": state}, folder / "model/cp-0001.model")
    torch.save(
        {"model_state_dict": state, "optimizer_state_dict": {"state": {0: {"step": 1, "exp_avg": words}}}, "epoch": 1},
        folder / "model/cp-0001.cp",
    )
    block = {
        "mixed_precision": True,
        "vocab_size": 50265,
        "num_sen_type": 1,
        "max_seq_len": config.max_positions,
        "embedding_dim": config.hidden_size,
        "transformer_dim": config.hidden_size,
        "transformer_hidden_dim": config.ffn_size,
        "num_layers": config.num_layers,
        "dropout_prob": 0.1,
        "num_head": config.num_heads,
        "head_dim": config.head_dim,
        "attn_type": "nystrom",
        "num_landmarks": config.num_landmarks,
        "seq_len": config.max_positions,
        "conv_kernel_size": config.conv_kernel,
        **changes,
    }
    (folder / "config.json").write_text(json.dumps({"model_checkpoints": "/model/model", "model": block}))
    return folder / "model/cp-0001.model"
