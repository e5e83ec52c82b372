"""The ``config.json`` of another library: values by key, with the type that is needed, each fault with file and key."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from data_pipeline.configuration import faults
from data_pipeline.errors import UserError
from pretrain.model.config import ModelConfig

CONFIG = "config.json"
EXACT_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
"""Names that transformers has for the tanh form of GELU, which our model computes."""
NEAR_GELU = ("gelu", "gelu_python")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; raises :class:`UserError`."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{file} must hold a JSON object, and holds {type(found).__name__}")
    return found


def model_type(folder: Path) -> str:
    """``model_type`` of a folder's ``config.json``; empty without one."""
    file = folder / CONFIG
    return str(read_json(file).get("model_type") or "") if file.is_file() else ""


class TheirConfig:
    """The keys of ``file``, or of an object in it, and the values that their library has for keys that are left out."""

    def __init__(self, file: Path, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.file, self.values = file, {**defaults, **values}

    def whole(self, key: str, least: int = 1) -> int:
        """A whole number of at least ``least``."""
        value = self._there(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.wrong(key, f"a whole number of at least {least}")
        return value

    def number(self, key: str, above: float | None = None) -> float:
        """A number from 0 on; with ``above`` more than that."""
        value = self._there(key)
        wrong = isinstance(value, bool) or not isinstance(value, int | float) or value < 0
        if wrong or (above is not None and value <= above):
            raise self.wrong(key, "a positive number" if above is not None else "a number of at least 0")
        return float(value)

    def truth(self, key: str) -> bool:
        """true or false."""
        value = self._there(key)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def refuse(self, key: str, *wanted: Any, why: str) -> None:
        """Refuse values other than ``wanted``; a key that is not there has the first of them."""
        if self.values.get(key, wanted[0]) not in wanted:
            raise UserError(f"{self.file}: {key} is {self.values[key]!r}: {why}")

    def activation(self) -> list[str]:
        """Refuse activations that are no GELU; a note where it is another form of it."""
        name = self._there("hidden_act")
        if name in EXACT_GELU:
            return []
        if name in NEAR_GELU:
            return [exact_gelu_note("the activation")]
        raise UserError(f"{self.file}: hidden_act is {name!r}, and this model has GELU alone")

    def wrong(self, key: str, wanted: str) -> UserError:
        """The error about a value of another type."""
        return UserError(f"{self.file}: {key} is {self.values[key]!r} and must be {wanted}")

    def _there(self, key: str) -> Any:
        if key not in self.values:
            raise UserError(f"{self.file} has no {key}")
        return self.values[key]


def exact_gelu_note(where: str) -> str:
    """A note for a model that has the exact GELU: the two forms differ by 4.7e-4 at most, near 2.2."""
    return (
        f"{where} is the exact GELU there and its tanh form here, which differs by up to 5e-4 in each value: "
        "logits are near those of the source, and not the same"
    )


def their_model(file: Path, **values: Any) -> ModelConfig:
    """A configuration of ours with the values of ``file``; raises :class:`UserError` that names the file."""
    try:
        return ModelConfig(**values)
    except ValidationError as error:
        raise UserError(
            f"{file} gives no model that is possible here: {'; '.join(faults(error, ModelConfig))}"
        ) from None
