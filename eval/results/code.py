"""Which code computes a task's numbers, as a hash: a result is not served once that code has changed.

The modules are found without running them. They are the task's own module, all of ``pretrain/model``, and what these
reach by imports within the project. A dotted name in a string counts as an import: packages of registered classes and
the modules of tasks are named so. Prose does not count: comments, docstrings and layout are not hashed.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.task import described

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("data_pipeline", "eval", "pretrain")
MODEL = "pretrain.model"
"""Hashed for every task as a whole: forms of attention are found by name and not by an import."""
TASKS = "eval.tasks"
"""The list of tasks names this package, which does not mean that one task uses all."""
APART = ("eval.cli", "eval.compare", "eval.console", "eval.report", "eval.tracking")
"""What reads results and computes none."""


@dataclass(frozen=True)
class _Source:
    """A file without its prose: the digest of its syntax, and the names that it may import."""

    digest: str
    names: frozenset[str]


def code_hash(task: str) -> str:
    """The SHA-256 of the code that computes the numbers of ``task``, of its state when first asked in this process."""
    own = _own_files(task)
    return _code_hash(tuple(sorted(own.items())))


def code_files(task: str) -> dict[str, Path]:
    """The files that :func:`code_hash` is of, by module."""
    return dict(_reached(ROOT, _own_files(task)))


def provenance(task: str, device: str = "") -> dict[str, str]:
    """What determines a result beside its inputs: code, version of torch, kind of device (default: what is there)."""
    import torch

    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return {"code": code_hash(task), "torch": torch.__version__, "device": kind}


def changes(then: Mapping[str, Any], now: Mapping[str, str]) -> list[str]:
    """In what a stored ``environment`` differs from the :func:`provenance` of today, as text; the gravest first."""
    found = []
    if not then.get("code"):
        found.append("it does not say which code computed it")
    elif then["code"] != now["code"]:
        found.append(f"the code of the model or the task has changed ({then['code'][:8]}, now {now['code'][:8]})")
    if then.get("torch") != now["torch"]:
        found.append(f"it was computed with torch {then.get('torch')}, this is {now['torch']}")
    if then.get("device_kind", now["device"]) != now["device"]:
        found.append(f"it was computed on {then['device_kind']}, this is {now['device']}")
    return found


def _own_files(task: str) -> dict[str, str]:
    """Modules with their files that only the running process knows: the task's own, and forms that users registered."""
    from pretrain.model.attention.registry import FORMS

    about = described(task)
    names = [type(about).__module__, getattr(about, "module", "")]
    names += [form.__module__ for form in FORMS.known.values()]
    files = {name: getattr(sys.modules.get(name), "__file__", None) for name in names if name}
    known = _modules(ROOT)
    found = {name: file or str(known.get(name, "")) for name, file in files.items()}
    return {name: file for name, file in found.items() if file}


@functools.cache
def _code_hash(own: tuple[tuple[str, str], ...]) -> str:
    reached = _reached(ROOT, dict(own))
    return hashlib.sha256("".join(f"{name} {_source(path).digest}\n" for name, path in reached).encode()).hexdigest()


def _reached(root: Path, own: Mapping[str, str]) -> list[tuple[str, Path]]:
    """The modules that the model and the files ``own`` reach, sorted by name."""
    known = _modules(root)
    found: dict[str, Path] = {}
    waiting = [(name, Path(path)) for name, path in own.items()]
    waiting += [(name, path) for name, path in known.items() if _below(name, MODEL)]
    while waiting:
        name, path = waiting.pop()
        if name in found:
            continue
        found[name] = path
        names = set(_source(path).names) | ({name.rpartition(".")[0]} if "." in name else set())
        waiting += [(other, known[other]) for other in _followed(names, known) if other not in found]
    return sorted(found.items())


def _followed(names: Iterable[str], known: Mapping[str, Path]) -> Iterator[str]:
    """The modules that these names mean; a package that is named with ``.*`` is meant with all below it."""
    for name in names:
        if name.endswith(".*"):
            package = name.removesuffix(".*")
            if package != TASKS:
                yield from (other for other in known if _below(other, package))
        elif name in known and not any(_below(name, part) for part in APART):
            yield name


def _below(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


@functools.cache
def _modules(root: Path) -> dict[str, Path]:
    """Every module of the project by its dotted name."""
    found = {}
    for path in (path for folder in FOLDERS for path in (root / folder).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@functools.cache
def _source(path: Path) -> _Source:
    tree = ast.parse(path.read_bytes())
    skipped = {id(node) for node in ast.walk(tree) if isinstance(node, ast.If) and _for_types(node)}
    names: set[str] = set()
    words: list[str] = []
    stack: list[tuple[Any, bool]] = [(tree, True)]  # depth first; False: within a block that only a type checker runs
    while stack:
        node, runs = stack.pop()
        if isinstance(node, list):
            words.append(f"[{len(node)}")
            stack += [(item, runs) for item in node]
        elif isinstance(node, ast.AST):
            if _is_prose(node):
                continue
            runs = runs and id(node) not in skipped
            if runs:
                names |= _names(node)
            words.append(type(node).__name__)
            for name, value in ast.iter_fields(node):
                if value is not None and value != [] and name not in ("ctx", "kind"):
                    words.append(name)
                    stack.append((value, runs))
        else:
            words.append(repr(node))
    return _Source(hashlib.sha256("\0".join(words).encode()).hexdigest(), frozenset(names))


def _names(node: ast.AST) -> set[str]:
    """The dotted names that a node may import."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom) and node.module:
        return {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        name = node.value
        if "." in name and name.split(".")[0] in FOLDERS and all(part.isidentifier() for part in name.split(".")):
            return {name, f"{name}.*"}
    return set()


def _is_prose(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _for_types(node: ast.If) -> bool:
    return ast.unparse(node.test).endswith("TYPE_CHECKING")
