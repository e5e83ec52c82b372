"""``nystrom`` and ``python`` of the pages' commands, which cost a fork in place of seconds of imports.

A server imports torch, DeepSpeed and the others once. Programs ``nystrom``, ``python``, ``deepspeed``, ... in a folder
that comes first in ``PATH`` hand it their words, working directory, environment and streams through a socket; it forks,
and they answer with the status of the fork. A launcher starts its own processes by ``sys.executable``, so theirs are
forks too. Signals are passed on, and the end of such a program ends its fork.
Run as a program, this file is the server.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
PROGRAMS = {
    "nystrom": ["-m", "launch.program"],
    "deepspeed": ["-m", "deepspeed.launcher.runner"],
    "torchrun": ["-m", "torch.distributed.run"],
    "lm_eval": ["-m", "lm_eval"],
    "python": [],
    "python3": [],
}
IMPORTED = (
    "torch._dynamo multiprocessing.spawn deepspeed deepspeed.runtime.engine deepspeed.runtime.zero.muon.muon_optimizer "
    "deepspeed.utils.zero_to_fp32 deepspeed.launcher.runner deepspeed.launcher.launch torch.distributed.run datasets "
    "tokenizers safetensors.torch sklearn.linear_model sklearn.feature_extraction.text scipy.stats transformers "
    "matplotlib.pyplot jinja2 pandas wandb data_pipeline.cli data_pipeline.prepare.run "
    "data_pipeline.tokenization.training pretrain.trainer pretrain.run pretrain.cli pretrain.describe pretrain.init "
    "pretrain.config.cli pretrain.planning.cli pretrain.model.transformer pretrain.model.generation "
    "pretrain.convert.cli pretrain.convert.push eval.cli eval.runner eval.report.cli eval.shell.generate "
    "eval.shell.fill launch.cli launch.init launch.demo"
)
"""``multiprocessing.spawn`` remembers the true Python, for children of its own."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
here = os.path.dirname(os.path.abspath(sys.argv[0]))
server = socket.socket(socket.AF_UNIX)
server.connect(here + "/socket")
request = dict(words={words!r} + sys.argv[1:], folder=os.getcwd(), environment=dict(os.environ))
request["ignored"] = [n for n in {signals} if signal.getsignal(n) == signal.SIG_IGN]
body = json.dumps(request).encode()
socket.send_fds(server, [len(body).to_bytes(4, "big")], [0, 1, 2])
server.sendall(body)
for number in {signals}:
    if number not in request["ignored"]:
        signal.signal(number, lambda number, frame: server.send(bytes([number])))
status = int.from_bytes(server.recv(4), "big", signed=True)
if status < 0:
    signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
