"""JSONL: one object with fields on each line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from data_pipeline.sources.format import Format, Found, Source, register
from data_pipeline.sources.reading import Bad, Wanted, excerpt_of, not_utf8


@register
class Jsonl(Format):
    """Lines without anything are no records."""

    name = "jsonl"
    suffixes = (".jsonl", ".ndjson", ".json")
    unit = "line"
    cut = "lines"

    def read(self, source: Source, wanted: Wanted) -> Iterator[Found]:
        """See :class:`Format`."""
        for number, offset, line in source.lines():
            if line and not line.isspace():
                yield Found(_parsed(line), number, offset if source.entered else None, line)


def _parsed(line: bytes) -> Mapping[str, Any] | Bad:
    try:
        # Decoded here because json.loads guesses the encoding of bytes and lets broken UTF-8 through.
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return not_utf8(line, error.reason, error.start)
    except (ValueError, RecursionError) as error:
        what = f"{error.msg} (character {error.pos + 1})" if isinstance(error, json.JSONDecodeError) else str(error)
        return Bad("not JSON", f"not a JSON record: {what}; one JSON object on each line is expected", excerpt_of(line))
    if not isinstance(record, dict):
        detail = f"a record must be a JSON object with fields, one on each line, not {type(record).__name__}"
        return Bad("not an object", detail, excerpt_of(line))
    return record
