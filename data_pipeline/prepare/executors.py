"""Who does the units: this process, several processes of this machine, or a cluster.

An executor runs one method of :class:`Worker` on each unit and yields the results as they come, in any order: the
bytes do not depend on it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, Literal, Protocol

from data_pipeline.errors import UserError
from data_pipeline.prepare.plan import Unit
from data_pipeline.prepare.worker import Context, Signed, UnitResult, Worker
from data_pipeline.processes import available_cores, die_with_parent

Method = Literal["sign", "tokenize"]
RETRIES = 8
"""Of a task of Ray whose process or node died."""


class Executor(Protocol):
    """Does units somewhere."""

    def run(self, method: Method, units: Iterable[Unit], *arguments: Any) -> Iterator[Any]:
        """The results of ``Worker.method(unit, *arguments)``, in any order. Raises what a unit raised, first come first
        served."""

    def close(self) -> None:
        """End what was started."""


class InProcess:
    """One unit after another, here. The tokenizers library still uses all cores for each batch of documents."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def run(self, method: Method, units: Iterable[Unit], *arguments: Any) -> Iterator[Any]:
        """See :class:`Executor`."""
        for unit in units:
            yield getattr(self._worker, method)(unit, *arguments)

    def close(self) -> None:
        """Nothing was started."""


class Processes:
    """Several processes of this machine, this one among them, each with its share of the cores.

    This one begins at once; another takes 0.7 s to start and to load a tokenizer of 32k tokens, while which it is left
    to do so.
    """

    def __init__(self, worker: Worker, workers: int, on_text: Callable[[int], None]) -> None:
        # Not forked: threads of the tokenizers and Arrow libraries do not survive that.
        spawn = multiprocessing.get_context("spawn")
        self._stop = spawn.RawValue("b", 0)  # no lock, which a killed process might have held forever
        self._on_text = on_text
        self._ahead = workers  # units handed out at a time; standard input is spooled no further than this
        threads = max(1, available_cores() // workers)
        self._pool = ProcessPoolExecutor(
            workers - 1, mp_context=spawn, initializer=_start, initargs=(worker.context, threads, self._stop)
        )
        for _ in range(workers - 1):
            self._pool.submit(_load)
        self._parallelism = os.environ.get("TOKENIZERS_PARALLELISM")
        self._own = worker
        self._one_thread = threads == 1

    def run(self, method: Method, units: Iterable[Unit], *arguments: Any) -> Iterator[Any]:
        """See :class:`Executor`."""
        if self._one_thread:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the library looks at each call
        waiting = iter(units)
        running: set[Future[Any]] = set()
        try:
            while True:
                running.update(
                    self._pool.submit(_do, method, unit, *arguments)
                    for unit in islice(waiting, self._ahead - len(running))
                )
                own = next(waiting, None)
                if own is not None:
                    yield getattr(self._own, method)(own, *arguments)
                elif not running:
                    return
                finished, running = wait(running, timeout=0 if own else None, return_when=FIRST_COMPLETED)
                for future in finished:
                    result = future.result()
                    self._on_text(new_text_bytes(result))
                    yield result
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed from outside, most often because memory ran out: use fewer --workers; "
                "what is finished stays, run the command again"
            ) from None

    def close(self) -> None:
        """End the processes, at the next batch of those that are at work."""
        self._stop.value = 1
        self._pool.shutdown(cancel_futures=True)
        if self._parallelism is None:
            os.environ.pop("TOKENIZERS_PARALLELISM", None)
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = self._parallelism


class OnRay:
    """Units as tasks of the Ray cluster at ``address`` (``auto``: the one this machine belongs to).

    A task that dies with its node is started again on another one. All nodes must see the inputs and the folder under
    the same paths (a shared file system), and have this package installed. A unit done twice leaves the same bytes, so
    a node that was only believed dead does no harm.
    """

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
        self._task = ray.remote(num_cpus=1, max_retries=RETRIES)(_do_on_ray)

    def run(self, method: Method, units: Iterable[Unit], *arguments: Any) -> Iterator[Any]:
        """See :class:`Executor`."""
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
                self._on_text(new_text_bytes(result))
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


def new_text_bytes(result: Signed | UnitResult) -> int:
    """Bytes of text that were read for a result of :class:`Worker`, none if it was found finished."""
    if isinstance(result, Signed):
        return result.text_bytes
    return 0 if result.reused else result.text_bytes


def use_threads(threads: int) -> None:
    """How many threads the tokenizers library starts; to be called before its first use in a process."""
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"


_worker: Worker | None = None


class _Stopped(Exception):
    """The run ended elsewhere."""


def _start(context: Context, threads: int, stop: Any) -> None:
    """Set a process up."""
    global _worker
    use_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    die_with_parent()

    def on_text(size: int) -> None:
        if stop.value:
            raise _Stopped

    _worker = context.worker(on_text)


def _load() -> None:
    """What a unit needs before its first text."""
    import pyarrow  # noqa: F401

    assert _worker is not None
    _worker.load()


def _do(method: Method, unit: Unit, *arguments: Any) -> Any:
    assert _worker is not None
    return getattr(_worker, method)(unit, *arguments)


_workers: dict[tuple[str, str], Worker] = {}  # Ray uses a process for many tasks


def _do_on_ray(context: Context, method: Method, unit: Unit, *arguments: Any) -> Any:
    use_threads(1)
    key = (str(context.folder), context.decisions)
    if key not in _workers:
        _workers[key] = Worker(context)
    return getattr(_workers[key], method)(unit, *arguments)
