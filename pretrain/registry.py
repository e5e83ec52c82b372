"""Things of one sort that register themselves by name: each is a class in a module of its own, and no list names it."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T", bound=type)


class Registry(Generic[T]):
    """The classes that the modules of ``package`` register; the modules are found by listing its folder.

    ``parts`` are the attributes that each class must have. A class without one of them is refused where it registers,
    so that nothing falls back to what another one does.
    """

    def __init__(self, sort: str, package: str, parts: Sequence[str]) -> None:
        self._sort, self._package, self._parts = sort, package, tuple(parts)
        self._members: dict[str, T] = {}
        self._listed = False

    def register(self, name: str) -> Callable[[T], T]:
        """Decorates a class to be known as ``name``. Raises ``TypeError`` for a part missing or a name taken."""

        def add(member: T) -> T:
            lacking = [part for part in self._parts if getattr(member, part, None) is None]
            if lacking:
                raise TypeError(f"{self._sort} '{name}' ({member.__qualname__}) lacks {', '.join(lacking)}")
            if name in self._members:
                raise TypeError(f"{self._sort} '{name}' is registered already, by {self._members[name].__module__}")
            self._members[name] = member
            return member

        return add

    def names(self) -> list[str]:
        """All names, sorted."""
        self._list()
        return sorted(self._members)

    def get(self, name: str) -> T:
        """The class of that name. Raises ``ValueError`` that names those there are, and the nearest one."""
        self._list()
        if name not in self._members:
            close = difflib.get_close_matches(name, self._members, n=1)
            hint = f"did you mean '{close[0]}'? " if close else ""
            *most, last = [f"'{known}'" for known in self.names()]
            raise ValueError(f"there is no {self._sort} '{name}': {hint}choose {', '.join(most)} or {last}")
        return self._members[name]

    def _list(self) -> None:
        if self._listed:
            return
        package = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self._package}.{module.name}")
        self._listed = True
