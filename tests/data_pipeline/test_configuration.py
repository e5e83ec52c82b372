"""Mistakes in a configuration, as lines that name the key, the value and a near name."""

from __future__ import annotations

from typing import Annotated, Any

import pytest
from pydantic import BaseModel, Discriminator, Field, Tag, ValidationError, model_validator

from data_pipeline.configuration import Strict, faults, key_names


class Item(Strict):
    weight: float = Field(gt=0)


class Inner(Strict):
    width: int = 1
    names: dict[str, int] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> Inner:
        if self.width == 13:
            raise ValueError("width 13 is unlucky")
        return self


class Outer(Strict):
    inner: Inner = Inner()
    items: Annotated[
        Annotated[str, Tag("text")] | Annotated[tuple[Item, ...], Tag("list")],
        Discriminator(lambda value: "text" if isinstance(value, str) else "list"),
    ] = ""


def lines(values: dict[str, Any], model: type[BaseModel] | None = Outer, **options: str) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate(values)
    return faults(caught.value, model, **options)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"innr": {}}, "unknown key 'innr': did you mean 'inner'?"),
        ({"inner": {"widht": 1}}, "unknown key 'inner.widht': did you mean 'width'?"),
        ({"width": 1}, "unknown key 'width': did you mean 'inner.width'?"),
        ({"zzz": 1}, "unknown key 'zzz': known keys: inner, items"),
        ({"inner": {"width": "wide"}}, "inner.width: Input should be a valid integer, unable to parse"),
        ({"inner": {"names": {"a": "x"}}}, "inner.names.a: Input should be a valid integer, unable to parse"),
        ({"inner": {"width": 13}}, "inner: width 13 is unlucky"),
        ({"items": [{}]}, "key 'items.0.weight' is missing"),
        ({"items": [{"weight": 0}]}, "items.0.weight: Input should be greater than 0, got 0"),
        ({"items": [{"weight": 1, "wieght": 1}]}, "unknown key 'items.0.wieght': did you mean 'weight'?"),
    ],
)
def test_each_fault_names_its_key(values: dict[str, Any], expected: str) -> None:
    (line,) = lines(values)
    assert line.startswith(expected)


def test_all_faults_are_told() -> None:
    assert len(lines({"inner": {"width": "x"}, "items": [{"weight": -1}], "other": 1})) == 3


def test_words_for_an_unknown_key_and_no_model_to_suggest_from() -> None:
    assert lines({"innr": 1}, unknown="unknown setting '{}' of task lm") == [
        "unknown setting 'innr' of task lm: did you mean 'inner'?"
    ]
    assert lines({"innr": 1}, None) == ["unknown key 'innr'"]


def test_names_of_all_keys() -> None:
    assert list(key_names(Outer)) == ["inner", "items", "inner.width", "inner.names", "items.N.weight"]
