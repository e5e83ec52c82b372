"""Checkpoints of the authors' code (github.com/mlpen/Nystromformer), in both its arrangements.

Their training writes ``cp-EPOCH.model``, ``{"model_state_dict": ...}``, and ``cp-EPOCH.cp`` with the optimizer's state
too. The configuration is ``config.json``, beside the file or in the folder above; the vocabulary is RoBERTa's and lies
elsewhere. What the arrangements differ in:

- ``code/``: layers are ``model.transformer_0``, GELU is the tanh form.
- ``reorganized_code/``: layers are ``model.backbone.backbone.encoders.0``, GELU is the exact one, and positions may
  begin at row 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.errors import UserError
from pretrain.convert.source import SOURCES, Converted, Source
from pretrain.convert.stock import ORIGINAL_NOTE
from pretrain.convert.taking import take_all
from pretrain.convert.tensor_files import load_pickle, only_tensors
from pretrain.convert.tensor_names import WORDS, Names, mlpen
from pretrain.convert.their_config import CONFIG, TheirConfig, read_json, their_model

if TYPE_CHECKING:
    import torch

ENDINGS = (".model", ".cp")
STATE = "model_state_dict"
OLD, NEW = "model.transformer_", "model.backbone.backbone.encoder"


@SOURCES.register
class Mlpen(Source):
    """A file of theirs."""

    name = "mlpen"
    description = "a .model or .cp file of mlpen/Nystromformer, with its config.json beside it or in the folder above"

    def matches(self, path: Path) -> bool:
        """By the file's ending; a folder with their configuration is told apart to name the files in it."""
        return path.suffix in ENDINGS if path.is_file() else _is_theirs(path / CONFIG)

    def read(self, path: Path) -> Converted:
        """See :meth:`Source.read`."""
        if path.is_dir():
            there = sorted(str(file) for ending in ENDINGS for file in path.rglob(f"*{ending}"))
            raise UserError(
                f"{path} is a folder of mlpen/Nystromformer: give one of its checkpoints "
                f"({', '.join(there[-3:]) or 'there is none in it'})"
            )
        file = _config_of(path)
        tensors = _state(path)
        theirs = TheirConfig(file, read_json(file)["model"], {"attn_type": "softmax"})
        if any(name.startswith(NEW) for name in tensors):
            return _convert(path, theirs, tensors, _reorganized(theirs), new=True)
        names = mlpen("transformer_{i}", ("ff1", "ff2"), convolution=True)
        return _convert(path, theirs, tensors, names, new=False)


def _is_theirs(file: Path) -> bool:
    if not file.is_file():
        return False
    block = read_json(file).get("model")
    return isinstance(block, dict) and "num_layers" in block and "num_head" in block


def _config_of(path: Path) -> Path:
    for folder in (path.resolve().parent, path.resolve().parent.parent):
        if _is_theirs(folder / CONFIG):
            return folder / CONFIG
    raise UserError(
        f"{path} has no {CONFIG} of mlpen/Nystromformer beside it or in the folder above: copy the one that it was "
        "trained with there"
    )


def _state(path: Path) -> dict[str, torch.Tensor]:
    try:
        found = load_pickle(path)
    except UserError as error:
        if path.suffix == ".cp":
            raise UserError(f"{error}. The .model file of the same epoch has the weights alone") from None
        raise
    if not isinstance(found, dict) or STATE not in found:
        raise UserError(f"{path} has no {STATE}: it is no checkpoint of mlpen/Nystromformer")
    return only_tensors(found[STATE], path)


def _reorganized(theirs: TheirConfig) -> Names:
    if theirs.values.get("shared_weight"):
        raise UserError(f"{theirs.file}: shared_weight is true, and layers have weights of their own here")
    block = "backbone.backbone.encoders.{i}"
    return mlpen(block, ("ff.0", "ff.2"), convolution=True)


def _convert(
    path: Path, theirs: TheirConfig, tensors: Mapping[str, torch.Tensor], names: Names, *, new: bool
) -> Converted:
    width = theirs.whole("dim" if new else "transformer_dim")
    heads = theirs.whole("num_head")
    for key, wanted in (("embedding_dim", width), ("head_dim", width // heads)):
        theirs.refuse(key, wanted, why=f"this model has it follow from the width, {wanted}")
    length = theirs.whole("max_seq_len", least=2)
    words, table = (tensors.get(names.of(name)) for name in (names.tensors[WORDS], names.positions))
    if words is None or table is None:
        raise UserError(f"{path} has no {names.of(names.positions)}: it is no checkpoint of mlpen/Nystromformer")
    if table.shape[0] == length:
        names = replace(names, first_position=0)
    has_convolution = any(name.endswith(".attn.conv.weight") for name in tensors)
    form, notes = _attention(theirs, length)
    if new:
        notes += TheirConfig(theirs.file, {"hidden_act": "gelu"}, {}).activation()
    config = their_model(
        theirs.file,
        objective="mlm",
        vocab_size=words.shape[0],  # their program takes it from the tokenizer, whatever the file says
        hidden_size=width,
        num_layers=theirs.whole("num_layers"),
        num_heads=heads,
        intermediate_size=theirs.whole("hidden_dim" if new else "transformer_hidden_dim"),
        dropout=theirs.number("dropout_prob"),
        norm="post",
        positions="learned",
        max_positions=length,
        conv_kernel=theirs.whole("conv_kernel_size") if has_convolution else 0,
        landmark_inverse=True,
        **form,
    )
    taking = take_all(tensors, config, names, str(path))
    return taking.converted(config, None, length, notes)


def _attention(theirs: TheirConfig, length: int) -> tuple[dict[str, Any], list[str]]:
    """Keys of our model for theirs about attention, and notes."""
    kind = theirs.values["attn_type"]
    if kind == "softmax":
        return {"attention": "softmax"}, []
    if kind != "nystrom":
        raise UserError(f"{theirs.file}: attn_type is {kind!r}: checkpoints of nystrom and softmax can be converted")
    landmarks, segment = (
        theirs.whole("num_landmarks"),
        theirs.whole("seq_len") if "seq_len" in theirs.values else length,
    )
    notes = []
    if landmarks > segment and landmarks == length:
        # nystrom-512/config.json, as it is published.
        notes.append(f"num_landmarks {landmarks} and seq_len {segment} are exchanged in {theirs.file}, read as meant")
        landmarks, segment = segment, landmarks
    if landmarks == segment:
        return {"attention": "softmax"}, [*notes, "attention is exact there (num_landmarks equals seq_len)"]
    if segment % landmarks:
        raise UserError(f"{theirs.file}: seq_len {segment} is no multiple of num_landmarks {landmarks}")
    # Their program looks for one key and reads the value of another.
    original = "inv_coeff_init_option" not in theirs.values or theirs.values.get("inv_init_coeff_option") == "original"
    form = {"attention": "nystrom", "num_landmarks": landmarks, "inverse_init": "original" if original else "block"}
    return form, [*notes, ORIGINAL_NOTE] if original else notes
