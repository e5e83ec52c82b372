"""A first configuration as YAML, with the reason of each choice as a comment."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

from data_pipeline.units import format_bytes
from pretrain.config.reference import value_text
from pretrain.firstrun import rules
from pretrain.firstrun.choose import LONG_RUN, USED, Choice, validations
from pretrain.firstrun.inputs import MARGIN

SCHEMA_FILE = "nystrom.schema.json"
"""Beside the YAML: a path that an editor finds without a network, on every machine that has both files."""
WIDTH = 110


def as_yaml(choice: Choice, command: str) -> str:
    """The file's text. ``command``: what it was made by. Reading it gives ``choice.config``."""
    config = choice.config
    data = config.data
    lines = [f"# yaml-language-server: $schema={SCHEMA_FILE}", *_head(choice, command)]
    lines += [f"name: {value_text(config.name)}", *_model(choice), "data:", f"  train: {value_text(data.train)}"]
    if data.valid is not None:
        lines += [f"  valid: {value_text(data.valid)}"]
    else:
        lines += _comment("no held-out text (valid: FOLDER): the loss is that of training only", "  ")
    lines += [*_curriculum(choice), *_batch(choice), *_precision(choice), *_memory(choice), *_optimizer(choice)]
    lines += [*_saving(choice)]
    return "\n".join(lines) + "\n"


def summary(choice: Choice) -> list[str]:
    """What the run comes to, in lines."""
    run, corpus, machine = choice.draft, choice.corpus, choice.machine
    steps, epochs = run.tokens // run.batch, run.tokens / corpus.tokens
    held = "" if corpus.held_out is None else f"; held out {corpus.held_out:,}"
    kind = "GPU" if machine.on_gpu else "process"
    ended = {"time": f"the {machine.hours:g} hours end it", "text": "the text ends it, not the time: more text helps"}
    return [
        f"text: {corpus.tokens:,} tokens in {corpus.documents:,} documents, vocabulary {corpus.vocab_size:,}{held}",
        f"machine: {machine.processes} {kind}{'' if machine.processes == 1 else 's' if machine.on_gpu else 'es'} of "
        f"{machine.memory:.3g} GiB, {machine.flops / 1e9:,.0f} GFLOP/s each ({machine.speed})",
        f"run: {_millions(run.shape.parameters(corpus.vocab_size))} parameters, {run.tokens:,} tokens "
        f"({epochs:.2g} epochs), {steps:,} steps, {duration(choice.seconds)} of training; "
        f"{ended[run.limited_by]}",
        f"memory: {format_bytes(choice.peak)} of a {kind} at its fullest, as `nystrom plan` says",
    ]


def duration(seconds: float) -> str:
    """Two digits in the unit that fits."""
    for unit, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.2g} {unit}"
    return "less than two minutes"


def _millions(count: float) -> str:
    size, unit = (count / 1e9, "billion") if count >= 1e9 else (count / 1e6, "million")
    return f"{size:.2g} {unit}" if size < 100 else f"{size:.0f} {unit}"


def _comment(text: str, indent: str = "") -> list[str]:
    start = f"{indent}# "
    return textwrap.wrap(text, WIDTH, initial_indent=start, subsequent_indent=start, break_on_hyphens=False)


def _head(choice: Choice, command: str) -> Iterator[str]:
    yield f"# Made by: {command}"
    for line in summary(choice):
        yield from _comment(line)
    yield from _comment(
        "These are rules of thumb and nothing was tuned. Sources: M = Muennighoff et al. 2023 (arXiv 2305.16264), "
        "D = DeepSeek LLM 2024 (arXiv 2401.02954). `nystrom config KEY` explains a key."
    )


def _number(value: Any) -> str:
    """Thousands separated, as the files in configs/ are."""
    return (
        f"{value:_}"
        if isinstance(value, int) and not isinstance(value, bool) and value >= 10_000
        else value_text(value)
    )


def _flow(values: dict[str, Any]) -> str:
    return "{" + ", ".join(f"{key}: {_number(value)}" for key, value in values.items()) + "}"


