"""The forms that are compared, each a small change of one base configuration.

A form changes one idea and leaves the rest: ``segment-half`` halves c and doubles w, so that the window keeps its w c
tokens. What a token sees of it on average changes. It sees its own segment up to itself and w - 1 whole ones before: (w
- 1/2) c + 1/2 tokens, 96.5 for c = 64 and w = 2 but 112.5 for c = 32 and w = 4. Read those forms beside
``window-double``.

Names joined by ``+`` make both changes: ``softmax+conv-none`` is exact attention without the convolution, which by
default every form has; ``keys-mean+query-mean+inverse`` are landmarks of plain means with the triangular inverse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import ValidationError

from data_pipeline.configuration import faults
from data_pipeline.errors import UserError
from pretrain.model.attention import registry
from pretrain.model.config import ModelConfig
from pretrain.model.flops import all_attention_flops_per_token

Objective = Literal["mlm", "clm"]
Changes = dict[str, Any]

BASELINE = "softmax"
"""What the differences are relative to."""


@dataclass(frozen=True)
class Form:
    """A form's name, and the keys of :class:`ModelConfig` that it changes in a base configuration."""

    name: str
    changes: Callable[[ModelConfig], Changes]


@dataclass(frozen=True)
class Variant:
    """A form applied to a base configuration."""

    name: str
    changes: Changes
    config: ModelConfig
    training: Changes = field(default_factory=dict)
    """What it changes of the recipe."""

    def describe(self) -> str:
        """The changed keys and values, ``-`` for none."""
        return ", ".join(f"{key} {value}" for key, value in (self.changes | self.training).items()) or "-"


def _fixed(**changes: Any) -> Callable[[ModelConfig], Changes]:
    return lambda _: dict(changes)


def _half(config: ModelConfig, key: str) -> int:
    value = int(getattr(config, key))
    if value % 2:
        raise UserError(f"{key} {value} does not halve: choose an even one with --set {key}=N, or other --forms")
    return value // 2


def _segment_half(config: ModelConfig) -> Changes:
    return {"segment_length": _half(config, "segment_length"), "window_segments": 2 * config.window_segments}


def _segment_double(config: ModelConfig) -> Changes:
    return {"segment_length": 2 * config.segment_length, "window_segments": _half(config, "window_segments")}


_BOTH = (
    Form("softmax", _fixed(attention="softmax")),
    Form("window", _fixed(attention="window")),
    Form("nystrom", _fixed()),
    Form("pooled", _fixed(landmark_inverse=False)),
    Form("inverse", _fixed(landmark_inverse=True)),
)
_CONVOLUTION = (
    Form("conv-none", _fixed(conv_kernel=0)),
    Form("conv-5", _fixed(conv_kernel=5)),
    Form("conv-65", _fixed(conv_kernel=65)),
)
FORMS: dict[str, tuple[Form, ...]] = {
    "clm": (
        *_BOTH,
        Form("gamma-0.55", _fixed(landmark_inverse=True, learn_gamma=False, gamma_init=0.55)),
        Form("gamma-0.75", _fixed(landmark_inverse=True, learn_gamma=False, gamma_init=0.75)),
        Form("keys-mean", _fixed(landmark_keys="mean")),
        Form("query-mean", _fixed(learn_landmark_query=False)),
        Form("query-learned", _fixed(learn_landmark_query=True)),
        Form("pyramid", _fixed(landmark_levels=64)),
        Form("band-half", lambda config: {"landmark_band": _half(config, "landmark_band")}),
        Form("band-double", lambda config: {"landmark_band": 2 * config.landmark_band}),
        Form("branching-4", _fixed(landmark_branching=4)),
        Form("recall-2", _fixed(recall_segments=2)),
        Form("recall-4", _fixed(recall_segments=4)),
        Form("segment-half", _segment_half),
        Form("segment-double", _segment_double),
        Form("window-double", lambda config: {"window_segments": 2 * config.window_segments}),
        *_CONVOLUTION,
    ),
    "mlm": (
        *_BOTH,
        Form("landmarks-half", lambda config: {"num_landmarks": _half(config, "num_landmarks")}),
        Form("landmarks-double", lambda config: {"num_landmarks": 2 * config.num_landmarks}),
        *_CONVOLUTION,
    ),
}


def configure(values: Mapping[str, Any], where: str) -> ModelConfig:
    """A :class:`ModelConfig`; raises :class:`UserError` that names every wrong key."""
    try:
        return ModelConfig.model_validate(dict(values))
    except ValidationError as error:
        raise UserError(f"{where}: " + "; ".join(faults(error, ModelConfig))) from None


def select(names: Sequence[str] | None, base: ModelConfig) -> list[Variant]:
    """The named forms of ``base.objective`` in that order, those of the model's registry among them; None: all of
    them, but none twice (``pooled`` is no change where the base has pooled values).

    Raises :class:`UserError` for an unknown name or a change that the base does not allow.
    """
    known = {form.name: form for form in FORMS[base.objective]}
    for name in registry.FORMS.names():
        known.setdefault(name, Form(name, _fixed(attention=name)))
    variants: list[Variant] = []
    for name in known if names is None else dict.fromkeys(names):
        changes: Changes = {}
        for part in name.split("+"):
            if "/" in part:  # a pattern by layer
                changes |= {"attention": part.split("/")}
                continue
            if part not in known:
                raise UserError(
                    f"no form '{part}' for objective {base.objective}; there are {', '.join(known)}, and several "
                    "joined by '+'"
                )
            changes |= known[part].changes(base)
        variant = Variant(name, changes, configure(base.model_dump() | changes, f"form {name}"))
        if names is not None or all(variant.config != other.config for other in variants):
            variants.append(variant)
    if not variants:
        raise UserError("--forms names no form")
    return variants


def entries_read(config: ModelConfig, seq_len: int) -> float:
    """Entries that a token reads in a layer, mean over tokens and layers: the attention's arithmetic in units of a
    product with one key and one value (4 h operations). What landmarks cost to make is in it, as 1.5 entries a layer.
    Exact attention: (n + 1) / 2.
    """
    flops = all_attention_flops_per_token(config, seq_len)
    return flops / (4 * config.hidden_size * config.num_layers)


def window_tokens(config: ModelConfig) -> int:
    """w c, the unit in which distances are given."""
    return config.window_segments * config.segment_length
