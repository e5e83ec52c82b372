"""An estimate as a page to read, and as plain values for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from data_pipeline.units import format_bytes
from pretrain.planning.estimate import TRAINING, Estimate
from pretrain.planning.memory import StageMemory

UNITS = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}


def page(found: Estimate) -> str:
    """Some tens of lines."""
    return "\n".join([*_model(found), "", *_memory(found), "", *_fit(found), *_time(found), "", *_rest(found)])


def _model(found: Estimate) -> list[str]:
    config, model = found.config, found.config.model
    kind = {"mlm": "masked", "clm": "causal"}[model.objective]
    parts = ", ".join(f"{part} {count:,}" for part, count in found.parameters.items() if count)
    head = "shared with the embeddings" if model.tie_embeddings else "its own matrix"
    rows = [
        [
            f"{stage.seq_len:,}",
            f"{stage.steps:,}",
            f"{stage.tokens:,}",
            f"{stage.forward_flops / 1e9:.3g}",
            f"{TRAINING * stage.forward_flops / 1e9:.3g}",
            f"{stage.attention_share:.1%}",
        ]
        for stage in found.time
    ]
    columns = ["length", "steps", "tokens", "GFLOP/token forward", "training", "attention proper"]
    return [
        f"{config.name}: a {kind} {model.attention_label} model of {found.num_parameters:,} parameters",
        f"  {parts}; the head's words are {head}",
        f"  {model.num_layers} layers of {model.hidden_size}, {model.num_heads} heads, vocabulary {model.vocab_size:,}",
        "",
        *_table(columns, rows),
    ]


def _memory(found: Estimate) -> list[str]:
    config, question = found.config, found.question
    stages = found.memory
    checkpointing, other = ("on", "off") if config.activation_checkpointing else ("off", "on")
    where = "GPU" if question.on_gpu else "process"
    unit = _unit(max(stage.peak for stage in stages))
    out = [
        f"Memory of one {where} in {unit} ({question.gpus} of them, {found.precision}, "
        f"ZeRO stage {config.zero_stage}, "
        f"activation_checkpointing {checkpointing}, offload_optimizer {'on' if config.offload_optimizer else 'off'})"
    ]
    head = ["", *(f"{stage.seq_len:,} x {stage.micro_batch}" for stage in stages)]
    sizes = {
        "weights": [stage.state.weights for stage in stages],
        "gradients": [stage.state.gradients for stage in stages],
        "optimizer": [stage.state.optimizer for stage in stages],
        "inputs": [stage.inputs for stage in stages],
        **{f"kept: {part}": [stage.kept[part] for stage in stages] for part in stages[0].kept},
        "buffers and temporaries": [stage.transient + stage.state.buffers for stage in stages],
        "at its fullest": [stage.peak for stage in stages],
        f"with activation_checkpointing {other}": found.other_peaks,
    }
    rows = [
        [name, *(f"{size / UNITS[unit]:.2f}" if size else "0" for size in values)] for name, values in sizes.items()
    ]
    return [*out, *_table(head, rows)]


def _unit(largest: int) -> str:
    """GiB from 4 GiB on, MiB from 4 MiB on: in a larger unit most rows of a small model would read 0.00."""
    return next((name for name, size in UNITS.items() if largest >= 4 * size), "KiB")


def _fit(found: Estimate) -> list[str]:
    if found.limit is None:
        return []
    question = found.question
    held = "" if question.on_gpu else ", the libraries and what the C library holds on to"
    allowed = f"{format_bytes(found.limit)} ({question.gpu_memory:g} GiB less a margin of {question.margin:.0%}{held})"
    out = [f"It {'fits' if found.fits else 'does NOT fit'} in {allowed}."]
    if found.largest:
        rows = ", ".join(
            f"{rows} at {stage.seq_len:,}" for rows, stage in zip(found.largest, found.memory, strict=True)
        )
        out.append(f"  the largest micro_batch that fits: {rows}")
    if not found.fits and question.search:
        out += [
            f"  it would with --set {' '.join(change.overrides)}: {format_bytes(change.peak)} ({change.cost})"
            for change in found.changes
        ] or ["  no micro_batch, activation_checkpointing, zero_stage 3 or offload_optimizer makes it fit"]
    return [*out, ""]


def _time(found: Estimate) -> list[str]:
    question = found.question
    if found.seconds is None or found.gpu_hours is None or question.peak_flops is None:
        return [f"{found.training_flops:.3g} FLOP of training; for hours and cost give --gpu or --peak-flops."]
    speeds = ", ".join(f"{stage.tokens_per_second or 0:,.0f} at {stage.seq_len:,}" for stage in found.time)
    lines = [
        f"{found.training_flops:.3g} FLOP of training: {_duration(found.seconds)}, {found.gpu_hours:,.1f} GPU-hours, "
        f"if {question.mfu:.0%} of {question.peak_flops / 1e12:g} TFLOP/s are reached",
        f"  tokens/s: {speeds}",
    ]
    if question.price is not None:
        lines.append(f"  cost: {found.gpu_hours * question.price:,.2f} at {question.price:g} a GPU-hour")
    return lines


def _rest(found: Estimate) -> list[str]:
    config, question = found.config, found.question
    keep = config.checkpoint.keep_last
    why = "each builds the whole model in float32 first"
    if not question.on_gpu:
        why = "at its fullest, with the libraries and what the C library holds on to"
    lines = [
        f"{found.tokens:,} tokens, {found.tokens / found.num_parameters:.1f} for each parameter",
        f"{format_bytes(found.checkpoint_bytes)} a checkpoint; {keep} kept and one being written: "
        f"{format_bytes((keep + 1) * found.checkpoint_bytes)}",
        f"{format_bytes(found.host_bytes)} of host memory for a process ({why}), "
        f"{format_bytes(question.processes_per_node * found.host_bytes)} for {question.processes_per_node}",
    ]
    if found.data is None:
        lines.append("the shards of data.train are not there: nothing is said of epochs")
    else:
        lines.append(_reads(found.data["epochs"], found.data["tokens"]))
    return lines


def _reads(epochs: dict[str, float], tokens: int) -> str:
    """How often each source is read; ``tokens`` are those of all sources."""
    if len(epochs) == 1:
        return f"reads {next(iter(epochs.values())):.2f} times the {tokens:,} tokens of data.train"
    each = ", ".join(f"{name} {value:.2f} times" for name, value in epochs.items())
    return f"reads {each}; data.train has {tokens:,} tokens in all"


def as_dict(found: Estimate) -> dict[str, Any]:
    """Plain values; bytes, seconds, FLOPs."""
    return {
        "name": found.config.name,
        "precision": found.config.precision,
        "precision_why": found.precision,
        "question": asdict(found.question),
        "parameters": {"total": found.num_parameters, **found.parameters},
        "stages": [
            {
                **_stage(memory),
                "peak_with_the_other_activation_checkpointing": other,
                **asdict(time),
                "training_flops": TRAINING * time.forward_flops,
                "seconds": time.seconds,
            }
            for memory, other, time in zip(found.memory, found.other_peaks, found.time, strict=True)
        ],
        "fits": found.fits,
        "limit_bytes": found.limit,
        "largest_micro_batch": found.largest or None,
        "changes_that_fit": [asdict(change) for change in found.changes],
        "tokens": found.tokens,
        "tokens_per_parameter": found.tokens / found.num_parameters,
        "training_flops": found.training_flops,
        "seconds": found.seconds,
        "gpu_hours": found.gpu_hours,
        "cost": None
        if found.gpu_hours is None or found.question.price is None
        else found.gpu_hours * found.question.price,
        "checkpoint_bytes": found.checkpoint_bytes,
        "host_bytes_per_process": found.host_bytes,
        "data": found.data,
    }


def _stage(memory: StageMemory) -> dict[str, Any]:
    return {**asdict(memory), "activations": memory.activations, "transient": memory.transient, "peak": memory.peak}


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = []
    for first, *others in [head, *rows]:
        cells = [first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(others, widths[1:], strict=True))]
        lines.append("  " + "  ".join(cells))
    return lines


def _duration(seconds: float) -> str:
    hours = seconds / 3600
    return (
        f"{hours / 24:.1f} days" if hours >= 48 else f"{hours:.1f} hours" if hours >= 1 else f"{seconds / 60:.0f} min"
    )
