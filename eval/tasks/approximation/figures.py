"""From what was measured on each window to records, means by layer and head, and metrics with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.results.schema import Estimator, Metric
from eval.results.statistics import bootstrap
from eval.tasks.approximation import ApproximationSettings
from eval.tasks.approximation.observe import MEAN_OF_V
from eval.tasks.approximation.variants import TRAINED, Variant
from pretrain.model.config import ModelConfig

Floats = NDArray[np.float64]

_OF_EXACT = {
    "matrix_error": "matrix",
    "matrix_error_uniform": "matrix_uniform",
    "attention_entropy": "entropy",
    "attention_entropy_share": "entropy_share",
    "mass_in_window": "near",
}


@dataclass(frozen=True)
class Figures:
    """What tables and curves are made of. ``windows``: those of ``task.measure``, with an ``id`` and a ``start``."""

    config: ModelConfig
    settings: ApproximationSettings
    variants: Sequence[Variant]
    windows: Sequence[dict[str, Any]]

    @property
    def causal(self) -> bool:
        """Whether the loss is that of the next token."""
        return self.config.objective == "clm"

    @property
    def loss(self) -> str:
        """Name of the metric, as in ``lm``."""
        return "loss" if self.causal else "masked_loss"

    @cached_property
    def shown(self) -> list[Variant]:
        """Those of all layers, without the sweeps."""
        return [variant for variant in self.variants if variant.layers is None and not variant.setting]

    @cached_property
    def errors(self) -> dict[str, Floats]:
        """(L, H) by the key of the variant, and of the mean of V: the mean over windows."""
        return {
            key: self._mean([window["errors"][key] for window in self.windows]) for key in self.windows[0]["errors"]
        }

    def mean(self, name: str) -> Floats | None:
        """(L, H) of what is known of exact attention; None where it was not measured."""
        return None if self.windows[0][name] is None else self._mean([window[name] for window in self.windows])

    def _mean(self, values: Sequence[Any]) -> Floats:
        return np.asarray(np.apply_along_axis(math.fsum, 0, np.array(values, dtype=np.float64)) / len(values))

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        """Of each window: means over layers and heads, sums over targets."""
        return [self._record(window) for window in self.windows]

    def _record(self, window: dict[str, Any]) -> dict[str, Any]:
        record: dict[str, Any] = {key: window[key] for key in ("id", "start", "targets")}
        record |= {f"error_{_slug(key)}": float(np.mean(value)) for key, value in window["errors"].items()}
        record |= {key: float(np.mean(window[key])) for key in _OF_EXACT.values() if window[key] is not None}
        for key, nats in window["nats"].items():
            record[f"nats_{key}"] = nats
            if key != TRAINED:
                record[f"nats_change_{key}"] = nats - window["nats"][TRAINED]
        if not self.causal:
            record |= {f"hits_{key}": value for key, value in window["hits"].items()}
        return record

    @cached_property
    def estimators(self) -> dict[str, Estimator]:
        """Metrics by name, as they follow from the records."""
        loss, others = self.loss, [variant for variant in self.shown if variant.key != TRAINED]
        found = {"relative_error": Estimator(f"error_{TRAINED}")}
        found |= {f"relative_error_{v.key}": Estimator(f"error_{v.key}") for v in others if v.compared}
        found["relative_error_mean_of_v"] = Estimator(f"error_{_slug(MEAN_OF_V)}")
        found |= {name: Estimator(key) for name, key in _OF_EXACT.items() if key in self.records[0]}
        found[loss] = Estimator(f"nats_{TRAINED}", "targets")
        found |= {f"{loss}_{v.key}": Estimator(f"nats_{v.key}", "targets") for v in others}
        found |= {f"{loss}_change_{v.key}": self._change(v) for v in others}
        if not self.causal:
            found["masked_accuracy"] = Estimator(f"hits_{TRAINED}", "targets")
            found |= {f"masked_accuracy_{v.key}": Estimator(f"hits_{v.key}", "targets") for v in others}
        return found

    @staticmethod
    def _change(variant: Variant) -> Estimator:
        return Estimator(f"nats_change_{variant.key}", "targets")

    @cached_property
    def metrics(self) -> dict[str, Metric]:
        """With intervals over the windows."""
        better = {"relative_error": False, "matrix_error": False, self.loss: False, "masked_accuracy": True}
        found = {name: self._metric(estimator, better.get(name)) for name, estimator in self.estimators.items()}
        errors, mean = self.errors[TRAINED], self.errors[MEAN_OF_V]
        found["heads_worse_than_mean_of_v"] = Metric(float((errors >= mean).mean()), False, n=mean.size, unit="heads")
        return found

    @cached_property
    def changes(self) -> dict[str, Metric]:
        """By the key of the variant: the change of the loss on the same windows, nats per target."""
        return {v.key: self._metric(self._change(v), None) for v in self.variants if v.key != TRAINED}

    def nats(self, key: str) -> float:
        """The loss of a variant, nats per target."""
        base = self.metrics[self.loss].value
        return base if key == TRAINED else base + self.changes[key].value

    def error(self, key: str) -> float:
        """The relative error of a variant: mean over layers, heads and windows."""
        return float(self.errors[key].mean())

    def _metric(self, estimator: Estimator, better: bool | None) -> Metric:
        found = bootstrap(self.records, estimator)
        if found.n < 2:
            return Metric(found.value, better, n=found.n, unit="windows")
        return Metric(found.value, better, n=found.n, low=found.low, high=found.high, unit="windows")


def _slug(name: str) -> str:
    return name.lower().replace(" ", "_")
