"""The values that filters take in a spec: counts, shares, ranges, scripts, or none.

Each kind reads a value from text and writes it back so that equal values give equal text. Reading raises
``ValueError`` with a message that says what is wrong with the text.
"""

from __future__ import annotations

import difflib
import math
from typing import Protocol

from data_pipeline.quality.statistics import SCRIPTS

Value = int | float | tuple[float, float] | tuple[tuple[str, ...], float] | None


class Kind(Protocol):
    """How a filter's value is written."""

    form: str  # what stands after the name in documentation: "=COUNT"

    def read(self, text: str) -> Value: ...

    def write(self, value: Value) -> str: ...


def number(text: str) -> float:
    """A finite number that is not negative."""
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number") from None
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{text!r} is not a finite number of at least 0")
    return value


def plain(value: float) -> str:
    """The shortest text that reads back as ``value``: 0.30 and .3 both give 0.3, 50.0 gives 50."""
    return repr(float(value)).removesuffix(".0")


def share(text: str) -> float:
    """A number in [0, 1]."""
    value = number(text)
    if value > 1:
        raise ValueError(f"{text!r} is no share: it must lie between 0 and 1")
    return value


class Count:
    form = "=COUNT"

    def read(self, text: str) -> Value:
        value = number(text)
        if value != int(value):
            raise ValueError(f"{text!r} is not a whole number")
        return int(value)

    def write(self, value: Value) -> str:
        return str(value)


class Share:
    form = "=SHARE"

    def read(self, text: str) -> Value:
        return share(text)

    def write(self, value: Value) -> str:
        assert isinstance(value, (int, float))
        return plain(value)


class Rate:
    """A number of one thing for each of another: symbols a word."""

    form = "=RATE"

    def read(self, text: str) -> Value:
        return number(text)

    def write(self, value: Value) -> str:
        assert isinstance(value, (int, float))
        return plain(value)


class Range:
    form = "=LOW:HIGH"

    def read(self, text: str) -> Value:
        low, colon, high = text.partition(":")
        if not colon:
            raise ValueError(f"{text!r} is not of the form LOW:HIGH")
        ends = number(low), number(high)
        if ends[0] > ends[1]:
            raise ValueError(f"the low end {low} lies above the high end {high}")
        return ends

    def write(self, value: Value) -> str:
        assert isinstance(value, tuple)
        low, high = value
        assert isinstance(low, (int, float))
        return f"{plain(low)}:{plain(high)}"


class Scripts:
    """Scripts joined by ``+`` and the least share of letters in them."""

    form = "=NAME[+NAME...]:SHARE"

    def read(self, text: str) -> Value:
        names, colon, least = text.partition(":")
        if not colon:
            raise ValueError(f"{text!r} is not of the form SCRIPT:SHARE, for example latin:0.8")
        scripts = tuple(sorted({name.strip().lower() for name in names.split("+")}))
        for name in scripts:
            if name not in SCRIPTS:
                raise ValueError(f"there is no script {name!r}{nearest(name, SCRIPTS)}. Known: {', '.join(SCRIPTS)}")
        return scripts, share(least)

    def write(self, value: Value) -> str:
        assert isinstance(value, tuple)
        scripts, least = value
        assert isinstance(scripts, tuple)
        return f"{'+'.join(scripts)}:{plain(least)}"


class Flag:
    form = ""

    def read(self, text: str) -> Value:
        raise ValueError(f"it takes no value, got {text!r}")

    def write(self, value: Value) -> str:
        return ""


def nearest(name: str, known: tuple[str, ...]) -> str:
    """What to append to a message about the unknown ``name``: " (nearest: ...)", or nothing."""
    found = difflib.get_close_matches(name, known, n=1)
    return f" (nearest: {found[0]})" if found else ""