def _model(choice: Choice) -> Iterator[str]:
    run, corpus, model = choice.draft, choice.corpus, choice.config.model
    yield "model:"
    yield f"  objective: {model.objective}"
    per = run.tokens / run.shape.parameters(corpus.vocab_size)
    which = "the smallest of the table; it is" if run.shape == rules.SHAPES[0] else "the smallest"
    yield from _comment(
        f"size: {which} within {rules.CLOSE_ENOUGH:.0%} of the best loss that M predicts for this time and text; "
        f"{per:.2g} tokens a parameter (20 is the optimum where text and time allow it)",
        "  ",
    )
    if choice.passed_over:
        widths = ", ".join(f"{shape.hidden_size} x {shape.num_layers}" for shape in choice.passed_over)
        yield from _comment(f"larger ones do not fit the memory: {widths}", "  ")
    yield f"  hidden_size: {model.hidden_size}"
    yield f"  num_layers: {model.num_layers}"
    width = model.hidden_size // model.num_heads
    yield f"  num_heads: {model.num_heads} # {width} wide each"
    longest = run.lengths[-1]
    if model.objective == "mlm":
        why = (
            "as in the paper" if model.num_landmarks == 64 else "half of the paper's, for rows of fewer than 512 tokens"
        )
        yield f"  num_landmarks: {model.num_landmarks} # {why}"
    else:
        near = f"{model.segment_length * (model.window_segments - 1)} to {model.segment_length * model.window_segments}"
        yield from _comment(
            f"a token sees {near} tokens before it exactly, and a landmark for each {model.segment_length} before "
            f"those, in rows of up to {longest:,}",
            "  ",
        )
        yield f"  segment_length: {model.segment_length}"
        yield f"  window_segments: {model.window_segments}"
    yield f"  conv_kernel: {model.conv_kernel} # half a segment to each side, as in configs/"


def _curriculum(choice: Choice) -> Iterator[str]:
    run, corpus = choice.draft, choice.corpus
    longest = run.lengths[-1]
    why = (
        "nine in ten documents fit into the longest rows"
        if longest >= corpus.p90
        else f"longer rows would leave fewer than {max(rules.LEAST_ROWS, choice.machine.processes)} in a batch"
        if longest < rules.LONGEST_LENGTH
        else "longer rows were not tried by this rule"
    )
    yield from _comment(
        f"lengths: half of the documents have up to {corpus.median:,} tokens, nine in ten up to {corpus.p90:,}; {why}. "
        "Short rows first come to the same loss in 0.9 of the time (measured, docs/training.md). micro_batch: what "
        "fits, up to what keeps the machine busy",
    )
    yield "curriculum:"
    for stage in choice.config.curriculum:
        yield f"  - {_flow({key: getattr(stage, key) for key in ('until_tokens', 'seq_len', 'micro_batch')})}"


def _batch(choice: Choice) -> Iterator[str]:
    run = choice.draft
    wanted = rules.wanted_batch(run.flops, 1e30)
    smaller = run.batch < wanted
    larger = run.batch > wanted
    yield from _comment(
        f"batch: D has 0.2920 C^0.3271 for C = {run.flops:.2g} FLOP, about {wanted:,} tokens"
        + (f"; fewer, for at least {rules.WANTED_STEPS} steps" if smaller else "")
        + ("; more, for each process needs a row" if larger else "")
    )
    yield f"batch_tokens: {_number(run.batch)}"


def _precision(choice: Choice) -> Iterator[str]:
    yield "precision: auto # bf16 where the machine is faster in it, else fp32"


def _memory(choice: Choice) -> Iterator[str]:
    config, machine = choice.config, choice.machine
    yield from _comment(
        f"memory: the first of ZeRO 1, 2, 2 with checkpointing, 3 with checkpointing that fits in {machine.memory:.3g} "
        f"GiB less {MARGIN:.0%}: {format_bytes(choice.peak)}"
    )
    yield f"zero_stage: {config.zero_stage}"
    if config.activation_checkpointing:
        yield "activation_checkpointing: true # layers are computed twice: a third more arithmetic"


def _optimizer(choice: Choice) -> Iterator[str]:
    config, run = choice.config, choice.draft
    rule = 0.3118 * run.flops**-0.125
    reason = f"D has 0.3118 C^-0.1250 = {rule:.2g}"
    if config.model.objective == "mlm":
        reason += ", half of it for a masked model"
    if config.optimizer.lr == rules.MOST_LR:
        reason += f"; {rules.MOST_LR:g} at most, as configs/books-clm.yaml has it"
    yield from _comment(f"lr: {reason}. The other values are the defaults, which are D's too")
    yield f"optimizer: {_flow({'kind': config.optimizer.kind, 'lr': config.optimizer.lr})}"
    yield from _comment(
        "warm-up over 5% of the run and at most 2,000 steps; constant, so that the run can be extended; down over the "
        "last 20% (Hägele et al. 2024)"
    )
    schedule = config.schedule
    values = {"kind": schedule.kind, "warmup_tokens": schedule.warmup_tokens, "decay_tokens": schedule.decay_tokens}
    yield f"schedule: {_flow(values)}"


def _saving(choice: Choice) -> Iterator[str]:
    config, run = choice.config, choice.draft
    checkpoint = {"every_tokens": config.checkpoint.every_tokens, "every_minutes": 30}
    yield f"checkpoint: {_flow(checkpoint)} # a tenth of the run; a crash costs half an hour at most"
    if config.data.valid is not None:
        values: dict[str, Any] = {"every_tokens": config.validation.every_tokens}
        if run.tokens >= LONG_RUN:
            values["tokens"] = config.validation.tokens
        yield from _comment(
            f"{validations(run.tokens)} validations in the run; {1 - USED:.0%} of the time is for them, for saving "
            "and the like"
        )
        yield f"validation: {_flow(values)}"
