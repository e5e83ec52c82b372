"""Typed blocks of configuration, and the mistakes in them as lines that name the key, the value and a near name.

Every file of keys and values is read into pydantic models: a run, an evaluation suite, the options of a benchmark. This
module imports nothing of the project, so that all of them print a mistake in the same words.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Tag, ValidationError

ITEM = "N"
"""Stands for the number of an item of a list in the name of a key: ``curriculum.N.seq_len``."""


class Strict(BaseModel):
    """Base of a block: unknown keys are refused, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


def blocks_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The blocks within a type such as ``tuple[StageConfig, ...] | None``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from blocks_in(part)


def key_names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted names of all keys of a model, each block's own before those of the blocks within it."""
    inner = []
    for name, field in model.model_fields.items():
        dotted = f"{prefix}{name}"
        yield dotted
        nested = next(blocks_in(field.annotation), None)
        if nested is not None:
            inner.append((nested, f"{dotted}." if nested is field.annotation else f"{dotted}.{ITEM}."))
    for nested, dotted in inner:
        yield from key_names(nested, dotted)


def faults(error: ValidationError, model: type[BaseModel] | None, unknown: str = "unknown key '{}'") -> list[str]:
    """A line for each fault that pydantic found: the key, what is wrong with it, and the value that was given.

    ``model`` is the class that was to be made; it tells near names for an unknown key. None: no names are suggested.
    ``unknown`` begins the line about an unknown key, with ``{}`` for its dotted name.
    """
    return [_line(fault, model, unknown) for fault in error.errors()]


def _line(fault: Any, model: type[BaseModel] | None, unknown: str) -> str:
    parts, block = _locate(fault["loc"], model)
    key = ".".join(map(str, parts))
    if fault["type"] == "extra_forbidden":
        begin = unknown.format(key)
        if model is None or block is None:
            return begin
        near = suggestions(str(parts[-1]), list(block.model_fields), list(key_names(model)))
        return f"{begin}: " + (did_you_mean(near) if near else f"known keys: {', '.join(block.model_fields)}")
    if fault["type"] == "missing":
        return f"key '{key}' is missing"
    message = fault["msg"].removeprefix("Value error, ")
    if not key or fault["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}: {message}, got {fault['input']!r}"


def _locate(loc: Sequence[str | int], model: type[BaseModel] | None) -> tuple[list[str | int], type[BaseModel] | None]:
    """The parts of a key without the tags of unions, and the block that its last part stands in."""
    parts: list[str | int] = []
    block, tags = model, set[str]()
    for i, part in enumerate(loc):
        if part in tags:
            tags = set()
            continue
        parts.append(part)
        if isinstance(part, str) and i + 1 < len(loc):
            field = block.model_fields.get(part) if block is not None else None
            block = None if field is None else next(blocks_in(field.annotation), None)
            tags = set() if field is None else set(_tags(field.annotation))
    return parts, block


def _tags(annotation: Any) -> Iterator[str]:
    """Names that pydantic gives the members of a union, and puts among the parts of a key."""
    if get_origin(annotation) is Annotated:
        yield from (meta.tag for meta in annotation.__metadata__ if isinstance(meta, Tag))
    for part in get_args(annotation):
        yield from _tags(part)


def suggestions(name: str, known: Sequence[str], everywhere: Sequence[str]) -> list[str]:
    """Names that an unknown one may stand for.

    First the keys of any block that are called so (``objective`` -> ``model.objective``), then the one of ``known``
    that is most like it, then keys of other blocks that are. ``everywhere`` are the dotted names of all keys.
    """
    by_last: dict[str, list[str]] = {}
    for dotted in everywhere:
        by_last.setdefault(dotted.rpartition(".")[2], []).append(dotted)
    last = name.rpartition(".")[2]
    if last in by_last:
        return by_last[last]
    near = difflib.get_close_matches(name, known, n=1)
    return near or [full for like in difflib.get_close_matches(last, by_last, n=1) for full in by_last[like]]


def did_you_mean(names: Sequence[str]) -> str:
    """The question that ends a message about an unknown name."""
    return f"did you mean {' or '.join(map(repr, names))}?"
