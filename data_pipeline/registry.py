"""Classes of one kind that register themselves by name: each in a module of one package, and no list names them.

Attention forms, optimizers, formats of files and evaluation tasks each have one :class:`Registry`. Adding one is adding
a module to its package.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from data_pipeline.errors import UserError

Base = TypeVar("Base")
Member = TypeVar("Member", bound=type[Any])


class RegistrationError(UserError):
    """A class that cannot be registered, or a module that does not register what its name says."""


class Registry(Generic[Base]):
    """The subclasses of ``base`` that the modules of ``package`` register.

    ``kind``: what one of them is called in messages. ``parts``: the attributes that a class must define itself, each
    with a description; ``name`` is always one. A class that lacks a part is refused where it registers, because it
    would otherwise silently run with the base's.

    The package's folder is listed when a name is first asked for, without modules that begin with an underscore.
    ``lazy``: the module NAME registers the class NAME and is imported when that class is asked for, because importing
    it is slow (PyTorch takes seconds). Otherwise all modules are imported at once, and one may register several
    classes.
    """

    def __init__(
        self, kind: str, package: str, base: type[Base], parts: Mapping[str, str], *, lazy: bool = False
    ) -> None:
        self.kind, self.package, self.lazy = kind, package, lazy
        self._base, self._parts = base, {"name": "the name that users give", **parts}
        self._members: dict[str, type[Base]] = {}
        self._modules: tuple[str, ...] | None = None

    def register(self, member: Member) -> Member:
        """Class decorator. Raises :class:`RegistrationError` for a missing part and for a name that is taken."""
        name = getattr(member, "name", None) or member.__name__
        lacking = [part for part in self._parts if getattr(member, part, None) is getattr(self._base, part, None)]
        if lacking:
            described = "; ".join(f"{part} ({self._parts[part]})" for part in lacking)
            raise RegistrationError(f"{self.kind} '{name}' ({member.__module__}) lacks {described}")
        other = self._members.get(name)
        # A module that is imported again (by a test, in a notebook) replaces its own class.
        if other is not None and (other.__module__, other.__qualname__) != (member.__module__, member.__qualname__):
            raise RegistrationError(
                f"{self.kind} '{name}' is registered twice: in {other.__module__} and in {member.__module__}"
            )
        self._members[name] = member
        return member

    @contextmanager
    def registered(self, *members: type[Base]) -> Iterator[None]:
        """Classes that are known within the block only: for tests and trials.

        Whatever else registers within the block is forgotten too, but for modules of a lazy package's own listing: they
        are imported once, and would not register again.
        """
        self.names()
        before, listing = dict(self._members), self._modules
        try:
            for member in members:
                self.register(member)
            yield
        finally:
            own = {name: f"{self.package}.{name}" for name in listing or () if self.lazy}
            loaded = {name: kind for name, kind in self._members.items() if kind.__module__ == own.get(name)}
            self._members, self._modules = {**loaded, **before}, listing

    @property
    def known(self) -> Mapping[str, type[Base]]:
        """The classes that have registered so far; the folder is not looked at."""
        return self._members

    def names(self) -> tuple[str, ...]:
        """All names, sorted."""
        modules = self._list()
        return tuple(sorted({*modules, *self._members} if self.lazy else self._members))

    def check(self, name: str) -> str:
        """``name``; raises ``ValueError`` with the known names and the nearest one if it is unknown."""
        known = self.names()
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean '{close[0]}'? " if close else ""
            raise ValueError(f"there is no {self.kind} '{name}': {hint}known: {', '.join(known)}")
        return name

    def get(self, name: str) -> type[Base]:
        """The class of this name.

        Raises ``ValueError`` for an unknown name and :class:`RegistrationError` for a lazy module that does not
        register its class.
        """
        if name not in self._members:
            self.check(name)
            if self.lazy:
                importlib.import_module(f"{self.package}.{name}")
            if name not in self._members:
                raise RegistrationError(f"module {self.package}.{name} registers no {self.kind} called '{name}'")
        return self._members[name]

    def all(self) -> dict[str, type[Base]]:
        """All classes by name, in the order of their names."""
        return {name: self.get(name) for name in self.names()}

    def refresh(self) -> None:
        """Forget the listing of the folder: the next question reads it again."""
        self._modules = None

    def _list(self) -> tuple[str, ...]:
        """Names of the package's modules; imports them unless ``lazy``."""
        if self._modules is None:
            folder = importlib.import_module(self.package).__path__
            found = tuple(m.name for m in pkgutil.iter_modules(folder) if not m.name.startswith("_"))
            for module in () if self.lazy else found:
                importlib.import_module(f"{self.package}.{module}")
            self._modules = found
        return self._modules
