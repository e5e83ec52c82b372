"""Looking after the processes that DeepSpeed's launcher starts on one machine, with its gaps closed.

What it does alone (0.19.8): SIGTERM to it ends it at once and orphans the workers, which never hear of it; when its
middle process dies, it exits 0 with the workers still running. So here it runs in a session of its own, signals go to
the workers themselves, nothing is over before the last of them is gone, and success is what the run wrote about itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from launch.restarts import last_line
from pretrain.distributed.signals import EXIT_PREEMPTED, LAUNCHER_PID, stop_signals
from pretrain.finish import LAUNCH_ID, STATES, STATUS
from pretrain.telemetry.lines import write_or_warn

POLL_SECONDS = 0.2
LOOK_SECONDS = 2.0
"""Between two looks at the processes while all is well: each reads the machine's whole list of them."""
LOSS_SECONDS = 45.0
"""How long the others may outlive the first process that ended, before they are killed."""
SHARED_MEMORY = Path("/dev/shm")
REPOSITORY = Path(__file__).resolve().parent.parent
_PR_SET_CHILD_SUBREAPER = 36


def look_after(
    runner: subprocess.Popen[bytes],
    launch_id: str,
    request: StopRequest,
    stop_timeout: float,
    each_poll: Callable[[], None] = lambda: None,
) -> int:
    """Wait until all processes of a launch are gone; returns the status of DeepSpeed's launcher, ``runner``.

    Once ``request`` was asked to stop, each training process gets SIGTERM and ``stop_timeout`` seconds to save; then
    all is killed. ``each_poll`` is called every :data:`POLL_SECONDS`.
    """
    watch = _Watch(launch_id, runner)
    ending: float | None = None
    while runner.poll() is None or watch.alive():
        each_poll()
        if ending is None and (request.number is not None or runner.poll() is not None):
            # Asked to stop, or the launcher is gone and workers are not.
            ending = time.monotonic()
        if ending is not None:
            watch.signal_workers(signal.SIGTERM)
        grace = stop_timeout if request.grace is None else min(stop_timeout, request.grace)
        if ending is not None and time.monotonic() > ending + grace:
            watch.kill_all(f"{grace:g} s after SIGTERM")
        elif watch.seconds_since_a_loss() > LOSS_SECONDS:
            watch.kill_all(f"{LOSS_SECONDS:g} s after another one ended")
        time.sleep(POLL_SECONDS)
    each_poll()
    return runner.wait()


def count_gpus() -> int:
    """GPUs that this process may use, without importing torch: CUDA_VISIBLE_DEVICES, else the device files."""
    visible = visible_devices()
    return len(visible) if visible is not None else len(list(Path("/dev").glob("nvidia[0-9]*")))


