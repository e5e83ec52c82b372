"""The registry that forms of attention, optimizers, formats of files and evaluation tasks share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.registry import RegistrationError, Registry

MODULE = """from toy_registry import KINDS, Kind

@KINDS.register
class New(Kind):
    name = "{name}"
    part = {part}
"""


class Kind:
    """Base of the toys; ``part`` is what each must define."""

    name: str
    part: int | None = None


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "toy_kinds"
    folder.mkdir()
    (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    for name in [name for name in sys.modules if name.startswith(("toy_kinds", "toy_registry"))]:
        del sys.modules[name]


def registry(*, lazy: bool = False) -> Registry[Kind]:
    """One whose classes import it from a module ``toy_registry``."""
    kinds = Registry("kind", "toy_kinds", Kind, {"part": "what it does"}, lazy=lazy)
    module = type(sys)("toy_registry")
    module.KINDS, module.Kind = kinds, Kind  # type: ignore[attr-defined]
    sys.modules["toy_registry"] = module
    return kinds


@pytest.mark.parametrize("lazy", [False, True])
def test_a_module_in_the_folder_is_all_that_a_class_needs(folder: Path, lazy: bool) -> None:
    (folder / "new.py").write_text(MODULE.format(name="new", part=1))
    (folder / "_shared.py").write_text("raise AssertionError\n")
    kinds = registry(lazy=lazy)
    assert kinds.names() == ("new",)
    assert ("toy_kinds.new" in sys.modules) is not lazy
    assert kinds.get("new").__module__ == "toy_kinds.new"
    assert kinds.all() == {"new": kinds.get("new")}
    (folder / "later.py").write_text(MODULE.format(name="later", part=2))
    kinds.refresh()
    assert kinds.names() == ("later", "new")


def test_an_unknown_name_is_refused_with_the_nearest(folder: Path) -> None:
    (folder / "new.py").write_text(MODULE.format(name="new", part=1))
    with pytest.raises(ValueError, match=r"there is no kind 'nwe': did you mean 'new'\? known: new"):
        registry().get("nwe")


def test_a_lacking_part_is_refused_by_name_and_the_fault_stays(folder: Path) -> None:
    (folder / "half.py").write_text(MODULE.format(name="half", part=None))
    kinds = registry()
    for _ in range(2):
        with pytest.raises(RegistrationError, match=r"kind 'half' \(toy_kinds\.half\) lacks part \(what it does\)"):
            kinds.names()


def test_a_lazy_module_registers_its_own_name(folder: Path) -> None:
    (folder / "new.py").write_text(MODULE.format(name="other", part=1))
    with pytest.raises(RegistrationError, match=r"module toy_kinds\.new registers no kind called 'new'"):
        registry(lazy=True).get("new")


def test_a_name_is_taken_once_and_given_back_after_a_block(folder: Path) -> None:
    kinds = registry()
    one, two = (type(name, (Kind,), {"name": "same", "part": 1}) for name in ("One", "Two"))
    with kinds.registered(one):
        kinds.register(one)
        with pytest.raises(RegistrationError, match="kind 'same' is registered twice"):
            kinds.register(two)
    assert kinds.names() == ()


def test_a_lazy_module_that_a_block_imports_first_stays_known_behind_it(folder: Path) -> None:
    (folder / "new.py").write_text(MODULE.format(name="new", part=1))
    kinds = registry(lazy=True)
    other = type("Other", (Kind,), {"name": "other", "part": 1})
    with kinds.registered(other):
        inside = kinds.get("new")
    assert kinds.get("new") is inside
    assert kinds.names() == ("new",)
