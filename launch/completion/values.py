"""What Tab offers for the values of options: names of presets, keys, suites, filters, runs and folders.

Each completer is a function that argcomplete calls with the ``prefix`` typed so far. What it needs is imported when
it is called, and torch never is.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

Completer = Callable[..., Iterable[str]]
YAML = (".yaml", ".yml")
RUN_SIGNS = ("config.yaml", "checkpoints")
"""Files and folders of a run, any of which makes a folder one."""
CHECKPOINT_SIGNS = ("manifest.json", "model.safetensors", "config.json")
FOLDERS = ("DIR", "FOLDER", "SHARDS")
"""Metavars of options that take a folder."""


def completer(
    command: str, parser: argparse.ArgumentParser, action: argparse.Action, words: Sequence[str]
) -> Completer | None:
    """What completes the value of an argument of ``command``; None for argcomplete's own: choices, else files.

    ``words``: those on the line before the cursor.
    """
    name = action.option_strings[-1] if action.option_strings else action.dest
    subcommand = parser.prog.rpartition(" ")[2]
    if action.choices is not None:
        return None
    if name == "--config" and command != "data":  # there it is a configuration of the hub
        return presets
    if name == "--set":
        return _with_words(settings, words) if command == "eval" else _with_words(keys, words)
    if name == "suites" or (name == "--eval" and command == "launch"):
        return _with_words(suites, words)
    if name in ("--checkpoint", "checkpoint"):
        return checkpoints
    if name in ("run", "runs") or (subcommand == "compare" and name in ("a", "b")):
        return runs
    if name == "--filter":
        return filters
    if name == "key" and command == "config":
        return blocks
    if name == "--gpu":
        return gpus
    if action.metavar in FOLDERS or name == "batch":
        return folders
    return None


def _with_words(offered: Completer, words: Sequence[str]) -> Completer:
    return lambda prefix, **_: offered(prefix, words)


def presets(prefix: str, **_: Any) -> Iterator[str]:
    """Names of presets, YAML files, and folders to look for them."""
    from pretrain.config.load import preset_folders

    if "/" not in prefix:
        yield from sorted({file.stem for folder in preset_folders() for file in folder.glob("*.yaml")})
    yield from _yaml_files(prefix)


def keys(prefix: str, words: Sequence[str]) -> Iterator[str]:
    """``KEY=`` of a run's configuration; behind the equals sign the values, where they have names."""
    from data_pipeline.configuration import ITEM
    from pretrain.config.reference import all_keys

    items = _items(words)
    for key in all_keys():
        if key.opens is not None or key.is_map:
            continue
        listed = key.name.partition(f".{ITEM}.")[0]
        numbers = range(items.get(listed, 1)) if ITEM in key.name.split(".") else (0,)
        for number in numbers:
            name = ".".join(str(number) if part == ITEM else part for part in key.name.split("."))
            if not prefix.startswith(f"{name}="):
                yield f"{name}="
                continue
            values = [value.strip() for value in key.type.partition(",")[0].split(" | ")]
            if len(values) > 1 and all(value.replace("-", "_").isidentifier() for value in values):
                yield from (f"{name}={value}" for value in values)


def _items(words: Sequence[str]) -> dict[str, int]:
    """How many items the lists of the file have that ``--config`` names; empty where it cannot be read."""
    import yaml

    from data_pipeline.errors import UserError
    from pretrain.config.load import find_config, read_yaml

    given = [word for before, word in itertools.pairwise(words) if before == "--config"]
    given += [word.removeprefix("--config=") for word in words if word.startswith("--config=")]
    if not given:
        return {}
    try:
        raw = read_yaml(find_config(given[-1]))
    except (UserError, OSError, yaml.YAMLError):
        return {}
    data = raw.get("data")
    named = raw | {f"data.{name}": value for name, value in data.items()} if isinstance(data, dict) else raw
    return {name: len(value) for name, value in named.items() if isinstance(value, list)}


def blocks(prefix: str, **_: Any) -> Iterator[str]:
    """Names of keys and blocks of a run's configuration."""
    from pretrain.config.reference import all_keys

    yield from (key.name for key in all_keys())


def suites(prefix: str, words: Sequence[str]) -> Iterator[str]:
    """Tasks, suites and the words ``list`` and ``compare``; paths of suites' files once there is a slash."""
    from eval.suites.load import available
    from eval.task import tasks

    if "/" in prefix:
        yield from _yaml_files(prefix)
        return
    paths = [word for before, word in itertools.pairwise(words) if before == "--suite-path"]
    if words == ["eval"]:
        yield from ("list", "compare")
    yield from tasks()
    yield from (path.stem for path in available([path for path in paths if Path(path).is_dir()]))


def _yaml_files(prefix: str) -> Iterator[str]:
    for name, path in _entries(prefix):
        if path.is_dir():
            yield f"{name}/"
        elif path.suffix in YAML:
            yield name


def settings(prefix: str, words: Sequence[str]) -> Iterator[str]:
    """``KEY=`` and ``SUITE.KEY=`` of the suites on the line; without one, of all tasks."""
    from eval.suites.load import available, load_suites
    from eval.task import tasks

    known = {*tasks(), *(path.stem for path in available())}
    chosen = load_suites([word for word in words[1:] if word in known] or list(tasks()))
    for suite in chosen:
        for field in type(suite.settings).model_fields:
            yield f"{field}="
            yield f"{suite.name}.{field}="


def filters(prefix: str, **_: Any) -> Iterator[str]:
    """Filters of documents; those without a threshold of their own with the equals sign that they need."""
    from data_pipeline.quality.rules import BUNDLES, RULES
    from data_pipeline.quality.values import Flag

    yield from BUNDLES
    for name, rule in RULES.items():
        yield name if rule.default is not None or isinstance(rule.kind, Flag) else f"{name}="


def gpus(prefix: str, **_: Any) -> Iterator[str]:
    """GPUs whose peak is known."""
    from pretrain.machine import PEAK_FLOPS

    yield from PEAK_FLOPS


def runs(prefix: str, **_: Any) -> Iterator[str]:
    """Folders of runs, and folders to look for them; before anything is typed those in ``runs`` too."""
    yield from _signed(prefix, RUN_SIGNS)


def checkpoints(prefix: str, **_: Any) -> Iterator[str]:
    """Folders of runs, checkpoints and exports, and folders to look for them."""
    yield from _signed(prefix, (*RUN_SIGNS, *CHECKPOINT_SIGNS))


def folders(prefix: str, **_: Any) -> Iterator[str]:
    """Folders."""
    yield from (f"{name}/" for name, path in _entries(prefix) if path.is_dir())


def _signed(prefix: str, signs: Sequence[str]) -> Iterator[str]:
    """Folders with one of ``signs`` as they are, all others with a slash, so that one can go on below them."""
    entries = list(_entries(prefix)) + (list(_entries("runs/")) if not prefix else [])
    for name, path in entries:
        if not path.is_dir():
            continue
        is_one = any((path / sign).exists() for sign in signs)
        if is_one:
            yield name
        if not is_one or name == prefix:
            yield f"{name}/"


def _entries(prefix: str) -> Iterator[tuple[str, Path]]:
    """What begins with ``prefix`` on the disk, as it would be typed; hidden files only if a dot is typed."""
    head, slash, tail = prefix.rpartition("/")
    folder = Path(os.path.expanduser(head + slash)) if slash else Path()
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return
    for name in names:
        if name.startswith(tail) and (tail.startswith(".") or not name.startswith(".")):
            yield f"{head}{slash}{name}", folder / name