class StopRequest:
    """Remembers that it was asked to stop while it is installed; not SIGHUP under ``nohup``, which ignores it."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.grace: float | None = None
        """Seconds from SIGTERM to SIGKILL where they are to be fewer than usual."""
        self._before = {number: signal.signal(number, self._on_signal) for number in stop_signals()}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.number = number

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class _Watch:
    """The processes of one launch, recognised by its id in their environment, wherever in the tree they are."""

    def __init__(self, launch_id: str, runner: subprocess.Popen[bytes]) -> None:
        self._launch_id, self._runner = launch_id, runner
        self._seen: set[int] = set()
        self._signalled: set[int] = set()
        self._ranks, self._looked_at = 0, 0.0
        self._lost_at: float | None = None
        self._killed = False

    def alive(self) -> list[psutil.Process]:
        """All that have not ended; reaps those that were orphaned to us."""
        self._runner.poll()
        found = []
        for process in psutil.Process().children(recursive=True):
            try:
                if process.status() == psutil.STATUS_ZOMBIE:
                    if process.pid in self._seen and process.ppid() == os.getpid():
                        os.waitpid(process.pid, os.WNOHANG)
                elif process.environ().get(LAUNCH_ID) == self._launch_id:
                    found.append(process)
                    if process.pid != self._runner.pid:
                        self._seen.add(process.pid)
            except (psutil.Error, ChildProcessError):
                continue
        return found

    def seconds_since_a_loss(self) -> float:
        """How long there have been fewer training processes than there were, but still some; 0 for no loss.

        No run goes on without one of them. DeepSpeed's launcher gives each of the others 30 s after SIGTERM, one after
        another, and all of them may be deaf to it.
        """
        now = time.monotonic()
        if now - self._looked_at >= LOOK_SECONDS:
            self._looked_at = now
            ranks = len(self._workers())
            self._ranks = max(self._ranks, ranks)
            self._lost_at = (self._lost_at or now) if 0 < ranks < self._ranks else None
        return 0.0 if self._lost_at is None else now - self._lost_at

    def _workers(self) -> list[psutil.Process]:
        """The training processes, and not what they started."""
        return [process for process in self.alive() if _is_rank(process) and not _is_rank(process.parent())]

    def signal_workers(self, number: int) -> None:
        """Signal each training process once, also those that appear later: a launch takes seconds to start them.

        Not what they started: a tracker's helper must live to write its files.
        """
        for process in self._workers():
            if process.pid in self._signalled:
                continue
            self._signalled.add(process.pid)
            try:
                process.send_signal(number)
            except psutil.Error:
                continue

    def kill_all(self, when: str) -> None:
        """SIGKILL to everything; says so the first time."""
        if not self._killed:
            with contextlib.suppress(OSError):  # of a terminal that is gone: all are killed nevertheless
                print(f"processes still there {when} are killed", file=sys.stderr, flush=True)
        self._killed = True
        for process in self.alive():
            try:
                process.kill()
            except psutil.Error:
                continue


def _is_rank(process: psutil.Process | None) -> bool:
    try:
        return process is not None and "RANK" in process.environ()
    except psutil.Error:
        return False


def exit_status(runner_code: int, run_dir: Path, launch_id: str, asked: bool = False, *, corrects: bool = True) -> int:
    """The status that the run wrote for this launch; else the launcher's, never 0 for a run without a final word.

    ``asked``: the launch was asked to stop; then a process that SIGTERM killed had not come to the point of listening.
    ``corrects``: write into ``status.json`` what became of a run that could not say so itself.
    """
    status = read_status(run_dir)
    ours = status.get("launch_id") == launch_id
    if ours and isinstance(status.get("code"), int):
        return int(status["code"])
    code = _unreported_status(runner_code, asked)
    if ours and corrects:
        # The process that writes it was killed: nobody else would correct "running".
        state = STATES.get(code, "killed" if code > 128 else "crashed")
        where = {key: value for key, value in last_line(run_dir).items() if key in ("step", "tokens")}
        ended = {"state": state, "code": code, **where, "time": time.time(), "written_by": "launcher"}
        write_or_warn(run_dir / STATUS, (json.dumps({**status, **ended}, indent=2) + "\n").encode())
    return code


def _unreported_status(runner_code: int, asked: bool) -> int:
    """What to make of the status of DeepSpeed's launcher where the run has not said how it ended."""
    # DeepSpeed exits with -N, modulo 256, for a worker killed by signal N.
    if runner_code < 0 or runner_code > 128 + 64:
        number = -runner_code if runner_code < 0 else 256 - runner_code
        if asked and number == signal.SIGTERM:
            with contextlib.suppress(OSError):
                print("stopped while starting; the same command resumes", file=sys.stderr)
            return EXIT_PREEMPTED
        print(
            f"a process was killed by signal {number} ({_signal_name(number)}); the run is not finished",
            file=sys.stderr,
        )
        return 128 + number
    if runner_code == 0:
        print("the launcher ended without an error, but the run did not finish", file=sys.stderr)
        return 1
    return runner_code


def read_status(run_dir: Path) -> dict[str, Any]:
    """The ``status.json`` of a run folder; {} for none that can be read."""
    try:
        status = json.loads((run_dir / STATUS).read_text())
        return status if isinstance(status, dict) else {}
    except (OSError, ValueError):
        return {}


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"


def environment(launch_id: str) -> dict[str, str]:
    """The environment of a launcher that this process starts and looks after."""
    env = dict(os.environ)
    env[LAUNCH_ID], env[LAUNCHER_PID] = launch_id, str(os.getpid())
    # Children look for ninja and each other's programs beside this Python, also when its environment is not activated.
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)])
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [env.get("PYTHONPATH"), str(REPOSITORY)]))
    if visible_devices() is not None:
        del env["CUDA_VISIBLE_DEVICES"]  # said through --include; DeepSpeed would ignore it with a warning
    if count_gpus() == 0 and not Path("/dev/kfd").exists():
        env.setdefault("DS_ACCELERATOR", "cpu")  # else each of its processes warns that it found no GPU
    return env


def visible_devices() -> list[str] | None:
    """GPU numbers of CUDA_VISIBLE_DEVICES; None if it is unset, empty, or not a plain list of numbers."""
    parts = [part.strip() for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    return parts if all(part.isdigit() for part in parts) else None


def become_subreaper() -> None:
    """Have orphans of this launch become our children instead of init's, so that none gets away (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def remove_shared_memory(port: int) -> None:
    """Remove what DeepSpeed's shared-memory operator would leave (named by user and port; 69 MB a process)."""
    for path in SHARED_MEMORY.glob(f"deepspeed_*_{os.getuid()}_*_{port}*"):
        path.unlink(missing_ok=True)
