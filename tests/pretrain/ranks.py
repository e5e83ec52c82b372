"""Distributed tests that cost seconds: a server that has imported torch and DeepSpeed once and forks the processes.

``run_ranks(function, world_size, **kwargs)`` calls a top-level function of a test module in that many processes, with
the environment that a launcher would set. Run as a program, this file is the server.
"""

from __future__ import annotations

import atexit
import importlib.util
import inspect
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
_server: subprocess.Popen[str] | None = None


@dataclass(frozen=True)
class Ended:
    """How one process ended: its exit code (-N for signal N), what the function returned, and what it printed."""

    code: int
    value: Any
    output: str


def run_ranks(
    function: Callable[..., Any], world_size: int, *, timeout: float = 120, grace: float | None = None, **kwargs: Any
) -> list[Ended]:
    """Run ``function(**kwargs)`` (JSON values) in ``world_size`` processes.

    Those still there after ``timeout`` seconds, or ``grace`` seconds after the first has ended, are killed.
    """
    server = _start_server()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as out:
        request = {
            "script": inspect.getfile(function),
            "function": function.__name__,
            "kwargs": kwargs,
            "world_size": world_size,
            "port": port,
            "out": out,
            "timeout": timeout,
            "grace": grace,
        }
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        reply = server.stdout.readline()
        assert reply, "the server of forked ranks died"
        ended = []
        for rank, code in enumerate(json.loads(reply)):
            result = Path(out) / f"{rank}.pickle"
            value = pickle.loads(result.read_bytes()) if result.exists() else None
            ended.append(Ended(code, value, (Path(out) / f"{rank}.log").read_text(errors="replace")))
    return ended


def values(ended: list[Ended]) -> list[Any]:
    """What the processes returned; fails with their output if one did not end well."""
    for rank, end in enumerate(ended):
        assert end.code == 0, f"rank {rank} ended with {end.code}:\n{end.output}"
    return [end.value for end in ended]


def _start_server() -> subprocess.Popen[str]:
    global _server
    if _server is None or _server.poll() is not None:
        path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
        env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            env.pop(name, None)
        _server = subprocess.Popen(
            [sys.executable, __file__, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )
        atexit.register(_server.kill)
    return _server


def _serve() -> None:
    from data_pipeline.processes import die_with_parent

    die_with_parent(int(sys.argv[1]))  # a session of pytest that was killed has left ranks at work for minutes
    import torch

    from pretrain.engine.training import import_deepspeed

    torch.set_num_threads(1)
    import_deepspeed()
    # Everything that a run imports on the way: 10 s together, paid here once.
    for name in ("torch._dynamo", "deepspeed.runtime.zero.muon.muon_optimizer", "deepspeed.utils.zero_to_fp32",
                 "pytest", "pretrain.trainer", "pretrain.run",
                 "pretrain.cli", "pretrain.describe", "pretrain.model.transformer",
                 "pretrain.model.generation", "safetensors.torch", "safetensors.numpy"):  # fmt: skip
        importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        pids = [_fork(request, rank) for rank in range(request["world_size"])]
        codes: dict[int, int] = {}
        deadline = time.monotonic() + request["timeout"]
        while len(codes) < len(pids):
            for pid in pids:
                if pid not in codes:
                    done, status = os.waitpid(pid, os.WNOHANG)
                    if done:
                        codes[pid] = os.waitstatus_to_exitcode(status)
            if codes and request["grace"] is not None and deadline < float("inf"):
                deadline, request["grace"] = min(deadline, time.monotonic() + request["grace"]), None
            if time.monotonic() > deadline:
                for pid in set(pids) - set(codes):
                    os.kill(pid, signal.SIGKILL)
                deadline = float("inf")
            time.sleep(0.01)
        print(json.dumps([codes[pid] for pid in pids]), flush=True)


def _fork(request: dict[str, Any], rank: int) -> int:
    server, pid = os.getpid(), os.fork()
    if pid:
        return pid
    code = 1
    try:
        from data_pipeline.processes import die_with_parent

        die_with_parent(server)
        log = os.open(f"{request['out']}/{rank}.log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        world = str(request["world_size"])
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=world, LOCAL_SIZE=world)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(request["port"]))
        sys.path.insert(0, str(Path(request["script"]).parent))  # whose helpers the script imports
        spec = importlib.util.spec_from_file_location("rank_script", request["script"])
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["rank_script"] = module
        spec.loader.exec_module(module)
        value = getattr(module, request["function"])(**request["kwargs"])
        Path(request["out"], f"{rank}.pickle").write_bytes(pickle.dumps(value))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
