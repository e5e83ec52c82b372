"""How long the demo will take on this machine, from a measurement of seconds before it starts.

Run as a program it measures and prints one line of JSON; :func:`measure` does that in a process of its own, so that the
demo itself stays free of torch. What a step takes is modelled as starting programs (imports, which the measurement
times), training tokens (of the demo's causal model, which it trains for a moment), and what no measurement scales.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.processes import available_cores

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "demo-clm.yaml"
VOCAB_SIZE = 4096
MEASURED_SECONDS = 2.0
"""Of training, after a first step that fills caches."""


@dataclass(frozen=True)
class Cost:
    """What a step of the demo takes on any machine."""

    starts: float
    """Times that the imports of training are waited for."""
    tokens: int
    """Work, in tokens of training the causal model by all processes together."""
    seconds: float = 0.0
    """Everything else, where it was timed: optimizers, many small passes, files."""


@dataclass(frozen=True)
class Speed:
    """What was measured here."""

    import_seconds: float
    tokens_per_second: float
    """Of training, one process."""
    precision: str
    threads: int
    """Of that process."""

    def seconds(self, cost: Cost, processes: int) -> float:
        """How long a step of this cost takes on so many processes."""
        together = self.tokens_per_second * min(processes, available_cores())
        return cost.starts * self.import_seconds + cost.seconds + cost.tokens / together


def duration(seconds: float) -> str:
    """Half minutes from two minutes on: an estimate is not more exact."""
    if seconds < 120:
        return f"{max(10, round(seconds, -1)):.0f} seconds"
    return f"{round(seconds / 30) / 2:g} minutes"


def measure(processes: int) -> Speed | None:
    """The speed of one of so many processes; None if it could not be measured, which the first step will explain."""
    command = [sys.executable, "-m", "launch.demo_estimate", str(max(1, available_cores() // processes))]
    root = str(Path(__file__).resolve().parent.parent)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), root]))}
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=True)
        return Speed(**json.loads(done.stdout.splitlines()[-1]))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError, TypeError):
        return None


def _measure_here(threads: int) -> Speed:
    began = time.perf_counter()
    import torch

    from pretrain.config import load_config
    from pretrain.engine.training import import_deepspeed
    from pretrain.model.transformer import build_model
    from pretrain.precision import fast_precision

    import_deepspeed()
    import_seconds = time.perf_counter() - began
    torch.set_num_threads(threads)
    config = load_config(CONFIG)
    stage = config.curriculum[0]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = fast_precision(device)
    model = build_model(config.model.model_copy(update={"vocab_size": VOCAB_SIZE})).to(device)
    if precision == "bf16":
        model.bfloat16()
    ids = torch.randint(0, VOCAB_SIZE, (stage.micro_batch, stage.seq_len), device=device)

    def step() -> None:
        out = model(ids, labels=ids.roll(-1, 1))
        loss = out.loss_sum / out.num_targets
        loss.backward()
        model.zero_grad()
        loss.item()  # a GPU has done the step when it answers

    step()
    # The fastest step: beside a test run the mean said 13 minutes of a demo that then took half of that.
    best, until = float("inf"), time.perf_counter() + MEASURED_SECONDS
    while (began := time.perf_counter()) < until:
        step()
        best = min(best, time.perf_counter() - began)
    return Speed(import_seconds, ids.numel() / best, precision, threads)


if __name__ == "__main__":
    print(json.dumps(_measure_here(int(sys.argv[1])).__dict__))
