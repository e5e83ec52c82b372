"""A cache of what was made last, for values that are pure functions of their keys."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Recent(Generic[K, V]):
    """Makes values on demand and keeps those used last, from any thread.

    It keeps the last ``keep`` values, and older ones as long as all together weigh at most ``budget``.
    """

    def __init__(
        self, make: Callable[[K], V], keep: int, budget: int = 0, weigh: Callable[[V], int] = lambda value: 1
    ) -> None:
        self._make, self._keep, self._budget, self._weigh = make, keep, budget, weigh
        self._values: OrderedDict[K, V] = OrderedDict()
        self._weight = 0
        self._lock = threading.Lock()

    def __call__(self, key: K) -> V:
        """The value of ``key``."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
            value = self._values[key] = self._make(key)
            self._weight += self._weigh(value)
            while len(self._values) > self._keep and self._weight > self._budget:
                self._weight -= self._weigh(self._values.popitem(last=False)[1])
            return value
