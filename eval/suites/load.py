"""Suites: a task with its settings under a name, from YAML files of the project and of the user."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_pipeline.configuration import faults
from data_pipeline.errors import UserError
from eval.task import Settings, Task, task_of, tasks

BUILT_IN = Path(__file__).resolve().parents[2] / "configs" / "suites"


class _File(BaseModel):
    """A suite's YAML: either a ``task`` with ``settings``, or a list of other ``suites``."""

    model_config = ConfigDict(extra="forbid")
    description: str = ""
    task: str | None = None
    settings: dict[str, Any] = Field(default_factory=dict)
    suites: list[str] = Field(default_factory=list)


@dataclass(frozen=True)
class Suite:
    """A named task with settings. ``origin``: the file it comes from, or "" for a task with its defaults."""

    name: str
    task: Task
    settings: Settings
    description: str = ""
    origin: str = ""


def load_suites(
    names: Sequence[str],
    suite_path: Sequence[str | Path] = (),
    overrides: Sequence[tuple[str | None, str, Any]] = (),
) -> list[Suite]:
    """The suites of these names, groups opened, each once, in order.

    A name is a YAML file's path, a file NAME.yaml in a folder of ``suite_path`` or among the project's own
    (``configs/suites``), or a task, with its defaults. ``overrides``: (suite or None for all, key, value). Raises
    :class:`UserError` for an unknown name, two suites of one name, a file at fault, a key no suite has, or a value out
    of range.
    """
    files: dict[str, _File] = {}
    origins: dict[str, str] = {}
    order: list[str] = []

    def add(name: str, above: dict[Path, str]) -> None:
        found = find(name, suite_path)
        if found is None:
            if name not in tasks():
                raise UserError(_unknown(name, suite_path))
            file, origin = _File(task=name), ""
        else:
            place = found.resolve()  # one file has many spellings: its name, and paths to it
            if place in above:
                raise UserError(f"suite {name} contains itself: {' -> '.join([*above.values(), name])}")
            file, origin = _read(found), str(found)
            above = {**above, place: name}
            name = found.stem
        for member in file.suites:
            add(member, above)
        if file.task is None:
            return
        if name not in files:
            files[name], origins[name] = file, origin
            order.append(name)
        elif _place(origin) != _place(origins[name]):
            both = " and ".join(where or f"the task {name} with its defaults" for where in (origins[name], origin))
            raise UserError(
                f"two suites are called {name}: {both}. Results are kept under the name: rename a file, or run one "
                "at a time"
            )

    for name in names:
        add(name, {})
    used: set[int] = set()
    suites: list[Suite] = []
    for name in order:
        file = files[name]
        task = task_of(file.task or "")
        values = dict(file.settings)
        fields = task.settings.model_fields
        for place, (target, key, value) in enumerate(overrides):
            if target == name or (target is None and key in fields):
                # One file or glob where there may be several: pydantic takes no plain string for a tuple.
                several = key in fields and isinstance(fields[key].default, tuple)
                values[key] = (value,) if several and isinstance(value, str) else value
                used.add(place)
        suites.append(Suite(name, task, parse(task, values, origins[name] or name), file.description, origins[name]))
    for place, (target, key, _) in enumerate(overrides):
        if place not in used:
            what = f"no suite '{target}' is run" if target else "none of the suites has such a setting"
            known = [field for suite in suites for field in type(suite.settings).model_fields]
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            raise UserError(f"'{key}' has no effect: {what}; the suites are {', '.join(order)}{hint}")
    return suites


def find(name: str, suite_path: Sequence[str | Path]) -> Path | None:
    """The file of a suite, or None: the user's folders first, so that they can have another under a known name."""
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise UserError(f"suite file {name} does not exist")
        return Path(name)
    for folder in [*map(Path, suite_path), BUILT_IN]:
        if not folder.is_dir():
            raise UserError(f"--suite-path {folder} is not a folder")
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    return None


def available(suite_path: Sequence[str | Path] = ()) -> list[Path]:
    """Files of all suites that can be named, the user's own first."""
    found: dict[str, Path] = {}
    for folder in [*map(Path, suite_path), BUILT_IN]:
        if not folder.is_dir():
            raise UserError(f"--suite-path {folder} is not a folder")
        for path in sorted(folder.glob("*.yaml")):
            found.setdefault(path.stem, path)
    return list(found.values())


def parse(task: Task, values: dict[str, Any], where: str) -> Settings:
    """Settings of a task from plain values; raises :class:`UserError` that lists every fault with its key."""
    cls = task.settings
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        lines = faults(error, cls, f"unknown setting '{{}}' of task {task.name}")
        raise UserError(f"{where}: " + "; ".join(lines)) from None


def _read(path: Path) -> _File:
    import yaml

    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        file = _File.model_validate(raw)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"suite {path} cannot be read: {error}") from None
    except ValidationError as error:
        raise UserError(f"suite {path}: {'; '.join(faults(error, _File))}") from None
    if (file.task is None) == (not file.suites):
        raise UserError(f"suite {path} must have either a task (with settings) or a list of suites")
    if file.suites and file.settings:
        raise UserError(
            f"suite {path}: a list of suites takes no settings ({', '.join(file.settings)}): write them into the "
            "suites' own files, or give them on the command line"
        )
    if file.task is not None and file.task not in tasks():
        close = difflib.get_close_matches(file.task, tasks(), n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"there are {', '.join(tasks())}"
        raise UserError(f"suite {path}: no task '{file.task}'; {hint}")
    return file


def _place(origin: str) -> Path | None:
    return Path(origin).resolve() if origin else None


def _unknown(name: str, suite_path: Sequence[str | Path]) -> str:
    known = [*tasks(), *(path.stem for path in available(suite_path))]
    close = difflib.get_close_matches(name, [*known, "list", "compare"], n=1)
    hint = f"did you mean '{close[0]}'?" if close else f"there are {', '.join(dict.fromkeys(known))}"
    return f"no suite '{name}': {hint} (`nystrom eval list` describes them)"
