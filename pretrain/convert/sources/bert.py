"""BERT and RoBERTa: weights to start from. Their attention is exact, and they have no convolution."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from data_pipeline.errors import UserError
from pretrain.convert.source import SOURCES, Converted, Source
from pretrain.convert.taking import take_all
from pretrain.convert.tensor_files import read_tensors
from pretrain.convert.tensor_names import BERT, ROBERTA, Names
from pretrain.convert.their_config import CONFIG, TheirConfig, exact_gelu_note, model_type, read_json, their_model

DEFAULTS = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "tie_word_embeddings": True,
}
"""Of ``BertConfig``, for keys that a file leaves out (transformers 5.23)."""
STARTS = (
    "the converted model has exact attention and no convolution, as the source has; a run that starts with it "
    "(init_from) may have attention: nystrom and a model.conv_kernel, whose taps are then newly initialised"
)


@SOURCES.register
class Bert(Source):
    """A folder of ``save_pretrained``, for any task."""

    name = "bert"
    description = "a folder of transformers with model_type bert"
    names: ClassVar[Names] = BERT
    defaults: ClassVar[dict[str, object]] = {**DEFAULTS, "pad_token_id": 0}

    def matches(self, path: Path) -> bool:
        """By ``model_type``."""
        return path.is_dir() and model_type(path) == self.name

    def first_position(self, theirs: TheirConfig) -> int:
        """Row of position 0."""
        return 0

    def activation(self, theirs: TheirConfig) -> list[str]:
        """A note where the activation is another form of GELU; refuses others."""
        return theirs.activation()

    def read(self, path: Path) -> Converted:
        """See :meth:`Source.read`."""
        theirs = TheirConfig(path / CONFIG, read_json(path / CONFIG), self.defaults)
        for key in ("add_cross_attention", "is_decoder"):
            theirs.refuse(key, False, why="an encoder alone can be converted")
        theirs.refuse("position_embedding_type", "absolute", None, why="learned absolute positions alone are read")
        notes = self.activation(theirs)
        first = self.first_position(theirs)
        positions = theirs.whole("max_position_embeddings") - first
        if positions < 2:
            raise UserError(f"{theirs.file}: max_position_embeddings leaves no positions behind row {first}")
        config = their_model(
            theirs.file,
            objective="mlm",
            attention="softmax",
            vocab_size=theirs.whole("vocab_size"),
            hidden_size=theirs.whole("hidden_size"),
            num_layers=theirs.whole("num_hidden_layers"),
            num_heads=theirs.whole("num_attention_heads"),
            intermediate_size=theirs.whole("intermediate_size"),
            dropout=theirs.number("hidden_dropout_prob"),
            norm="post",
            norm_eps=theirs.number("layer_norm_eps", above=0),
            tie_embeddings=theirs.truth("tie_word_embeddings"),
            init_std=theirs.number("initializer_range", above=0),
            positions="learned",
            max_positions=positions,
            conv_kernel=0,
            landmark_inverse=True,
        )
        taking = take_all(read_tensors(path), config, replace(self.names, first_position=first), str(path))
        return taking.converted(config, path, positions, [STARTS, *notes])


@SOURCES.register
class Roberta(Bert):
    """Positions begin behind the row of the padding token, as in fairseq."""

    name = "roberta"
    description = "a folder of transformers with model_type roberta"
    names: ClassVar[Names] = ROBERTA
    defaults: ClassVar[dict[str, object]] = {**DEFAULTS, "vocab_size": 50265, "pad_token_id": 1}

    def first_position(self, theirs: TheirConfig) -> int:
        """Behind the padding token's row."""
        return theirs.whole("pad_token_id", least=0) + 1

    def activation(self, theirs: TheirConfig) -> list[str]:
        """Its head has the exact GELU whatever the configuration says."""
        return theirs.activation() or [exact_gelu_note("the head's activation")]
