"""The configuration of a Nyströmformer for transformers: ``network`` has the keys of ``ModelConfig``.

They stand in a block of their own since transformers gives some of their names, such as ``rope_scaling``, another
meaning. What other libraries look for is there by the standard names, ``num_hidden_layers`` for one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from pretrain.model.config import ModelConfig

STANDARD = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "ffn_size",
    "initializer_range": "init_std",
}
"""Names of transformers, and of attributes of ``ModelConfig``."""


class NystromConfig(PreTrainedConfig):
    """A masked model (``network["objective"]`` is mlm) or a causal one (clm), and everything else about it."""

    model_type = "nystrom_lm"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - transformers reads it from the class

    def __init__(self, network: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """Raises what ``ModelConfig`` raises for values that do not fit together.

        ``vocab_size`` alone may differ from that of ``network``, as after ``resize_token_embeddings``.
        """
        given = {"vocab_size": 8192, **(network or {})}
        model = ModelConfig(**{**given, "vocab_size": kwargs.get("vocab_size", given["vocab_size"])})
        causal = model.objective == "clm"
        for theirs in STANDARD:
            kwargs.pop(theirs, None)
        self.network = model.model_dump()
        for theirs, ours in STANDARD.items():
            setattr(self, theirs, getattr(model, ours))
        self.classifier_pooling = kwargs.pop("classifier_pooling", "last" if causal else "mean")
        self.classifier_dropout = kwargs.pop("classifier_dropout", 0.1)
        kwargs.setdefault("is_decoder", causal)
        kwargs.setdefault("use_cache", causal)
        kwargs["tie_word_embeddings"] = model.tie_embeddings
        super().__init__(**kwargs)

    def model_config(self) -> ModelConfig:
        """The part that describes the network."""
        return ModelConfig(**{**self.network, "vocab_size": self.vocab_size})

    @property
    def objective(self) -> str:
        """mlm or clm."""
        return str(self.network["objective"])
