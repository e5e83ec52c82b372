"""An iterator that runs in a thread of its own, a few items ahead of its consumer."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Runs ``source`` in a thread, at most ``depth`` items ahead; iterate over it once.

    What ``source`` raises is raised in the consumer, after the items made before it. The thread ends with ``source``,
    at :meth:`close`, and when the prefetcher is collected.
    """

    def __init__(self, source: Iterator[T], depth: int) -> None:
        self._state = _Shared()
        for _ in range(depth):
            self._state.free.put(None)
        self._thread = threading.Thread(
            target=Prefetcher._work, args=(source, self._state), name="prefetch", daemon=True
        )
        self._thread.start()
        # Also at interpreter exit, before daemon threads are torn down in the middle of a gather.
        self._finalizer = weakref.finalize(self, Prefetcher._stop, self._state, self._thread)

    @staticmethod
    def _work(source: Iterator[T], state: _Shared) -> None:  # no reference to self: it must stay collectable
        end = _End()
        try:
            for item in source:
                state.free.get()
                if state.stopped:
                    break
                state.items.put(item)
        except BaseException as caught:  # handed to the consumer, whatever it is
            end = _End(caught)
        finally:
            state.items.put(end)

    @staticmethod
    def _stop(state: _Shared, thread: threading.Thread) -> None:
        state.stopped = True
        state.free.put(None)
        if thread is not threading.current_thread():
            thread.join()
        state.items = SimpleQueue()
        state.items.put(_End())

    def __iter__(self) -> Iterator[T]:
        state = self._state
        while not state.stopped:
            item = state.items.get()
            if isinstance(item, _End):
                state.items.put(_End())  # who asks again is told again
                if item.error is not None:
                    raise item.error
                return
            state.free.put(None)
            yield item

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._state.stopped

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self._finalizer()


@dataclass(frozen=True)
class _End:
    """Follows the last item."""

    error: BaseException | None = None


@dataclass
class _Shared:
    """What the consumer and the thread of a :class:`Prefetcher` share."""

    items: SimpleQueue[Any] = field(default_factory=SimpleQueue)
    free: SimpleQueue[None] = field(default_factory=SimpleQueue)
    """An entry for each item that may still be made ahead."""
    stopped: bool = False
