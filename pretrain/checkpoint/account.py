"""Which tensors of one model another one takes: each is taken, newly initialised or left over, or it is an error.

Equal shapes are not enough. Heads cut elsewhere, another place of the norms or another number of layers would fit or
half fit, and compute something else. Those are refused by the name of the key. What may differ are position tables, the
head and the centred convolution where the objective is another one, and what a form of attention learns itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from data_pipeline.errors import UserError
from pretrain.model.attention.pattern import written
from pretrain.model.attention.registry import form_of
from pretrain.model.config import STAGE_FIELDS, ModelConfig

POSITIONS = "embeddings.position_embeddings.weight"
WORDS = "embeddings.word_embeddings.weight"
DECODER = "head.decoder.weight"
SAME = ("num_layers", "num_heads", "norm", "norm_kind", "ffn", "qk_norm", "bias")
"""Keys of the model that must agree although shapes may not show it."""
TOLD_ELSEWHERE = (*STAGE_FIELDS, "max_positions", "vocab_size", "init_std", "residual_init", "intermediate_size")
MOST_LINES = 6
"""Faults that a message lists."""

Shape = tuple[int, ...]
Fate = Literal["taken", "new", "left over"]
_LAYER = re.compile(r"^layers\.(\d+)\.")


@dataclass(frozen=True)
class Entry:
    """What becomes of one tensor."""

    name: str
    fate: Fate
    shape: Shape
    """Of the model's tensor; of the source's if it is left over."""
    why: str = ""


def account(
    source: Mapping[str, Shape], target: Mapping[str, Shape], there: ModelConfig, here: ModelConfig, where: str
) -> tuple[Entry, ...]:
    """What becomes of each tensor when the model ``here`` starts with the weights of ``where``, a model ``there``.

    ``source`` and ``target``: shapes by name, a tied weight once. Raises :class:`UserError` that names tensors and keys
    if they do not fit, or if nothing would be taken.
    """
    entries: list[Entry] = []
    faults: list[tuple[str, Shape, str]] = []
    for name, shape in target.items():
        found = source.get(WORDS if name == DECODER and there.tie_embeddings else name)
        why = _not_taken(name, there, here)
        if found is None or why:
            entries.append(Entry(name, "new", shape, why or "the source has none"))
        elif name == POSITIONS and found[1:] == shape[1:]:
            entries.append(Entry(name, "taken", shape, _table_words(found[0], shape[0])))
        elif found != shape:
            faults.append((name, shape, f"{name} is {found} there and {shape} here: {_keys(name, there, here)}"))
        else:
            entries.append(Entry(name, "taken", shape))
    taken = {entry.name for entry in entries if entry.fate == "taken"}
    for name, shape in source.items():
        if name not in taken and not any(name == fault[0] for fault in faults):
            entries.append(Entry(name, "left over", shape, _not_taken(name, there, here) or _unknown(name, here)))
    _refuse(faults, there, here, where)
    if not taken:
        raise UserError(f"nothing of {where} fits this model, not one tensor: it belongs to another kind of model")
    return tuple(entries)


def _not_taken(name: str, there: ModelConfig, here: ModelConfig) -> str:
    """Why a tensor that both models may have means something else in them; empty if it does not."""
    if there.objective != here.objective:
        if name.startswith("head."):
            return f"the head of objective {there.objective}"
        if name.endswith(".conv_weight"):
            return f"its taps lie elsewhere under objective {there.objective}"
    last, layer = name.rpartition(".")[2], _LAYER.match(name)
    if layer is None:
        return ""
    there, here = (model.of_layer(int(layer[1])) for model in (there, here))
    if last in {*form_of(there).parameters(), *form_of(here).parameters()}:
        if there.objective != here.objective:
            return f"learned by attention {there.attention} under objective {there.objective}"
        if there.attention != here.attention:
            return f"learned by attention {there.attention if last in form_of(there).parameters() else here.attention}"
    return ""


def _unknown(name: str, here: ModelConfig) -> str:
    if name == DECODER and here.tie_embeddings:
        return "the head shares the word table here (model.tie_embeddings)"
    if name == POSITIONS:
        return f"positions are {written(here.positions)} here"
    return "this model has none"


def _table_words(there: int, here: int) -> str:
    return "" if there == here else f"rows {'repeated from' if here > there else 'cut from'} {there}"


def _keys(name: str, there: ModelConfig, here: ModelConfig) -> str:
    """The keys that a tensor's shape follows from, as far as they differ, with both values."""
    keys = ["hidden_size"]
    last, layer = name.rpartition(".")[2], _LAYER.match(name)
    form = None if layer is None else form_of(here.of_layer(int(layer[1])))
    if name == WORDS or name.startswith("head.decoder"):
        keys += ["vocab_size"]
    elif ".feed_forward." in name:
        keys += ["intermediate_size"]
    elif last == "conv_weight":
        keys = ["num_heads", "conv_kernel"]
    elif form is not None and last in form.parameters():
        keys += ["num_heads", *form.settings]
    values = [(f"model.{key}", _value(there, key), _value(here, key)) for key in keys]
    differ = [f"{key} is {old} there and {new} here" for key, old, new in values if old != new]
    return " and ".join(differ) or "the model is another one"


