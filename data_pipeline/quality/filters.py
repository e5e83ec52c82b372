"""Which documents are kept: simple published heuristics, each with a name, a threshold and a switch.

A spec is ``NAME`` (the published threshold), ``NAME=VALUE``, ``NAME=off``, or a bundle: ``gopher-quality``,
``gopher-repetition``, ``c4``, ``fineweb``. Several may stand in one string, separated by commas. A later spec of the
same filter replaces an earlier one, so changes stand after the bundle: ``gopher-quality,min-words=20``. Names, sources
and definitions are in :mod:`data_pipeline.quality.rules`.

All filters judge whole documents and change no text. Most were made for English web pages: on code or on other
languages look at what they drop before using them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from data_pipeline.errors import UserError
from data_pipeline.quality.rules import BUNDLES, RULES, Rule
from data_pipeline.quality.statistics import Statistics
from data_pipeline.quality.values import Flag, Value, nearest

_OFF = "off"
_OPPOSITES = (("min-chars", "max-chars"), ("min-words", "max-words"))


class FilterInfo(NamedTuple):
    """A filter or bundle for documentation: how it is written, its default or what it expands to, what it drops."""

    name: str
    default: str
    summary: str
    source: str


@dataclass(frozen=True)
class Filters:
    """Filters with their thresholds, in the order they are asked. Equal settings are equal objects; picklable."""

    items: tuple[tuple[str, Value], ...] = ()

    @classmethod
    def parse(cls, specs: Sequence[str]) -> Filters:
        """Read specs (see the module). :class:`UserError` for unknown names and bad values."""
        values: dict[str, Value] = {}  # a replaced filter keeps its first place
        for part in _parts(specs):
            name, equals, text = (word.strip() for word in part.partition("="))
            rule = _rule(name, part)
            if text.lower() == _OFF:
                if name not in values:
                    raise UserError(
                        f"filter {part!r}: {name} is not switched on before this. Write it after the bundle or filter "
                        "it takes back"
                    )
                del values[name]
            else:
                values[name] = _value(rule, text if equals else None, part)
        for low, high in _OPPOSITES:
            least, most = values.get(low), values.get(high)
            if isinstance(least, int) and isinstance(most, int) and least > most:
                raise UserError(f"filters {low}={least} and {high}={most} leave no document at all")
        return cls(tuple(values.items()))

    @property
    def specs(self) -> tuple[str, ...]:
        """The filters one by one, in canonical writing: :meth:`parse` of it gives equal filters."""
        return tuple(_spec(name, value) for name, value in self.items)

    def __bool__(self) -> bool:
        return bool(self.items)

    def reason(self, text: str) -> str | None:
        """The name of the first filter that drops this document, None if it stays."""
        statistics = Statistics(text)
        for name, value in self.items:
            if RULES[name].drops(statistics, value):
                return name
        return None

    @staticmethod
    def known() -> list[FilterInfo]:
        """All filters, then the bundles."""
        filters = [
            FilterInfo(
                rule.name + rule.kind.form,
                "" if rule.default is None else rule.kind.write(rule.default),
                f"drops documents {rule.summary}",
                rule.source,
            )
            for rule in RULES.values()
        ]
        bundles = [
            FilterInfo(name, ", ".join(members), "stands for these filters", "") for name, members in BUNDLES.items()
        ]
        return filters + bundles


def _parts(specs: Sequence[str]) -> Iterator[str]:
    """Single filters, bundles replaced by their members."""
    if isinstance(specs, str):
        raise TypeError("specs is a sequence of strings, not one string")
    for spec in specs:
        for part in spec.split(","):
            name, equals, value = (word.strip() for word in part.partition("="))
            if name not in BUNDLES:
                yield part.strip()
            elif not equals:
                yield from BUNDLES[name]
            elif value.lower() == _OFF:
                yield from (f"{member.partition('=')[0]}={_OFF}" for member in BUNDLES[name])
            else:
                members = ", ".join(BUNDLES[name])
                raise UserError(f"filter {part.strip()!r}: {name} is a bundle and takes no value. It holds {members}")


def _rule(name: str, part: str) -> Rule:
    if name not in RULES:
        names = (*RULES, *BUNDLES)
        raise UserError(
            f"filter {part!r}: there is no filter {name!r}{nearest(name, names)}. Known: {', '.join(names)}"
        )
    return RULES[name]


def _value(rule: Rule, text: str | None, part: str) -> Value:
    if text is None:
        if rule.default is None and not isinstance(rule.kind, Flag):
            raise UserError(
                f"filter {part!r}: {rule.name} has no published threshold, write {rule.name}{rule.kind.form}"
            )
        return rule.default
    try:
        return rule.kind.read(text)
    except ValueError as error:
        form = f"write {rule.name}{rule.kind.form}" + ("" if rule.default is None else f" or {rule.name} alone")
        raise UserError(f"filter {part!r}: {error}; {form}") from None


def _spec(name: str, value: Value) -> str:
    written = RULES[name].kind.write(value)
    return f"{name}={written}" if written else name
