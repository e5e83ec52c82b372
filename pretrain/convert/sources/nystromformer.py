"""Transformers' own Nyströmformer: the same model, to the last digits."""

from __future__ import annotations

from pathlib import Path

from pretrain.convert.source import SOURCES, Converted, Source
from pretrain.convert.stock import from_stock, model_config
from pretrain.convert.tensor_files import read_tensors
from pretrain.convert.their_config import CONFIG, TheirConfig, model_type, read_json

DEFAULTS = {
    "vocab_size": 30000,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu_new",
    "hidden_dropout_prob": 0.1,
    "max_position_embeddings": 510,
    "segment_means_seq_len": 64,
    "num_landmarks": 64,
    "conv_kernel_size": 65,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
"""Of ``NystromformerConfig``, for keys that a file leaves out (5.23)."""
WHOLE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "segment_means_seq_len",
    "num_landmarks",
    "conv_kernel_size",
)


@SOURCES.register
class Nystromformer(Source):
    """A folder of ``save_pretrained``, for any task."""

    name = "nystromformer"
    description = "a folder of transformers with model_type nystromformer"

    def matches(self, path: Path) -> bool:
        """By ``model_type``."""
        return path.is_dir() and model_type(path) == "nystromformer"

    def read(self, path: Path) -> Converted:
        """See :meth:`Source.read`."""
        theirs = TheirConfig(path / CONFIG, read_json(path / CONFIG), DEFAULTS)
        theirs.refuse("add_cross_attention", False, why="an encoder alone can be converted")
        theirs.refuse("inv_coeff_init_option", False, None, why="transformers itself raises TypeError for it")
        values = {
            **{key: theirs.whole(key) for key in WHOLE},
            "hidden_dropout_prob": theirs.number("hidden_dropout_prob"),
            "layer_norm_eps": theirs.number("layer_norm_eps", above=0),
            "initializer_range": theirs.number("initializer_range", above=0),
            "tie_word_embeddings": theirs.truth("tie_word_embeddings"),
        }
        if values["conv_kernel_size"] % 2 == 0:
            raise theirs.wrong("conv_kernel_size", "odd: transformers cannot run another one either")
        notes = theirs.activation()
        config, more = model_config(values, theirs.file)
        taking = from_stock(read_tensors(path), config, str(path))
        return taking.converted(config, path, config.max_positions, [*notes, *more])
