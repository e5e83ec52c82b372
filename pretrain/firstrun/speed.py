"""How fast this machine's CPUs train a model: FLOP/s of one process, measured while all of them compute.

One process alone would be too fast: its memory and, where two cores are threads of one, its core are its own then. So
as many processes as the run will have are started. Each gets a model as a line of JSON, prepares it, and measures when
all have answered.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

from data_pipeline.batches import IGNORE
from data_pipeline.errors import UserError
from data_pipeline.processes import child_command
from pretrain.model.config import ModelConfig

SECONDS = 2.0
"""Of measuring, after a first step that fills caches."""


class Measurer:
    """``processes`` processes of ``threads`` threads that measure together; a context manager."""

    def __init__(self, processes: int, threads: int) -> None:
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), root]))
        env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}
        self._workers = [
            subprocess.Popen(
                child_command("pretrain.firstrun.speed"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=env,
            )
            for _ in range(processes)
        ]

    def __enter__(self) -> Measurer:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.communicate()

    def flops(self, model: ModelConfig, rows: int, length: int) -> float:
        """FLOP/s of the slowest process in forward and backward passes over ``rows`` of ``length`` tokens.

        Raises :class:`UserError` where it can't be measured.
        """
        asked = json.dumps({"model": model.model_dump(mode="json"), "rows": rows, "length": length})
        try:
            self._tell(asked)
            self._answers()  # all are prepared
            self._tell("go")
            seconds = [float(answer) for answer in self._answers()]
        except (OSError, ValueError) as error:
            raise UserError(
                f"the speed of this machine could not be measured ({error}): give --peak-flops, of one "
                "process, and --mfu"
            ) from None
        from pretrain.model.flops import forward_flops_per_token

        return 3 * forward_flops_per_token(model, length) * rows * length / max(seconds)

    def _tell(self, line: str) -> None:
        for worker in self._workers:
            stream = _open(worker.stdin)
            stream.write(line + "\n")
            stream.flush()

    def _answers(self) -> list[str]:
        lines = [_open(worker.stdout).readline().strip() for worker in self._workers]
        if not all(lines):
            raise OSError("a process ended")
        return lines


def _open(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


def main() -> None:
    """The measuring process: models from standard input, ``ready`` and then seconds a step to standard output."""
    import torch

    from pretrain.model.transformer import build_model
    from pretrain.precision import fast_precision

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    precision = fast_precision(torch.device("cpu"))
    for line in sys.stdin:
        asked: dict[str, Any] = json.loads(line)
        config = ModelConfig(**asked["model"])
        model = build_model(config)
        if precision == "bf16":
            model.bfloat16()
        ids = torch.randint(0, config.vocab_size or 1, (asked["rows"], asked["length"]))
        labels = ids.roll(-1, 1)
        if config.objective == "mlm":
            labels = torch.where(torch.rand(ids.shape) < 0.15, ids, IGNORE)

        def step() -> None:
            out = model(ids, labels=labels)  # noqa: B023
            (out.loss_sum / out.num_targets).backward()
            model.zero_grad()  # noqa: B023

        step()
        print("ready", flush=True)
        if not sys.stdin.readline():
            return
        best, until = float("inf"), time.perf_counter() + SECONDS
        while (began := time.perf_counter()) < until:
            step()
            best = min(best, time.perf_counter() - began)
        print(best, flush=True)


if __name__ == "__main__":
    main()
