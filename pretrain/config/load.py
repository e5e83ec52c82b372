"""From a YAML file and overrides to a configuration, with every fault named by its key."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from data_pipeline.configuration import faults
from data_pipeline.errors import UserError
from pretrain.config.run import RunConfig


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML run configuration and apply ``key.sub=value`` overrides (``curriculum.0.seq_len=256`` in a list).

    ``path``: a file, or the name of a preset (:func:`find_config`). Raises :class:`UserError` with the file and the key
    for a missing file, bad YAML, an unknown key or a bad value.
    """
    raw = read_yaml(find_config(path))
    for override in overrides:
        apply_override(raw, override)
    return parse_config(raw, where=str(path))


PRESETS = Path(__file__).resolve().parents[2] / "configs"
"""The presets that are installed with the program."""


def preset_folders() -> tuple[Path, Path]:
    """Where presets are looked for: ``configs`` of the working directory, then the program's own."""
    return Path("configs"), PRESETS


def find_config(given: str | Path) -> Path:
    """The file that ``--config`` means: a path if there is such a file, else the preset of that name.

    A name is a word without folders and endings: ``books-clm`` is ``configs/books-clm.yaml``. Raises
    :class:`UserError` with near and known names for one that there is not. A path is returned as it is, there or not.
    """
    path = Path(given)
    name = str(given)
    if path.is_file() or path.suffix in (".yaml", ".yml") or path.name != name or not name:
        return path
    for folder in preset_folders():
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    names = sorted({file.stem for folder in preset_folders() for file in folder.glob("*.yaml")})
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    raise UserError(
        f"there is no configuration '{name}': {hint}give the path of a YAML file, or the name of a preset: "
        f"{', '.join(names)}"
    )


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The keys and values of a YAML file as they stand there; raises :class:`UserError` for what is no such file."""
    path = Path(path)
    if not path.is_file():
        near = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = f"; {path.parent} has {', '.join(near)}" if near else ""
        raise UserError(f"configuration {path} does not exist{hint}")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} must hold keys and values at the top, not {type(raw).__name__}")
    return raw


def parse_config(raw: dict[str, Any], where: str = "configuration") -> RunConfig:
    """Validate a plain dictionary; raises :class:`UserError` that lists every fault with its dotted key."""
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        lines = faults(error, RunConfig)
        raise UserError(f"{where}: " + ("; ".join(lines) if len(lines) == 1 else "\n  " + "\n  ".join(lines))) from None


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Change one key of what :func:`read_yaml` returned; raises :class:`UserError` for one that can't be."""
    key, sep, text = override.partition("=")
    if not sep or not key:
        raise UserError(f"--set {override}: write it as key.sub=value, for example optimizer.lr=3e-4")
    value = yaml_scalar(text)
    node: Any = raw
    parts = key.split(".")
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise UserError(
                    f"--set {override}: '{'.'.join(parts[:depth])}' is a list of {len(node)}, no item '{part}'"
                )
            index: Any = int(part)
        elif isinstance(node, dict):
            index = part
            if not last and node.get(part) is None:
                node[part] = {}
        else:
            raise UserError(f"--set {override}: '{'.'.join(parts[:depth])}' is a single value and has no '{part}'")
        if last:
            node[index] = value
        else:
            node = node[index]


def yaml_scalar(text: str) -> Any:
    """A value from the command line, read as YAML reads it, with 3e-4 a number."""
    value = yaml.safe_load(text) if text else ""
    if isinstance(value, str):  # YAML 1.1 reads 3e-4 as a string
        try:
            return float(value)
        except ValueError:
            return value
    return value
