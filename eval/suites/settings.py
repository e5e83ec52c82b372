"""What the settings of every task have in common."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


def quotes_field() -> Any:
    """The field ``quotes`` of tasks that read files. It is in no key: what was read is in the hash of the data."""
    return Field(
        "auto",
        exclude=True,
        description="double quotes in CSV and TSV: csv, they enclose fields; none, they are text; auto: csv for CSV, "
        "none for TSV",
    )


class Settings(BaseModel):
    """Base of a task's settings: typed, ranges checked, unknown keys refused, values frozen.

    One class serves a suite's YAML, the command line's options (each field is one, with its description as help) and
    Python. Fields are plain: numbers, text, truth values, choices (``Literal``), tuples of numbers or text, or None.
    A field of several tasks means the same in all of them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for the key and the result."""
        return self.model_dump(mode="json")
