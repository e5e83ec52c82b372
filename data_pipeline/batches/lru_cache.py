"""A cache of the values used last, with a limit on their number or on their size.

``functools.lru_cache`` has a limit on the number alone.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class LRUCache(Generic[K, V]):
    """Computes ``make(key)`` on demand and keeps the values used last; safe to call from several threads.

    The last ``keep`` values always stay. Older ones stay while the sizes of all values add up to at most ``budget``.
    """

    def __init__(
        self, make: Callable[[K], V], keep: int, budget: int = 0, size: Callable[[V], int] = lambda value: 1
    ) -> None:
        self._make, self._keep, self._budget, self._size = make, keep, budget, size
        self._values: OrderedDict[K, V] = OrderedDict()
        self._total = 0
        self._lock = threading.Lock()

    def __call__(self, key: K) -> V:
        """The value of ``key``."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
            value = self._values[key] = self._make(key)
            self._total += self._size(value)
            while len(self._values) > self._keep and self._total > self._budget:
                self._total -= self._size(self._values.popitem(last=False)[1])
            return value
