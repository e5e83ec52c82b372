"""A run folder that explains itself: what each file is, and on what machine and code every start was made."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.files import write_atomic
from pretrain.checkpoint.commit import TrainState
from pretrain.machine import environment

if TYPE_CHECKING:
    from pretrain.distributed.world import World

STARTS = "starts.jsonl"
LOGS = "logs"
"""A folder for each launch that keeps a log for each rank."""
README = """\
This folder is a training run of nystrom. What is in it, as far as the run got and was asked to:

config.yaml       the configuration with nothing left open; `nystrom train --config config.yaml` resumes the run
deepspeed.json    what DeepSpeed was given
environment.json  machine, versions, code and command of the last start; starts.jsonl has those of every start
init_from.json    with init_from: where the first weights are from, and what became of each tensor
metrics.jsonl     every number of the training, a JSON object a line: kind "train", "valid" or "event"
status.json       how the last start ended, or that it is running
logs/             of starts on several nodes or with --rank-logs: a folder for each, with a log for each rank;
                  slurm-JOB.log of Slurm's jobs
slurm/            the batch files of `nystrom launch slurm`; submitted again, train.sbatch resumes the run
run.lock          who trains in this folder now; removed at the end. `nystrom launch stop THIS_FOLDER` stops it
checkpoints/      weights, optimizer and position, to resume from; only a folder with a manifest.json is whole.
                  zero_to_fp32.py and zero_to_torch.py in it are DeepSpeed's; nothing here needs them
export/           the weights alone, float32, when the run is done; `nystrom eval` takes this folder or the run's
export-ema/       the same of their running average, if the run kept one
tokenizer/        the tokenizer of the data
samples/          texts that a causal model wrote at each validation
bad_steps/        batches of steps that were skipped: loss or gradient not finite; `nystrom replay FOLDER` reads them
spikes/           batches of steps whose loss was out of line with those before
profile/          traces by torch's profiler, for Perfetto, each with a table of the slowest operators
wandb/            a part of one run of Weights & Biases for each start; `wandb sync THIS_FOLDER/wandb` joins them
tensorboard/      event files; `tensorboard --logdir` shows them

The report of a run, or of several side by side: nystrom report THIS_FOLDER --out report.html
"""


def write_readme(run_dir: Path) -> None:
    """Write the run folder's README.txt."""
    write_atomic(run_dir / "README.txt", README.encode())


def write_start(run_dir: Path, world: World, state: TrainState) -> None:
    """Write ``environment.json`` of this start, and append it to ``starts.jsonl`` with where the run stood."""
    facts = environment(world)
    write_atomic(run_dir / "environment.json", (json.dumps(facts, indent=2, default=str) + "\n").encode())
    start = {"time": round(time.time(), 3), "step": state.step, "tokens": state.tokens, **facts}
    with open(run_dir / STARTS, "a", encoding="utf-8") as stream:
        stream.write(json.dumps(start, default=str) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
