"""Names of tensors here and elsewhere: BERT's, which RoBERTa and transformers' Nyströmformer took over, and mlpen's.

A table gives for each of our tensors the name that it has there. Three things are no renaming and have fields of their
own: their token types are a constant on every token and go into our positions, their table of positions may begin at
another row, and an output head that shares the word table may be saved once or twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

WORDS = "embeddings.word_embeddings.weight"
POSITIONS = "embeddings.position_embeddings.weight"
DECODER, BIAS = "head.decoder.weight", "head.decoder.bias"
CONVOLUTION = "layers.{i}.attention.conv_weight"


@dataclass(frozen=True)
class Names:
    """Where one kind of checkpoint has our tensors. ``{i}`` stands for the layer, ``{base}`` for the encoder."""

    base: str
    """What the encoder's tensors begin with, the dot included; empty in a file without a head."""
    modules: Mapping[str, str]
    """Our modules -> theirs, each with a ``weight`` and a ``bias``."""
    tensors: Mapping[str, str]
    """Our single tensors -> theirs; the convolution only if there is one."""
    positions: str
    types: str
    decoder: str
    biases: tuple[str, ...]
    """The output bias, under any of these names; the first one counts."""
    unused: Mapping[str, str] = field(default_factory=dict)
    """Pattern of their names that this model has no place for -> why."""
    first_position: int = 2
    """Row of position 0 in their table."""

    def of(self, name: str, layer: int | None = None) -> str:
        """A name in their checkpoint, of one of the values of the tables."""
        return name.format(base=self.base, i=layer)

    def pairs(self, layers: int) -> Iterator[tuple[str, str]]:
        """(ours, theirs) of all tensors but positions, token types and the output head's last layer."""
        for ours, theirs in self.modules.items():
            for i in range(layers) if "{i}" in ours else [0]:
                for part in ("weight", "bias"):
                    yield f"{ours.format(i=i)}.{part}", f"{self.of(theirs, i)}.{part}"
        for ours, theirs in self.tensors.items():
            for i in range(layers) if "{i}" in ours else [0]:
                yield ours.format(i=i), self.of(theirs, i)

    def without_head(self) -> Names:
        """The table of a file of the encoder alone, whose names have nothing before them."""
        return replace(self, base="")

    def why_unused(self, name: str) -> str:
        """Why one of their tensors has no place here; empty for a tensor that should have one."""
        for pattern, why in self.unused.items():
            if re.search(pattern, name):
                return why
        if self.base and not name.startswith(self.base):
            return "the head of another task"
        return ""


_ENCODER = {
    "embeddings.norm": "{base}embeddings.LayerNorm",
    "layers.{i}.attention.query": "{base}encoder.layer.{i}.attention.self.query",
    "layers.{i}.attention.key": "{base}encoder.layer.{i}.attention.self.key",
    "layers.{i}.attention.value": "{base}encoder.layer.{i}.attention.self.value",
    "layers.{i}.attention.output": "{base}encoder.layer.{i}.attention.output.dense",
    "layers.{i}.attention_norm": "{base}encoder.layer.{i}.attention.output.LayerNorm",
    "layers.{i}.feed_forward.intermediate": "{base}encoder.layer.{i}.intermediate.dense",
    "layers.{i}.feed_forward.output": "{base}encoder.layer.{i}.output.dense",
    "layers.{i}.feed_forward_norm": "{base}encoder.layer.{i}.output.LayerNorm",
}
_UNUSED = {
    r"(^|\.)embeddings\.(position_ids|token_type_ids)$": "a constant",
    r"(^|\.)pooler\.": "the pooled output of the first token, which a masked model does not use",
    r"^cls\.seq_relationship\.": "the head that guesses the next sentence",
}

BERT = Names(
    base="bert.",
    modules={
        **_ENCODER,
        "head.dense": "cls.predictions.transform.dense",
        "head.norm": "cls.predictions.transform.LayerNorm",
    },
    tensors={WORDS: "{base}embeddings.word_embeddings.weight"},
    positions="{base}embeddings.position_embeddings.weight",
    types="{base}embeddings.token_type_embeddings.weight",
    decoder="cls.predictions.decoder.weight",
    biases=("cls.predictions.decoder.bias", "cls.predictions.bias"),
    unused=_UNUSED,
    first_position=0,
)

ROBERTA = replace(
    BERT,
    base="roberta.",
    modules={**_ENCODER, "head.dense": "lm_head.dense", "head.norm": "lm_head.layer_norm"},
    decoder="lm_head.decoder.weight",
    biases=("lm_head.decoder.bias", "lm_head.bias"),
    first_position=2,
)

NYSTROMFORMER = replace(
    BERT,
    base="nystromformer.",
    tensors={**BERT.tensors, CONVOLUTION: "{base}encoder.layer.{i}.attention.self.conv.weight"},
    first_position=2,
)


def mlpen(block: str, feed_forward: tuple[str, str], convolution: bool) -> Names:
    """The names in the authors' code, of which there are two arrangements.

    ``block``: a layer, with ``{i}``. ``feed_forward``: its two layers.
    """
    layer = "{base}" + block
    return Names(
        base="model.",
        modules={
            "embeddings.norm": "{base}embeddings.norm",
            "layers.{i}.attention.query": layer + ".mha.W_q",
            "layers.{i}.attention.key": layer + ".mha.W_k",
            "layers.{i}.attention.value": layer + ".mha.W_v",
            "layers.{i}.attention.output": layer + ".mha.ff",
            "layers.{i}.attention_norm": layer + ".norm1",
            "layers.{i}.feed_forward.intermediate": f"{layer}.{feed_forward[0]}",
            "layers.{i}.feed_forward.output": f"{layer}.{feed_forward[1]}",
            "layers.{i}.feed_forward_norm": layer + ".norm2",
            "head.dense": "mlm.dense",
            "head.norm": "mlm.norm",
        },
        tensors={
            WORDS: "{base}embeddings.word_embeddings.weight",
            **({CONVOLUTION: layer + ".mha.attn.conv.weight"} if convolution else {}),
        },
        positions="{base}embeddings.position_embeddings.weight",
        types="{base}embeddings.token_type_embeddings.weight",
        decoder="mlm.mlm_class.weight",
        biases=("mlm.mlm_class.bias",),
        unused=_UNUSED,
    )
