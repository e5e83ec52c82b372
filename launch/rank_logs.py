"""One log file for each rank, and the first error among them."""

from __future__ import annotations

import contextlib
import re
import socket
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, TextIO

from data_pipeline.errors import UserError
from pretrain.telemetry.folder import LOGS

SLURM_JOB = "slurm.job"
"""In the folder of logs: the number of a Slurm job that was submitted. One that waits has left no other trace."""
LAST_LINES = 30
LAST_WORDS = 5
_ONLY_LOST_A_PEER = ("another process of this run went away", "a collective operation failed, most likely since")
_SILENT = "(it ended without a word, as after kill -9 or where memory ran out; its last lines follow)"
_ERROR = re.compile(
    r"[Ee]rror:|^Traceback |process \d+ failed:|stalled: |has not been heard of|Fatal Python error|did not come within"
)


class RankError(NamedTuple):
    """What a rank's log says went wrong."""

    rank: int
    path: Path
    lines: list[str]


def log_path(folder: Path, rank: int) -> Path:
    """The file of one rank in the folder of a launch."""
    return folder / f"rank-{rank}.log"


def rank_logs(folder: Path) -> dict[int, Path]:
    """The log files of a launch by rank."""
    found = {}
    for path in folder.glob("rank-*.log"):
        with contextlib.suppress(ValueError):
            found[int(path.stem.removeprefix("rank-"))] = path
    return dict(sorted(found.items()))


def newest_launch(run_dir: Path) -> Path | None:
    """The log folder of the run's newest launch; None for none."""
    with contextlib.suppress(OSError):
        folders = [path for path in (run_dir / LOGS).iterdir() if path.is_dir()]
        return max(folders, key=lambda path: path.stat().st_mtime, default=None)
    return None


def newest_slurm_job(run_dir: Path, launch_id: str | None = None) -> str | None:
    """The newest job of a run: its log, the launch's name, or, of one that never ran, ``logs/slurm.job``."""
    names = [launch_id or ""]
    with contextlib.suppress(OSError):
        names += [path.name for path in (run_dir / LOGS).glob("slurm-*.log")]
    with contextlib.suppress(OSError, UnicodeDecodeError):
        names.append(f"slurm-{(run_dir / LOGS / SLURM_JOB).read_text().strip()}-")
    jobs = [int(found[1]) for name in names if (found := re.match(r"slurm-(\d+)[-.]", name))]
    return str(max(jobs)) if jobs else None


def first_error(folder: Path) -> RankError | None:
    """The error that came first in the logs of a launch; None if no log has one.

    A rank that only lost a peer is named last. Among the others the one whose log ended first counts: the rest end
    because of it. Where all that say something lost a peer, it is one that says nothing.
    """
    found, silent = [], []
    for rank, path in rank_logs(folder).items():
        with contextlib.suppress(OSError):
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            begin = next((i for i, line in enumerate(lines) if _ERROR.search(line)), None)
            lost = next((i for i, line in enumerate(lines) if any(sign in line for sign in _ONLY_LOST_A_PEER)), None)
            if begin is not None and (lost is None or begin < lost):
                found.append((False, path.stat().st_mtime, RankError(rank, path, lines[begin:][:LAST_LINES])))
            elif lost is not None:
                found.append((True, path.stat().st_mtime, RankError(rank, path, lines[lost:][:LAST_LINES])))
            else:
                silent.append(RankError(rank, path, [_SILENT, *lines[-LAST_WORDS:]]))
    first = min(found, key=lambda each: each[:2], default=None)
    if first is None:
        return None
    only_lost, _, error = first
    return silent[0] if only_lost and silent else error


def print_first_error(folder: Path) -> None:
    """Say which rank failed first, of all nodes that share the run folder, and show the lines."""
    error = first_error(folder)
    if error is None:
        return
    lines = "\n".join(f"  {line}" for line in error.lines)
    with contextlib.suppress(OSError):  # of a terminal that is gone
        said = f"the first error is that of rank {error.rank} ({error.path})"
        print(f"\nnystrom launch: {said}:\n{lines}", file=sys.stderr, flush=True)


def make_folder(folder: Path) -> None:
    """Make the folder of a launch's logs; raises :class:`UserError` where it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made on {socket.gethostname()}: {error.strerror or error}") from None


class Followers:
    """Copies what the ranks of this node write into their files to one stream, line by line.

    Lines of rank 0 stand as they are; those of another rank begin with ``[rank N]``.
    """

    def __init__(self, folder: Path, ranks: Iterable[int], stream: TextIO | None = None) -> None:
        self._folder = folder
        self._read = dict.fromkeys(ranks, 0)
        self._rest = dict.fromkeys(self._read, b"")
        self._stream = stream if stream is not None else sys.stdout

    def copy(self) -> None:
        """Copy the whole lines that came since the last call."""
        for rank, position in self._read.items():
            path = log_path(self._folder, rank)
            if position == 0 and not path.exists() and not self._adopt(rank, path):
                continue
            try:
                with open(path, "rb") as log:
                    log.seek(position)
                    new = log.read()
            except OSError:
                continue
            self._read[rank] = position + len(new)
            *lines, self._rest[rank] = (self._rest[rank] + new).split(b"\n")
            self._write(rank, lines)

    def finish(self) -> None:
        """Copy all that is left."""
        self.copy()
        for rank, rest in self._rest.items():
            if rest:
                self._write(rank, [rest])
                self._rest[rank] = b""

    def _adopt(self, rank: int, path: Path) -> bool:
        """Give the file that DeepSpeed's launcher opened for this rank the name without a date."""
        for found in self._folder.glob(f"*_rank{rank}.log"):
            with contextlib.suppress(OSError):
                found.rename(path)
                return True
        return False

    def _write(self, rank: int, lines: Iterable[bytes]) -> None:
        prefix = "" if rank == 0 else f"[rank {rank}] "
        with contextlib.suppress(OSError, ValueError):  # whoever read it is gone
            for line in lines:
                self._stream.write(f"{prefix}{line.decode('utf-8', 'replace')}\n")
            self._stream.flush()
