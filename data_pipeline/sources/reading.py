"""How a record becomes a text: the field or template, the unit of plain text, quoting, the normalisation."""

from __future__ import annotations

import functools
import json
import re
import string
import unicodedata
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, get_args

from data_pipeline.errors import UserError

TextUnit = Literal["file", "line"]
Normalization = Literal["nfc", "nfd", "nfkc", "nfkd"]
Quotes = Literal["auto", "csv", "none"]
MISSING = object()  # in place of the value of a field that is not there
_FORMS: dict[Normalization, Literal["NFC", "NFD", "NFKC", "NFKD"]] = {
    "nfc": "NFC",
    "nfd": "NFD",
    "nfkc": "NFKC",
    "nfkd": "NFKD",
}
EXCERPT = 200  # characters of a broken record that are kept


def printable(text: str) -> str:
    """The beginning of a text, at most 200 characters, of which half surrogate pairs are replaced."""
    return text[:EXCERPT].encode(errors="replace").decode()


def excerpt_of(line: bytes) -> str:
    """The beginning of a line, at most 200 characters."""
    return line[: 4 * EXCERPT].decode(errors="replace")[:EXCERPT]


class Bad(NamedTuple):
    """What is wrong with a record: a reason to count by, a detail for its message, and how it begins."""

    reason: str
    detail: str
    excerpt: str


def not_utf8(line: bytes, reason: str, start: int) -> Bad:
    """The fault of a line whose byte ``start``, from 0, is not UTF-8."""
    return Bad("not UTF-8", f"not UTF-8 ({reason}, byte {start + 1} of the line)", excerpt_of(line))


@dataclass(frozen=True)
class Wanted:
    """What a format is asked for. ``fields``: those that are read, none for all; a dotted path is a field inside
    fields. ``options``: for each field the option that chooses it, for messages. ``types``: what a column with a type
    may hold: text, in templates also numbers and truth values (``values``), or anything. ``quotes``: see
    :class:`Reading`."""

    fields: tuple[str, ...]
    options: tuple[str, ...] = ()
    types: Literal["text", "values", "any"] = "any"
    quotes: Quotes = "auto"

    def choose(self, field: str) -> str:
        """How to choose another field than this one, for the end of a message; nothing where there is no option."""
        option = dict(zip(self.fields, self.options, strict=False)).get(field)
        return f" (choose with {option})" if option else ""


