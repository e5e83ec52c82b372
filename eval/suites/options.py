"""The command line's options for suites, made from the fields of the tasks' settings."""

from __future__ import annotations

import argparse
import types
from collections.abc import Collection
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from data_pipeline.errors import UserError
from eval.task import tasks

PREFIX = "setting:"


def add_options(parser: argparse.ArgumentParser, shown: Collection[str] = ()) -> None:
    """An option for every setting of every task; one that several tasks have is for all of them.

    The help explains those of the tasks ``shown``: more than a hundred would hide what is looked for.
    """
    seen: set[str] = set()
    for task in sorted(tasks().values(), key=lambda task: task.name not in shown):
        # The command has --device itself.
        fields = {name: field for name, field in task.settings.model_fields.items() if name != "device"}
        fresh = {name: field for name, field in fields.items() if name not in seen}
        seen |= set(fresh)
        group = parser.add_argument_group(task.name, task.summary) if task.name in shown and fresh else parser
        for name, field in fresh.items():
            how = _how(name, field)
            if task.name not in shown:
                how["help"] = argparse.SUPPRESS
            group.add_argument("--" + name.replace("_", "-"), dest=PREFIX + name, default=argparse.SUPPRESS, **how)


def overrides_of(args: argparse.Namespace) -> list[tuple[str | None, str, Any]]:
    """(suite or None, key, value) of the options given and of ``--set [SUITE.]KEY=VALUE``."""
    found: list[tuple[str | None, str, Any]] = [
        (None, name.removeprefix(PREFIX), value) for name, value in vars(args).items() if name.startswith(PREFIX)
    ]
    given = getattr(args, "set", None) or ()
    if given:
        from pretrain.config.load import yaml_scalar
    for text in given:
        key, sep, value = text.partition("=")
        suite, dot, name = key.rpartition(".")
        if not sep or not name:
            raise UserError(f"--set {text}: write it as key=value or suite.key=value, for example lm.length=512")
        found.append((suite if dot else None, name, yaml_scalar(value)))
    return found


def _how(name: str, field: FieldInfo) -> dict[str, Any]:
    """What argparse is told about a field. Values are checked by the settings themselves."""
    kind = _without_none(field.annotation)
    default = field.get_default(call_default_factory=True)
    text = field.description or ""
    shown = default is not None and default != () and kind is not bool and "left out" not in text
    how: dict[str, Any] = {"help": (text + (f" (default: {_show(default)})" if shown else "")).replace("%", "%%")}
    if kind is bool:
        return how | {"action": argparse.BooleanOptionalAction}
    if get_origin(kind) is Literal:
        return how | {"choices": get_args(kind)}
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        return how | {
            "action": "extend",
            "nargs": "+",
            "type": item if item in (int, float) else str,
            "metavar": _metavar(item),
        }
    return how | {"type": kind if kind in (int, float) else str, "metavar": _metavar(kind)}


def _without_none(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
        return kinds[0]
    return annotation


def _metavar(kind: Any) -> str:
    return {int: "N", float: "X"}.get(kind, "TEXT")


def _show(value: Any) -> str:
    return (
        " ".join(map(str, value))
        if isinstance(value, tuple)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )
