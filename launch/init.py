"""``nystrom init``: a first configuration for prepared text and a machine."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.command_line import Parser
from data_pipeline.console import say_loading, say_next
from data_pipeline.errors import UserError
from pretrain.planning.cli import DEFAULT_MFU

if TYPE_CHECKING:
    from pretrain.firstrun.choose import Choice
    from pretrain.firstrun.inputs import Corpus, Machine

LOCAL_GPUS = 8
"""Of one machine, where nothing else is known."""
MEASURED_SHAPE = (128, 4, 4)
"""Width, layers and heads of the first model that is measured; the chosen one follows."""
VOCABULARIES = ((5 << 20, 4096), (100 << 20, 8192), (1 << 30, 16_384))
"""Bytes of text below which so many tokens are proposed, as the demo and docs/ have them; else 32,768."""

BUSY = 0.75
"""Load for each core from which others are said to compute here."""

EXAMPLES = (
    ("nystrom init --data shards/train --valid shards/valid --out run.yaml", "this machine, one hour"),
    "nystrom init --data shards/train --valid shards/valid --out run.yaml --gpus 8 --gpu-memory 80 --hours 24",
    "nystrom init --data shards/train --out run.yaml --objective mlm --gpus 1 --gpu-memory 24 --gpu 4090",
)


def build_parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    parser = Parser(
        prog="nystrom init",
        description="Write a first configuration: size, length of the run, batch, lengths, learning rate and memory "
        "settings for this text and machine, each with its reason as a comment.",
        examples=EXAMPLES,
        epilog="The choices are rules with a source, written beside each key. They fit `nystrom plan`, and are a start "
        "to tune from.",
        exit_status={2: "a mistake in the command, or text, hours or memory that are too little for any run"},
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="training text: a folder of shards")
    parser.add_argument("--valid", type=Path, metavar="DIR", help="held-out text: a folder of shards")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the YAML to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the YAML if it is there")
    parser.add_argument("--objective", choices=["clm", "mlm"], default="clm", help="causal (default) or masked")
    parser.add_argument("--name", help="of the run (default: that of the file)")
    parser.add_argument("--hours", type=float, default=1.0, metavar="X", help="that the run may take (default: 1)")
    where = parser.add_argument_group("the machine (default: this one, its GPUs or else its CPUs, measured)")
    where.add_argument("--gpus", type=int, metavar="N", help="GPUs that the run will have, here or elsewhere")
    where.add_argument("--gpu-memory", type=float, metavar="GIB", help="of one of them")
    where.add_argument("--gpu", metavar="NAME", help="which one, for example H100 (default: a slow one of that memory)")
    where.add_argument("--cpu", action="store_true", help="this machine's CPUs, also where it has GPUs")
    where.add_argument("--nproc", type=int, metavar="N", help="processes on CPUs (default: one for each core)")
    where.add_argument(
        "--peak-flops", type=float, metavar="X", help="FLOP/s of one GPU or process (default: --gpu's, or measured)"
    )
    where.add_argument(
        "--mfu", type=float, metavar="X", help=f"share of the peak to count on (default: {DEFAULT_MFU}; CPUs: 1)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0."""
    import sys

    words = list(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(words)
    _check(args)
    _refuse_text(args, words)
    name = args.name or args.out.stem
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UserError(f"'{name}' can't name a run: give --name with letters, digits, '.', '_' and '-'")
    say_loading()
    from pretrain.firstrun.choose import choose
    from pretrain.firstrun.inputs import read_corpus
    from pretrain.firstrun.page import as_yaml, summary

    corpus = read_corpus(args.data, args.valid, args.objective)
    machine = _named_machine(args) or _this_machine(args)
    print("choosing size, batch and memory settings ...", file=sys.stderr, flush=True)
    if machine.flops:
        choice = choose(name, args.objective, corpus, machine)
    else:
        choice = _choose_measured(name, args.objective, corpus, machine)
    _write(args, as_yaml(choice, f"nystrom init {shlex.join(words)}"))
    print("\n".join([f"{args.out}: written, with the reason of each choice", *(f"  {x}" for x in summary(choice))]))
    run_dir = choice.config.run_dir
    if run_dir.exists():
        print(f"note: {run_dir} is there already, and a run of this name resumes it: --name gives another")
    if args.valid is None:
        print("note: without --valid there is no held-out loss, so nothing tells when the model begins to memorise")
    say_next(*next_commands(args.out, choice))
    return 0


def _check(args: argparse.Namespace) -> None:
    for option in ("gpus", "gpu_memory", "hours", "nproc", "peak_flops"):
        value = getattr(args, option)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"--{option.replace('_', '-')} {value}: must be a positive number")
    if args.mfu is not None and not 0 < args.mfu <= 1:
        raise UserError(f"--mfu {args.mfu}: must be above 0 and at most 1")
    if (args.gpus is None) != (args.gpu_memory is None):
        raise UserError("--gpus and --gpu-memory belong together: how many, and the GiB of one")
    if args.gpu is not None and args.gpus is None:
        raise UserError("--gpu names the kind of --gpus: say how many, and --gpu-memory")
    if args.gpus is not None and (args.cpu or args.nproc is not None):
        raise UserError("--cpu and --nproc are for this machine's CPUs, --gpus for GPUs: leave out one of them")
    if args.out.suffix not in (".yaml", ".yml"):
        raise UserError(f"--out {args.out}: name a file that ends in .yaml")
    if args.out.is_dir() or (args.out.exists() and not args.overwrite):
        raise UserError(f"{args.out} exists: name another --out, or replace it with --overwrite")