def _value(config: ModelConfig, key: str) -> Any:
    return config.ffn_size if key == "intermediate_size" else getattr(config, key)


def _refuse(faults: list[tuple[str, Shape, str]], there: ModelConfig, here: ModelConfig, where: str) -> None:
    lines = [text for _, _, text in faults]
    for key in SAME:
        old, new = getattr(there, key), getattr(here, key)
        if old != new and not any(f"model.{key} is" in line for line in lines):
            lines.insert(0, f"model.{key} is {old} there and {new} here")
    if not lines:
        return
    more = [f"and {len(lines) - MOST_LINES} more tensors"] if len(lines) > MOST_LINES else []
    raise UserError(
        f"the weights of {where} do not fit this model:\n  "
        + "\n  ".join([*lines[:MOST_LINES], *more])
        + "\nGive these keys the values that they have there, or leave init_from out"
    )


def other_settings(there: ModelConfig, here: ModelConfig) -> list[str]:
    """Keys of the model that may differ and do, each with both values: they change what the weights compute."""
    old, new = there.model_dump(), here.model_dump()
    differ = [key for key in old if _differs(key, old[key], new[key])]
    return [f"model.{key} {_shown(there, key)} there, {_shown(here, key)} here" for key in differ]


def _shown(config: ModelConfig, key: str) -> Any:
    return written(getattr(config, key)) if key in ("attention", "positions") else getattr(config, key)


def _differs(key: str, old: Any, new: Any) -> bool:
    return key not in TOLD_ELSEWHERE and old != new


def in_words(entries: Iterable[Entry]) -> list[str]:
    """Lines about all entries, by fate; tensors that are alike in several layers are one line."""
    groups: dict[tuple[Fate, str, Shape, str], list[int]] = {}
    counts: dict[Fate, int] = {"taken": 0, "new": 0, "left over": 0}
    for entry in entries:
        layer = _LAYER.match(entry.name)
        pattern = _LAYER.sub("layers.*.", entry.name)
        groups.setdefault((entry.fate, pattern, entry.shape, entry.why), []).extend(
            [int(layer[1])] if layer else [],
        )
        counts[entry.fate] += 1
    titles: dict[Fate, str] = {
        "taken": "taken from there",
        "new": "newly initialised",
        "left over": "left over there, not used",
    }
    lines = []
    for fate, title in titles.items():
        lines.append(f"{title}: {counts[fate] or 'none'}")
        for (kind, pattern, shape, why), layers in groups.items():
            if kind == fate:
                name = pattern.replace("*", _ranges(layers), 1)
                lines.append(f"  {name} {shape}" + (f": {why}" if why else ""))
    return lines


def _ranges(numbers: list[int]) -> str:
    """``[0, 1, 2, 5]`` -> ``0-2,5``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
