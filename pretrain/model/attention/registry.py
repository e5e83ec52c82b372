"""The forms of attention by name.

Known names are the modules of :mod:`pretrain.model.attention.forms`, read from the folder's listing, and what was
registered besides. A form's module is imported when the form is first asked for something: it imports torch, and a
command that only reads a configuration (``--help``, a typing error in a file) must not wait for that. Hence the one
rule for a new form: the module ``forms/NAME.py`` registers a class of that name.
"""

from __future__ import annotations

import difflib
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, TypeVar

from pretrain.model.attention.form import PARTS, Form

if TYPE_CHECKING:
    from pretrain.model.config import ModelConfig

FormClass = TypeVar("FormClass", bound=type[Form])

FORMS = "pretrain.model.attention.forms"
_registered: dict[str, type[Form]] = {}


class FormError(Exception):
    """A form that cannot be registered, or a module that registers none: a mistake in the code."""


def register(form: FormClass) -> FormClass:
    """Make a form known by its name; a decorator. Raises :class:`FormError` for one that lacks a part, and for a second
    one of the same name."""
    name = getattr(form, "name", None) or form.__name__
    missing = [part for part in PARTS if getattr(form, part, None) is getattr(Form, part, None)]
    if missing:
        raise FormError(f"form {name} lacks " + "; ".join(f"{part} ({PARTS[part]})" for part in missing))
    known = _registered.get(name)
    # The same module imported anew (a test, a notebook) replaces its own class.
    if known is not None and (known.__module__, known.__qualname__) != (form.__module__, form.__qualname__):
        raise FormError(f"form {name} is registered twice: {known.__module__} and {form.__module__}")
    _registered[name] = form
    return form


@contextmanager
def registered(form: type[Form]) -> Iterator[type[Form]]:
    """A form that is known within the block only: for tests and trials."""
    before = _registered.get(form.__dict__.get("name", ""))
    register(form)
    try:
        yield form
    finally:
        if before is None:
            del _registered[form.name]
        else:
            _registered[form.name] = before


def names() -> tuple[str, ...]:
    """All known forms, sorted."""
    return tuple(sorted({*_modules(), *_registered}))


def check_name(name: str) -> str:
    """``name``, or ValueError with the known ones."""
    known = names()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        raise ValueError(f"there is no form of attention '{name}': {hint}known forms: {', '.join(known)}")
    return name


def form_class(name: str) -> type[Form]:
    """Raises ValueError for an unknown name and :class:`FormError` for a module that does not register its form."""
    if name not in _registered:
        check_name(name)
        import_module(f"{FORMS}.{name}")
        if name not in _registered:
            raise FormError(f"module {FORMS}.{name} registers no form called {name}")
    return _registered[name]


def form_of(config: ModelConfig) -> Form:
    """The form of a model."""
    return form_class(config.attention)(config)


@cache
def _modules() -> tuple[str, ...]:
    return tuple(m.name for m in pkgutil.iter_modules(import_module(FORMS).__path__) if not m.name.startswith("_"))