def _refuse_text(args: argparse.Namespace, words: Sequence[str]) -> None:
    """Raise :class:`UserError` with the commands that make shards, if the data is text."""
    from data_pipeline.shards.manifest import MANIFEST_FILE
    from data_pipeline.sources.corpus import open_corpus

    texts: dict[str, int] = {}
    for option in ("data", "valid"):
        path = getattr(args, option)
        if path is None or (path / MANIFEST_FILE).is_file():
            continue
        try:
            texts[option] = sum(file.bytes for file in open_corpus([path]).files)
        except UserError:
            if path.is_file():
                raise
            continue  # reading the shards tells what is wrong
    if not texts:
        return
    size = texts.get("data", 0)
    vocabulary = next((tokens for limit, tokens in VOCABULARIES if size < limit), 32_768)
    folders = {"data": "shards/train", "valid": "shards/valid"}
    commands, again = [], list(words)
    tokenizer = "tokenizer"
    if "data" in texts:
        commands.append(
            f"nystrom data tokenizer --input {shlex.quote(str(args.data))} --vocab-size {vocabulary} --out tokenizer"
        )
    else:
        tokenizer = str(args.data)  # shards carry theirs
    for option in texts:
        path = getattr(args, option)
        commands.append(
            f"nystrom data prepare --input {shlex.quote(str(path))} --tokenizer {shlex.quote(tokenizer)} "
            f"--out {folders[option]}"
        )
        again = [
            folders[option] if word == str(path) else word.replace(f"={path}", f"={folders[option]}") for word in again
        ]
    commands.append(f"nystrom init {shlex.join(again)}")
    what = " and ".join(str(getattr(args, option)) for option in texts)
    lines = "\n  ".join(commands)
    hint = (
        "\nKeep some documents in a file of their own, and prepare them in the same way for --valid: the held-out text"
    )
    hint = hint if args.valid is None else ""
    raise UserError(f"{what} is text, and a run reads shards. These commands come first:\n  {lines}{hint}")


def _named_machine(args: argparse.Namespace) -> Machine | None:
    """The GPUs that the options name; None if they name none."""
    from pretrain.firstrun.inputs import gpus

    if args.gpus is None:
        return None
    return gpus(args.gpus, args.gpu_memory, args.hours, args.mfu or DEFAULT_MFU, args.gpu, args.peak_flops)


