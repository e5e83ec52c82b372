"""Imports point one way: between the folders, between the parts of each folder, and between modules."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("data_pipeline", "pretrain", "eval", "launch", "benchmarks")
ARROWS = {
    "data_pipeline": set(),
    "pretrain": {"data_pipeline"},
    "eval": {"data_pipeline", "pretrain"},
    "launch": {"data_pipeline", "pretrain", "eval"},
    "benchmarks": {"data_pipeline", "pretrain", "eval", "launch"},
}
"""Which folders each one may import, as the README says."""
Graph = dict[str, set[str]]


def modules() -> dict[str, Path]:
    """Every module of the project by its dotted name."""
    found = {}
    for path in (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below, in functions too, but not those that only a type checker runs."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for other in child.orelse:
                yield from (other, *statements(other))
        else:
            yield from (child, *statements(child))


def imports(source: str, known: Iterable[str]) -> set[str]:
    """The modules among ``known`` that a source imports; of ``from package import module`` the module."""
    found = set()
    for node in statements(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not followed"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & set(known)
            if not inner <= set(known):
                found.add(node.module or "")
    return found & set(known)


def parts(graph: Graph, package: str) -> Graph:
    """The graph of what lies directly in ``package``, each with all that is below it."""

    def part(module: str) -> str | None:
        inside = module.startswith(package + ".")
        return module.removeprefix(package + ".").split(".")[0] if inside else None

    out: Graph = {}
    for module, imported in graph.items():
        own = part(module)
        if own is not None:
            out.setdefault(own, set()).update(p for p in map(part, imported) if p not in (None, own))
    return out


def cycle(graph: Graph) -> list[str]:
    """Names that import each other in a circle, the first one repeated at the end; [] if there is none."""
    done: set[str] = set()
    for start in sorted(graph):
        path: list[str] = []
        left = [iter([start])]
        while left:
            name = next(left[-1], None)
            if name is None:
                left.pop()
                if path:
                    done.add(path.pop())
            elif name in path:
                return [*path[path.index(name) :], name]
            elif name not in done:
                path.append(name)
                left.append(iter(sorted(graph.get(name, ()))))
    return []


@pytest.fixture(scope="module")
def graph() -> Graph:
    """Every module with those that it imports, wherever in it."""
    known = modules()
    return {name: imports(path.read_text(encoding="utf-8"), known) for name, path in known.items()}


def test_imports_are_found_in_functions_and_not_those_for_types() -> None:
    known = ["a", "a.b", "a.c", "a.d", "a.e"]
    source = """
import a.b
if TYPE_CHECKING:
    import a.c
else:
    import a.e
def late():
    from a import d, something
"""
    assert imports(source, known) == {"a.b", "a.d", "a", "a.e"}
    assert imports("from a import d", known) == {"a.d"}


def test_a_cycle_is_found_and_named() -> None:
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == ["b", "c", "b"]
    assert cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    assert parts({"a.b.x": {"a.c.y", "a.b.z", "d"}, "a.c.y": {"a.b.z"}, "a.b.z": set()}, "a") == {
        "b": {"c"},
        "c": {"b"},
    }


def test_the_graph_is_of_the_whole_project(graph: Graph) -> None:
    assert {name.split(".")[0] for name in graph} == set(FOLDERS)
    assert "pretrain.engine.training" in graph["pretrain.run"]  # an import within a function


def test_folders_import_as_the_readme_says(graph: Graph) -> None:
    wrong = [
        f"{module} imports {other}"
        for module, imported in graph.items()
        for other in imported
        if (own := module.split(".")[0]) != (folder := other.split(".")[0]) and folder not in ARROWS[own]
    ]
    assert not wrong, wrong


def test_no_module_imports_itself_through_others(graph: Graph) -> None:
    assert not cycle(graph), " -> ".join(cycle(graph))


def test_no_parts_of_a_package_import_each_other_in_a_circle(graph: Graph) -> None:
    packages = {name.rpartition(".")[0] for name in graph if "." in name}
    found = {package: cycle(parts(graph, package)) for package in sorted(packages)}
    assert not any(found.values()), {package: " -> ".join(names) for package, names in found.items() if names}


@pytest.mark.parametrize("old", ["export", "store"])
def test_load_model_is_still_found_where_it_was_with_a_warning(old: str) -> None:
    import importlib

    from pretrain.checkpoint.load import load_model

    module = importlib.import_module(f"pretrain.checkpoint.{old}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert module.load_model is load_model
    assert [(w.category, w.filename) for w in caught] == [(DeprecationWarning, __file__)]
    assert f"pretrain.checkpoint.{old}.load_model has moved to pretrain.checkpoint.load.load_model" in str(
        caught[0].message
    )
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = module.nothing