@dataclass(frozen=True)
class Reading:
    """How texts are taken out of records.

    ``text_field`` names the field of JSONL records and the column of CSV, Parquet and hub datasets; ``meta.text`` is
    the field ``text`` of the object ``meta`` where there is no field of the literal name. ``template`` joins fields
    instead: ``'{title}\\n\\n{body}'``, with ``{{`` and ``}}`` for braces and backslash-n, backslash-t and a doubled
    backslash as in a string literal, as a shell hands them over. In templates null gives nothing, and numbers and
    truth values are written as in JSON. ``text_unit`` says whether a plain text file or each of its lines is a
    document. ``quotes`` says whether double quotes enclose a field of CSV and TSV (``csv``, as in RFC 4180) or are
    text as all else is (``none``); ``auto`` is csv for CSV and none for TSV. ``normalize`` is a Unicode normal form
    (Unicode Standard Annex 15); None leaves the text as it is. ``source_field`` names the field that says where a
    record is from, in place of the name of its file.

    Raises :class:`UserError` for a template that cannot be parsed or names no field, and for unknown values.
    """

    text_field: str = "text"
    template: str | None = None
    text_unit: TextUnit = "file"
    normalize: Normalization | None = None
    quotes: Quotes = "auto"
    source_field: str | None = None

    def __post_init__(self) -> None:
        if self.text_unit not in get_args(TextUnit):
            raise UserError(f"text unit '{self.text_unit}' is unknown; known are: {', '.join(get_args(TextUnit))}")
        if self.quotes not in get_args(Quotes):
            raise UserError(f"quotes '{self.quotes}' are unknown; known are: {', '.join(get_args(Quotes))}")
        if self.normalize is not None and self.normalize not in get_args(Normalization):
            known = ", ".join(get_args(Normalization))
            raise UserError(f"normalisation '{self.normalize}' is unknown; known are: {known}")
        if self.template is None and not self.text_field:
            raise UserError("the text field has no name")
        _ = self.fields

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that are read, each once, in the order of their first use."""
        texts = [self.text_field]
        if self.template is not None:
            texts = [field for _, field in parse_template(self.template) if field is not None]
        return tuple(dict.fromkeys(texts if self.source_field is None else [*texts, self.source_field]))

    @property
    def wanted(self) -> Wanted:
        """What a format is asked for."""
        types: Literal["text", "values"] = "text" if self.template is None and not self.source_field else "values"
        options = ("--source-field" if field == self.source_field else "--text-field" for field in self.fields)
        return Wanted(self.fields, tuple(options), types, self.quotes)

    def facts(self) -> dict[str, Any]:
        """The settings as JSON values. A setting that came later is left out while it has its default, so that what
        was made before is still recognised."""
        later = {"quotes": "auto", "source_field": None}
        return {name: value for name, value in asdict(self).items() if name not in later or value != later[name]}

    def text_of(self, record: Mapping[str, Any]) -> str | Bad | None:
        """The text of a record, None for null, or what is wrong with it."""
        if self.template is None:
            value = record.get(self.text_field, MISSING)
            if value is MISSING:
                value = find_field(record, self.text_field)
            if value is None or isinstance(value, str):
                return value
            return _wrong(record, self.text_field, value)
        parts: list[str] = []
        for literal, field in parse_template(self.template):
            parts.append(literal)
            if field is not None:
                value = find_field(record, field)
                if isinstance(value, str):
                    parts.append(value)
                elif isinstance(value, (bool, int, float)):
                    parts.append(json.dumps(value))
                elif value is not None:
                    return _wrong(record, field, value)
        return "".join(parts)

    def source_of(self, record: Any) -> str | Bad:
        """Where a record says that it is from, at most 200 characters; "" where it does not, or is not asked."""
        if self.source_field is None or not isinstance(record, Mapping):
            return ""
        value = find_field(record, self.source_field)
        if value is None or isinstance(value, (str, int, float)):  # a truth value is an int
            return "" if value is None else printable(value if isinstance(value, str) else json.dumps(value))
        return _wrong(record, self.source_field, value)

    def normalized(self, text: str) -> str:
        """The text in the normal form asked for."""
        return text if self.normalize is None else unicodedata.normalize(_FORMS[self.normalize], text)


@functools.lru_cache(maxsize=8)
def parse_template(template: str) -> tuple[tuple[str, str | None], ...]:
    """Pairs of literal text and the field after it (None at the end). Raises :class:`UserError` for a bad template."""
    try:
        parts = list(string.Formatter().parse(_unescape(template)))
    except ValueError as error:
        raise UserError(f"template {template!r}: {error} (write {{{{ and }}}} for braces that are text)") from None
    if not any(field for _, field, _, _ in parts):
        raise UserError(f"template {template!r} names no field: write for example '{{title}}\\n\\n{{text}}'")
    for _, field, form, conversion in parts:
        if field == "" or form or conversion:
            raise UserError(f"template {template!r}: between braces stands the name of a field and nothing else")
    return tuple((literal, field) for literal, field, _, _ in parts)


def _unescape(template: str) -> str:
    escapes = {"n": "\n", "t": "\t", "\\": "\\"}
    return re.sub(r"\\([nt\\])", lambda match: escapes[match[1]], template)


def find_field(record: Mapping[str, Any], name: str) -> Any:
    """The value of a field by its literal name, else by a dotted path; :data:`MISSING` where there is none.

    Null anywhere on the path is null.
    """
    if name in record:
        return record[name]
    value: Any = record
    for part in name.split("."):
        if value is None:
            return None
        if not isinstance(value, Mapping) or part not in value:
            return MISSING
        value = value[part]
    return value


def _wrong(record: Mapping[str, Any], name: str, value: Any) -> Bad:
    excerpt = printable(", ".join(f"{key}: {str(content)[:50]}" for key, content in list(record.items())[:20]))
    if value is MISSING:
        fields = printable(", ".join(map(str, list(record)[:20]))) or "none"
        return Bad("no field", f"no field '{name}'; its fields are: {fields}", excerpt)
    return Bad("not text", f"field '{name}' is not text but {type(value).__name__}", excerpt)