sys.exit(status)
"""
"""A signal that arrives before its handler ends this program, and so its fork."""


@contextlib.contextmanager
def programs(environment: Mapping[str, str], scale: str = "") -> Iterator[Path]:
    """A folder for ``PATH`` with the programs, whose server runs as long as the context.

    ``scale`` names a function ``module:name``, which gets the words of each command (``["-m", "pretrain", ...]``) and
    returns those that are run.
    """
    folder = Path(tempfile.mkdtemp(prefix="pages-"))  # short, since a socket's path must be
    for name, words in PROGRAMS.items():
        numbers = [int(number) for number in SIGNALS]
        (folder / name).write_text(CLIENT.format(python=sys.executable, words=words, signals=numbers))
        (folder / name).chmod(0o755)
    server = subprocess.Popen(
        [sys.executable, __file__, str(os.getpid()), str(folder), scale],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == b"ready\n", "the server of the pages' commands died"
        yield folder
    finally:
        server.terminate()
        server.wait()
        shutil.rmtree(folder)


class _Server:
    """One thread: torch's own must not run when it forks."""

    def __init__(self, folder: Path, scale: str) -> None:
        self.folder = folder
        self.scale = None
        if scale:
            module, _, name = scale.partition(":")
            self.scale = getattr(importlib.import_module(module), name)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(folder / "socket"))
        self.listener.listen(64)
        self.connections: dict[socket.socket, int] = {}
        self.selector = selectors.DefaultSelector()
        self.ended, self.writer = socket.socketpair()
        self.ended.setblocking(False)
        self.writer.setblocking(False)
        signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        self.own = [self.listener, self.ended, self.writer]
        for waited in (self.listener, self.ended):
            self.selector.register(waited, selectors.EVENT_READ)

    def serve(self) -> None:
        while True:
            for key, _ in self.selector.select():
                ready = key.fileobj
                assert isinstance(ready, socket.socket)
                if ready is self.listener:
                    self.accept()
                elif ready is self.ended:
                    ready.recv(4096)
                    self.reap()
                elif ready in self.connections:
                    self.heard(ready)

    def accept(self) -> None:
        connection = self.listener.accept()[0]
        head, streams, _, _ = socket.recv_fds(connection, 4, 3)
        body = b""
        while len(body) < int.from_bytes(head, "big"):
            part = connection.recv(1 << 20)
            if not part:  # killed meanwhile
                connection.close()
                return
            body += part
        sys.stdout.flush()
        pid = os.fork()
        if not pid:
            run(json.loads(body), streams, [connection, *self.own, *self.connections], self.scale)
        for stream in streams:
            os.close(stream)
        self.connections[connection] = pid
        self.selector.register(connection, selectors.EVENT_READ)

    def heard(self, connection: socket.socket) -> None:
        """Signals to pass on, or the end of the program."""
        try:
            numbers = connection.recv(64)
        except OSError:
            numbers = b""
        with contextlib.suppress(ProcessLookupError):
            for number in numbers or [signal.SIGKILL]:
                os.kill(self.connections[connection], number)
        if not numbers:
            self.selector.unregister(connection)

    def reap(self) -> None:
        for connection, pid in list(self.connections.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                with contextlib.suppress(OSError):
                    connection.send(os.waitstatus_to_exitcode(status).to_bytes(4, "big", signed=True))
                with contextlib.suppress(KeyError):
                    self.selector.unregister(connection)
                connection.close()
                del self.connections[connection]


def run(request: dict[str, Any], streams: list[int], inherited: list[socket.socket], scale: Any) -> None:
    """Be the process that was asked for; never returns."""
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        for number in request["ignored"]:
            signal.signal(number, signal.SIG_IGN)
        server = os.getppid()
        os.setsid()
        for connection in inherited:
            connection.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False, buffering=1)
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["environment"])
        from data_pipeline.processes import die_with_parent

        die_with_parent(server)
        _execute(request["words"], scale)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as the end of Python does
        with contextlib.suppress(BaseException):
            atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)


def _execute(words: list[str], scale: Any) -> None:
    """What ``python *words`` does."""
    safe = False
    while words and words[0].startswith("-") and words[0] not in ("-m", "-c"):
        option = words.pop(0)
        safe = safe or option == "-P"
        if option == "-u":
            sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
    if words[:2] == ["-m", "data_pipeline.processes"]:
        words = ["-m", *words[4:]]  # it asks to end with its parent, which our client is: its end is ours
    if not words:
        words = ["-c", sys.stdin.read()]
    if scale is not None:
        words = scale(words)
    kind = words[0] if words[0] in ("-m", "-c") else ""
    first = os.getcwd() if kind else str(Path(words[0]).resolve().parent)
    own = {str(REPOSITORY), str(REPOSITORY / "tests")}
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = [*([] if safe else [first]), *filter(None, paths), *(path for path in sys.path if path not in own)]
    if kind == "-m":
        sys.argv = words[1:]
        if not hasattr(sys.modules.get(words[1]), "__path__"):
            sys.modules.pop(words[1], None)  # imported here as another module's part
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def _main() -> None:
    from data_pipeline.processes import die_with_parent

    parent, folder, scale = sys.argv[1:]
    die_with_parent(int(parent))
    import torch

    from pretrain.engine.training import import_deepspeed

    torch.set_num_threads(1)
    import_deepspeed()
    for name in IMPORTED.split():
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    sys.executable = str(Path(folder) / "python")
    server = _Server(Path(folder), scale)
    print("ready", flush=True)
    server.serve()


if __name__ == "__main__":
    sys.path[:] = [str(REPOSITORY), str(REPOSITORY / "tests"), *sys.path[1:]]
    _main()
