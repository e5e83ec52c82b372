"""Files written by many processes at once, where a full disk on one must not leave the others waiting for it.

DeepSpeed's ``save_checkpoint`` has collectives between its files. A process that raises in the middle of it never
reaches them, and the others wait until their time-out (30 minutes). So here a failed write is remembered and the rest
of that save runs without writing; the failure comes out when the collectives are over.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast


class Writes:
    """The files that one process writes for one checkpoint, and the first error of any of them."""

    def __init__(self) -> None:
        self.failure: OSError | None = None

    def attempt(self, action: Callable[[], Any]) -> None:
        """Call ``action`` unless something failed before; keeps an ``OSError``."""
        if self.failure is None:
            try:
                action()
            except OSError as error:
                self.failure = self.failure or error  # closing the file after a failed write fails again

    def save(self, value: Any, path: Path, **options: Any) -> None:
        """``torch.save(value, path, **options)``, durable when it returns.

        Through a stream of our own: PyTorch's own writer loses the reason (a full disk is "unexpected pos 704 vs 662").
        Ours costs no time: both take 1.0 s for 400 MB. The descriptor that wrote is also the one that is synced. There
        the system reports what went wrong after the write was accepted, such as the full quota of a network file
        system.
        """
        import torch

        def write() -> None:
            with open(path, "wb") as file:
                torch.save(value, cast("IO[bytes]", _Stream(self, file)), **options)
                if self.failure is None:
                    file.flush()
                    os.fsync(file.fileno())

        self.attempt(write)
        if self.failure is not None and self.failure.filename is None:
            self.failure.filename = str(path)

    @contextmanager
    def replace(self, engine: Any) -> Iterator[None]:
        """Have DeepSpeed's engine write its files through this object while it saves."""
        checkpoint_engine = engine.checkpoint_engine
        zipped = getattr(checkpoint_engine, "zipfile_serialization", True)
        copy_script = engine._copy_recovery_script  # zero_to_fp32.py, by the first process alone, before a barrier
        checkpoint_engine.save = lambda state_dict, path: self.save(
            state_dict, Path(path), _use_new_zipfile_serialization=zipped
        )
        engine._copy_recovery_script = lambda folder: self.attempt(lambda: copy_script(folder))
        try:
            yield
        finally:
            del checkpoint_engine.save, engine._copy_recovery_script

    def check(self) -> None:
        """Raise the first error, if there was one."""
        if self.failure is not None:
            raise self.failure


class _Stream:
    """What ``torch.save`` writes to: after an error it takes everything and writes nothing.

    An exception must not pass through PyTorch's C++ writer, whose destructor would write again.
    """

    def __init__(self, writes: Writes, file: Any) -> None:
        self._writes, self._file = writes, file

    def write(self, data: Any) -> int:
        self._writes.attempt(lambda: self._file.write(data))
        return memoryview(data).nbytes

    def flush(self) -> None:
        self._writes.attempt(self._file.flush)