def _this_machine(args: argparse.Namespace) -> Machine:
    """This machine's GPUs, or its CPUs with ``flops`` 0 where they are still to be measured."""
    import psutil
    import torch

    from data_pipeline.processes import available_cores
    from launch.doctor.machine import cpu_quota, memory_limit
    from pretrain.firstrun.inputs import Machine, gpus
    from pretrain.machine import PEAK_FLOPS

    if torch.cuda.is_available() and not args.cpu and args.nproc is None:
        count = torch.cuda.device_count()
        found = [torch.cuda.get_device_properties(i) for i in range(count)]
        name = next((known for known in PEAK_FLOPS if known in found[0].name), found[0].name)
        memory = min(each.total_memory for each in found) / 2**30
        return gpus(count, memory, args.hours, args.mfu or DEFAULT_MFU, name, args.peak_flops)
    processes = args.nproc or max(1, int(min(available_cores(), cpu_quota() or float("inf"))))
    free = min(psutil.virtual_memory().available, memory_limit() or float("inf")) / 2**30
    # Rounded down, so that the number that is shown is the one that was planned with.
    memory = int(10 * free / processes) / 10
    if args.peak_flops is not None:
        mfu = 1.0 if args.mfu is None else args.mfu
        return Machine(processes, memory, mfu * args.peak_flops, args.hours, False, "as given")
    return Machine(processes, memory, 0.0, args.hours, False, "measured here, all at once")


def _choose_measured(name: str, objective: str, corpus: Corpus, machine: Machine) -> Choice:
    """Measure a model, choose by its speed, and choose again by the speed of what was chosen."""
    from data_pipeline.processes import available_cores
    from pretrain.firstrun.choose import choose, training_model
    from pretrain.firstrun.rules import Shape
    from pretrain.firstrun.speed import Measurer

    cores, load = available_cores(), os.getloadavg()[0]
    print(f"Measuring the speed of {machine.processes} process(es) on this machine ...", flush=True)
    if load > BUSY * cores:
        print(
            f"note: others compute here (load {load:.1f} on {cores} cores): a quiet machine is faster, and gets a "
            "larger run"
        )
    threads = max(1, cores // machine.processes)
    with Measurer(machine.processes, threads) as measurer:
        first = training_model(Shape(*MEASURED_SHAPE), objective, corpus.vocab_size, 512)
        machine = replace(machine, flops=measurer.flops(first, 8, 512))
        choice = choose(name, objective, corpus, machine)
        stage = choice.config.curriculum[0]
        chosen = training_model(choice.draft.shape, objective, corpus.vocab_size, choice.draft.lengths[-1])
        machine = replace(machine, flops=measurer.flops(chosen, stage.micro_batch, stage.seq_len))
    return choose(name, objective, corpus, machine)


def _write(args: argparse.Namespace, text: str) -> None:
    """Write the YAML and the schema beside it; a file of another kind under the schema's name is left alone."""
    from data_pipeline.files import check_writable, write_atomic
    from pretrain.config.schema import TITLE, schema_text
    from pretrain.firstrun.page import SCHEMA_FILE

    schema = args.out.parent / SCHEMA_FILE
    if schema.exists():
        try:
            ours = json.loads(schema.read_text(encoding="utf-8")).get("title") == TITLE
        except (OSError, ValueError, AttributeError):
            ours = False
        if not ours:
            raise UserError(f"{schema} is not a schema that this program wrote, and would be replaced: move it away")
    check_writable(args.out)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(schema, schema_text().encode())
    write_atomic(args.out, text.encode())


def next_commands(out: Path, choice: Choice) -> list[list[str]]:
    """What comes after: the plan that the choice was checked with, and the run."""
    machine = choice.machine
    plan = ["plan", "--config", str(out), "--gpus", str(machine.processes), "--gpu-memory", f"{machine.memory:g}"]
    if not machine.on_gpu:
        plan += ["--cpu", "--peak-flops", f"{machine.flops:.3g}", "--mfu", "1"]
    elif machine.gpu is not None:
        plan += ["--gpu", machine.gpu]
    if machine.processes <= LOCAL_GPUS or not machine.on_gpu:
        return [plan, ["launch", "local", "--nproc", str(machine.processes), "--config", str(out)]]
    nodes, rest = divmod(machine.processes, LOCAL_GPUS)
    size = ["--nodes", str(nodes + bool(rest)), "--gpus-per-node", str(LOCAL_GPUS)]
    hours = max(1, -(-int(machine.hours * 60) // 60))
    return [plan, ["launch", "slurm", *size, "--time", f"{hours}:00:00", "--config", str(out)]]


if __name__ == "__main__":
    raise SystemExit(main())
