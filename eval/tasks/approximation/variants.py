"""Which forms of attention the weights are run with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval.shared.forms import EXACT, FLAT, LANDMARKS_ALONE, POOLED, WINDOW, settings_read
from eval.tasks.approximation import ApproximationSettings
from pretrain.model.config import ModelConfig

TRAINED = "trained"
SWEPT = {
    "segment_lengths": "segment_length",
    "window_sizes": "window_segments",
    "landmarks": "num_landmarks",
    "inverse_steps": "inverse_iterations",
}
"""By the name of this suite's setting, the key of the model's configuration that it varies, where the form of
some layer reads it."""


@dataclass(frozen=True)
class Variant:
    """One way of running the model. ``key``: part of the names of records' fields; ``changes``: of its configuration,
    in ``layers`` (None: all); ``compared``: whether its output is held against exact attention's, too."""

    key: str
    title: str
    changes: Mapping[str, Any]
    layers: tuple[int, ...] | None = None
    compared: bool = False
    setting: str = ""
    """Of the model's configuration, what a sweep varies."""

    @property
    def value(self) -> int:
        """Of ``setting``."""
        return self.changes[self.setting]


def whole(config: ModelConfig) -> list[Variant]:
    """As trained, exact attention and the ablations, in all layers."""
    causal = config.objective == "clm"
    tokens = config.segment_length * (config.window_segments if causal else 2 * config.window_segments - 1)
    found = [Variant(TRAINED, "as trained", {}, compared=True), Variant("exact", "exact softmax", EXACT)]
    if config.landmark_inverse and "landmark_inverse" in settings_read(config):
        found.append(Variant("pooled", "landmarks without the inverse", POOLED, compared=True))
    if config.landmark_levels > 1 and "landmark_levels" in settings_read(config):
        found.append(Variant("flat", "one landmark for each segment", FLAT, compared=True))
    if config.recall_segments and "recall_segments" in settings_read(config):
        found.append(Variant("landmarks", "landmarks alone", LANDMARKS_ALONE, compared=True))
    # A masked Nystrom model has no window of its own: the loss alone shows how near the text is that it needs.
    found.append(Variant("window", f"window of {tokens} tokens alone", WINDOW, compared=causal))
    return found


def by_layer(config: ModelConfig) -> list[Variant]:
    """Exact attention in one layer at a time."""
    return [
        Variant(f"exact_layer_{layer + 1}", f"exact softmax in layer {layer + 1}", EXACT, (layer,))
        for layer in range(config.num_layers)
    ]


def sweeps(config: ModelConfig, settings: ApproximationSettings) -> list[Variant]:
    """Other landmarks than the model was trained with."""
    values = swept(config, settings)
    return [
        Variant(f"{name}_{value}", f"{name} {value}", {name: value}, compared=True, setting=name)
        for name, tried in values.items()
        for value in tried
        if value != getattr(config, name)
    ]


def swept(config: ModelConfig, settings: ApproximationSettings) -> dict[str, Sequence[int]]:
    """By the name of the model's setting, the values to try, the model's own among them."""
    read = settings_read(config)
    wanted = {key: getattr(settings, name) for name, key in SWEPT.items() if key in read}
    return {key: sorted({*tried, getattr(config, key)}) for key, tried in wanted.items() if tried}


def defaults(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """What is tried where the settings leave it out."""

    def around(value: int, least: int) -> tuple[int, ...]:
        return tuple(x for x in (value // 4, value // 2, value, 2 * value, 4 * value) if x >= least)

    w = config.window_segments
    found = {
        "segment_lengths": around(config.segment_length, 2),
        "window_sizes": tuple(sorted({1, w, w + 1, 2 * w})),
        "landmarks": around(config.num_landmarks, 1),
    }
    return {name: values for name, values in found.items() if SWEPT[name] in settings_read(config)}
