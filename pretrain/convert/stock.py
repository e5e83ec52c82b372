"""Our masked model and transformers' own Nyströmformer: the same names, configuration and function, both ways.

``NystromformerForMaskedLM`` is the published block. Where our model computes the same, a folder for it needs no custom
code. What transformers does not have, and what it does otherwise (modeling_nystromformer.py, read at 5.23):

- With ``num_landmarks == segment_means_seq_len`` it computes exact attention, of any length and with padding. That is
  our ``attention: softmax``, and our ``attention: nystrom`` up to the length where landmarks begin.
- Otherwise a text must have exactly ``segment_means_seq_len`` tokens. One text of another length is an error. Two of
  half that length are taken for one: their landmarks mix. Any padding is an error, and so is bfloat16.
- The inverse has six steps and starts from the batch's largest column sum, our ``inverse_init: original``. The other
  start, ``inv_coeff_init_option: true``, raises ``TypeError`` there. Our ``block`` is another function. At 512 tokens
  and 64 landmarks logits of fresh models differ by 1e-4 (``init_std`` 0.02, 12 layers of 768) to 0.2 (0.1, 4 layers of
  256), where the same start on both sides leaves 1e-6.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.errors import UserError
from data_pipeline.files import write_atomic
from pretrain.convert.facts import FACTS, facts
from pretrain.convert.folder import DTYPES, SHARD_SIZE, cast, write_json, write_weights
from pretrain.convert.tensor_names import BIAS, DECODER, NYSTROMFORMER, POSITIONS
from pretrain.convert.their_config import CONFIG, their_model
from pretrain.convert.tokenizer import tokenizer_files
from pretrain.model.attention.pattern import written
from pretrain.model.config import ModelConfig

if TYPE_CHECKING:
    import torch

    from pretrain.checkpoint.load import LoadedModel
    from pretrain.convert.taking import Taking

ITERATIONS = 6
"""Steps of the inverse, fixed in transformers."""
TOKEN_TYPES = 2
"""Rows of zeros that stand for token types: tokenizers give the second text of a pair type 1."""
ORIGINAL_NOTE = (
    "inverse_init is original, as there: a text's result depends on the batch, and the gate of `nystrom eval` says so "
    "(--force). `block` in OUT/config.yaml, another function, does not depend on it"
)


def why_not_stock(config: ModelConfig, length: int | None = None) -> list[str]:
    """Why transformers' Nyströmformer cannot compute what this model does; empty if it can.

    ``length``: tokens of every text. At a length that has exact attention here, the settings of landmarks do not count.
    None: judged by the landmarks.
    """
    why = [
        f"model.{key} is {_written(getattr(config, key))}: transformers' Nyströmformer {has}"
        for key, wanted, has in (
            ("objective", "mlm", "is a masked encoder"),
            ("norm", "post", "has the norm after each sublayer"),
            ("positions", "learned", "has a learned table"),
            ("ffn", "gelu", "has two matrices and GELU"),
            ("norm_kind", "layernorm", "has layer norms"),
            ("qk_norm", False, "has no norm of queries and keys"),
            ("bias", True, "has biases everywhere"),
        )
        if getattr(config, key) != wanted
    ]
    foreign = [name for name in dict.fromkeys(config.attention_by_layer) if name not in ("nystrom", "softmax")]
    if foreign:
        why.append(f"{_layers_with(config, foreign[0])}: transformers' Nyströmformer has landmarks or exact attention")
    if config.conv_kernel == 0:
        why.append("model.conv_kernel is 0: transformers' Nyströmformer cannot leave the convolution out")
    if config.objective == "mlm" and not is_exact(config, length):
        why += _why_other_landmarks(config, length)
    if length is not None and config.positions == "learned" and length > config.max_positions:
        why.append(f"{length} tokens are more than model.max_positions {config.max_positions}")
    return why


def _written(value: Any) -> str:
    """As in a configuration."""
    return str(value).lower() if isinstance(value, bool) else written(value)


def _layers_with(config: ModelConfig, form: str) -> str:
    """``model.attention is window``; of a pattern, with the numbers of the layers, from 1."""
    if isinstance(config.attention, str):
        return f"model.attention is {form}"
    numbers = [str(number + 1) for number, name in enumerate(config.attention_by_layer) if name == form]
    return f"model.attention is {form} in layer{'s' * (len(numbers) > 1)} {', '.join(numbers)}"


def _why_other_landmarks(config: ModelConfig, length: int | None) -> list[str]:
    why = []
    if not isinstance(config.attention, str) and "softmax" in config.attention:
        why.append(
            f"{_layers_with(config, 'softmax')} and has landmarks in others: transformers' Nyströmformer has one "
            "number of landmarks for all layers"
        )
    if not config.landmark_inverse:
        why.append("model.landmark_inverse is false: transformers' Nyströmformer has the inverse")
    elif config.inverse_iterations != ITERATIONS:
        why.append(
            f"model.inverse_iterations is {config.inverse_iterations}: transformers' Nyströmformer has {ITERATIONS}"
        )
    if config.landmark_inverse and config.inverse_init != "original":
        why.append(
            f"model.inverse_init is {config.inverse_init}: transformers' Nyströmformer has `original`, and the other "
            "start raises TypeError in it"
        )
    if length is not None and length % config.num_landmarks:
        why.append(
            f"{length} tokens are no multiple of model.num_landmarks {config.num_landmarks}, which transformers needs"
        )
    return why


def is_exact(config: ModelConfig, length: int | None) -> bool:
    """Whether texts of ``length`` tokens have exact softmax attention in this masked model."""
    from pretrain.model.attention.registry import forms_of

    for name, form in forms_of(config).items():
        limit = form.exact_up_to
        if name != "softmax" and (name != "nystrom" or limit is None or length is None or length > limit):
            return False
    return True


def stock_config(config: ModelConfig, roles: Mapping[str, int], length: int, dtype: str = "fp32") -> dict[str, Any]:
    """The contents of ``config.json`` for a model that :func:`why_not_stock` has nothing against.

    ``roles``: ids of special tokens by role, as :meth:`Roles.as_dict` gives them.
    """
    exact = is_exact(config, length)
    return {
        "architectures": ["NystromformerForMaskedLM"],
        "model_type": "nystromformer",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.ffn_size,
        "hidden_act": "gelu_new",
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": 0.0,
        "max_position_embeddings": config.max_positions,
        "type_vocab_size": TOKEN_TYPES,
        "segment_means_seq_len": length,
        "num_landmarks": length if exact else config.num_landmarks,
        "conv_kernel_size": config.conv_kernel,
        "inv_coeff_init_option": False,
        "initializer_range": config.init_std,
        "layer_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        **{f"{role}_token_id": roles.get(role) for role in ("pad", "bos", "eos")},
        # Landmarks compute in float32 alone there, whatever the numbers on disk are.
        "dtype": DTYPES[dtype] if exact else "float32",
    }


def model_config(theirs: Mapping[str, Any], file: Path) -> tuple[ModelConfig, list[str]]:
    """Our configuration for the values of their ``config.json`` (``file``), and notes about it.

    The values are complete and of the right types. Raises :class:`UserError` for what neither side can compute.
    """
    landmarks, segment = theirs["num_landmarks"], theirs["segment_means_seq_len"]
    notes = []
    if landmarks == segment:
        form: dict[str, Any] = {"attention": "softmax"}
        notes.append(
            f"attention is exact there (num_landmarks and segment_means_seq_len are both {segment}); a run that starts "
            "with it may have another form"
        )
    elif landmarks > segment or segment % landmarks:
        raise UserError(
            f"{file}: segment_means_seq_len {segment} is no multiple of num_landmarks {landmarks}: "
            "transformers cannot run it either"
        )
    else:
        form = {"attention": "nystrom", "num_landmarks": landmarks, "inverse_init": "original"}
        notes += [
            f"transformers computes landmarks for {segment} tokens alone, here for any {2 * landmarks} tokens or more",
            ORIGINAL_NOTE,
        ]
    config = their_model(
        file,
        objective="mlm",
        vocab_size=theirs["vocab_size"],
        hidden_size=theirs["hidden_size"],
        num_layers=theirs["num_hidden_layers"],
        num_heads=theirs["num_attention_heads"],
        intermediate_size=theirs["intermediate_size"],
        dropout=theirs["hidden_dropout_prob"],
        norm="post",
        norm_eps=theirs["layer_norm_eps"],
        tie_embeddings=theirs["tie_word_embeddings"],
        init_std=theirs["initializer_range"],
        positions="learned",
        max_positions=theirs["max_position_embeddings"],
        conv_kernel=theirs["conv_kernel_size"],
        landmark_inverse=True,
        **form,
    )
    return config, notes


def to_stock(weights: Mapping[str, torch.Tensor], config: ModelConfig) -> dict[str, torch.Tensor]:
    """Their tensors of ours (a tied weight once); the values are the same objects but for positions.

    Positions that no stage has reached repeat the rows before them, as our model computes them.
    """
    import torch

    from pretrain.initialize import resized_positions

    names = NYSTROMFORMER
    out = {theirs: weights[ours] for ours, theirs in names.pairs(config.num_layers)}
    table = weights[POSITIONS]
    out[names.of(names.positions)] = resized_positions(table, config.trained_positions, table.shape[0])
    out[names.of(names.types)] = torch.zeros(TOKEN_TYPES, config.hidden_size, dtype=table.dtype)
    out["cls.predictions.bias"] = weights[BIAS]
    if not config.tie_embeddings:
        out[names.decoder] = weights[DECODER]
        out["cls.predictions.decoder.bias"] = weights[BIAS].clone()
    return out


def from_stock(tensors: Mapping[str, torch.Tensor], config: ModelConfig, where: str) -> Taking:
    """Our tensors of theirs, float32, every one accounted for; see :class:`~pretrain.convert.taking.Taking`."""
    from pretrain.convert.taking import take_all

    return take_all(tensors, config, NYSTROMFORMER, where)


def write_stock(
    loaded: LoadedModel, out: Path, length: int, dtype: str = "fp32", max_shard_size: int | str = SHARD_SIZE
) -> None:
    """Write ``out`` as transformers' ``save_pretrained`` would: weights, tokenizer and, last, ``config.json``.

    ``length``: tokens of the texts it will be used for. ``dtype``: of the numbers on disk, a key of :data:`DTYPES`.
    ``max_shard_size``: bytes, or as "2GB". Raises :class:`UserError` if transformers' Nyströmformer would compute
    something else (:func:`why_not_stock`) or the type cannot hold a weight, and ``OSError`` if it cannot be written.
    """
    from pretrain.checkpoint.commit import make_folder
    from pretrain.checkpoint.load import unique_weights

    config = loaded.model_config
    why = why_not_stock(config, length)
    if why:
        raise UserError(f"{loaded.path} is not transformers' own Nyströmformer: {'; '.join(why)}")
    tensors = cast(to_stock(unique_weights(loaded.model), config), dtype)
    longest = config.max_positions if is_exact(config, length) else length
    files, changes = tokenizer_files(loaded.tokenizer, causal=False, max_length=longest)
    make_folder(out)
    (out / CONFIG).unlink(missing_ok=True)  # what an interruption leaves must not look finished
    write_weights(tensors, out, max_shard_size)
    for name, data in files.items():
        write_atomic(out / name, data)
    write_json(out / FACTS, facts(loaded, changes))
    write_json(out / CONFIG, stock_config(config, loaded.tokenizer.roles.as_dict(), length, dtype))
