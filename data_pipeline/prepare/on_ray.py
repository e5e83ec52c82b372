"""Units as tasks of a Ray cluster: a task that dies with its node is started again on another one.

All nodes must see the inputs and the folder under the same paths (a shared file system), and have this package
installed. A unit done twice leaves the same bytes, so a node that was only believed dead does no harm.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.prepare.executors import Method, fresh_text, use_threads
from data_pipeline.prepare.plan import Unit
from data_pipeline.prepare.worker import Context, Worker

RETRIES = 8  # of a task whose process or node died


class OnRay:
    """An executor on the Ray cluster at ``address`` (``auto``: the one this machine belongs to)."""

    def __init__(self, context: Context, address: str, on_text: Callable[[int], None]) -> None:
        try:
            import ray
        except ImportError:
            raise UserError("Ray is not installed: pip install 'nystrom-pretrain[ray]'") from None
        self._ray = ray
        self._on_text = on_text
        self._ours = not ray.is_initialized()
        if self._ours:
            _check_reachable(address)
            try:
                ray.init(address=address, log_to_driver=False, include_dashboard=False)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise UserError(f"no Ray cluster at {address}: {error}") from None
        self._context = ray.put(context)
        self._task = ray.remote(num_cpus=1, max_retries=RETRIES)(_do)

    def run(self, method: Method, units: Iterable[Unit], *arguments: Any) -> Iterator[Any]:
        """See :class:`data_pipeline.prepare.executors.Executor`."""
        waiting = iter(units)
        running: list[Any] = []
        while True:
            # Nodes may join while it runs: hand out more than the cores there are now.
            ahead = max(16, 4 * int(self._ray.cluster_resources().get("CPU", 1)))
            units_now = islice(waiting, ahead - len(running))
            running += [self._task.remote(self._context, method, unit, *arguments) for unit in units_now]
            if not running:
                return
            finished, running = self._ray.wait(running, timeout=5.0)
            for reference in finished:
                result = self._result(reference)
                self._on_text(fresh_text(result))
                yield result

    def _result(self, reference: Any) -> Any:
        exceptions = self._ray.exceptions
        try:
            return self._ray.get(reference)
        except exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise UserError(str(error.cause)) from None
            raise
        except exceptions.RayError as error:
            raise UserError(
                f"the Ray cluster lost a unit {RETRIES} times over ({type(error).__name__}); what is finished stays, "
                "run the command again"
            ) from None

    def close(self) -> None:
        """Leave the cluster."""
        if self._ours:
            self._ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raise :class:`UserError` at once where nobody listens; ``ray.init`` tries for five minutes."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdecimal() and "//" not in host:
        try:
            socket.create_connection((host, int(port)), timeout=20).close()
        except OSError as error:
            raise UserError(f"no Ray cluster at {address}: {error}") from None


_workers: dict[tuple[str, str], Worker] = {}  # Ray uses a process for many tasks


def _do(context: Context, method: Method, unit: Unit, *arguments: Any) -> Any:
    use_threads(1)
    key = (str(context.folder), context.decisions)
    if key not in _workers:
        _workers[key] = Worker(context)
    return getattr(_workers[key], method)(unit, *arguments)
