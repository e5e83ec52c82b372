"""The size, length, batch and memory settings of a first run, checked with the planner of ``nystrom plan``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from data_pipeline.errors import UserError
from pretrain.config import RunConfig, parse_config
from pretrain.curriculum.plan import LEAST_VALIDATION, VALIDATION_SHARE
from pretrain.firstrun import rules
from pretrain.firstrun.inputs import MARGIN, Corpus, Machine
from pretrain.firstrun.rules import Shape
from pretrain.model.config import ModelConfig
from pretrain.model.flops import forward_flops_per_token
from pretrain.planning.estimate import TRAINING
from pretrain.planning.fit import MemoryBudget
from pretrain.precision import resolve_for_plan

USED = 0.85
"""Share of the time that goes into training; the rest are validations, checkpoints, and what the estimate missed."""
START_SECONDS = 30.0
"""Until the first step, and for the export at the end."""
STEP_SECONDS = 0.05
"""That an optimizer step takes beside its arithmetic. 0.02 to 0.08 were measured for 5 million parameters on a CPU
(benchmarks/results/training.json): tiny batches are slower than their FLOP."""
LONG_RUN = 1_000_000_000
"""Tokens from which validation reads more, as in ``configs/causal-small.yaml``."""
MICRO_TOKENS = {True: 32_768, False: 4_096}
"""Tokens in memory at a time, at most, on a GPU and on a CPU: enough to keep it busy. The CPU's is ``books-clm``'s."""
MEMORY = ((1, False), (2, False), (2, True), (3, True))
"""ZeRO stage and activation checkpointing, in the order of what they cost in time."""


@dataclass(frozen=True)
class Draft:
    """A size with the length of its run and what follows from them, before memory is looked at."""

    shape: Shape
    lengths: tuple[int, ...]
    ends: tuple[int, ...]
    batch: int
    flops_per_token: float
    """Of training, mean over the stages, without recomputation."""
    loss: float
    """As the rule predicts it."""
    limited_by: str
    """What ended the run: ``time`` or ``text``."""

    @property
    def tokens(self) -> int:
        """Of the whole run."""
        return self.ends[-1]

    @property
    def flops(self) -> float:
        """Of the whole run."""
        return self.flops_per_token * self.tokens


@dataclass(frozen=True)
class Choice:
    """A first configuration and what it was made from."""

    corpus: Corpus
    machine: Machine
    draft: Draft
    config: RunConfig
    """As the file will say it: the precision open, the vocabulary left to the shards."""
    seconds: float
    """That training is expected to take."""
    peak: int
    """Bytes of one process at its fullest, as ``nystrom plan`` says."""
    passed_over: tuple[Shape, ...] = ()
    """Larger sizes that the rule would have taken and that the memory did not hold."""


def draft(shape: Shape, objective: str, corpus: Corpus, machine: Machine, slower: float = 1.0) -> Draft | None:
    """The run of this size that the time and the text allow; None if that is no run.

    ``slower``: factor of time for each token. Batch, lengths and tokens depend on each other: they are repeated until
    they stay.
    """
    seconds = USED * machine.hours * 3600 - START_SECONDS
    most_tokens = rules.EPOCHS * corpus.tokens
    text = min(corpus.tokens, corpus.held_out or corpus.tokens)
    longest, tokens, cost, batch = 1024, 0.0, 0.0, 8192
    for _ in range(4):
        lengths = rules.lengths_up_to(longest)
        cost = rules.mean_over_stages(
            {n: training_flops(shape, objective, corpus.vocab_size, longest, n) for n in lengths}
        )
        in_time = seconds / seconds_per_token(cost * slower, batch, machine)
        tokens = min(in_time, most_tokens)
        if tokens < 1:
            return None
        batch = rules.wanted_batch(cost * tokens, tokens)
        longest = rules.longest_length(corpus.p90, batch, machine.processes, text)
    lengths = rules.lengths_up_to(longest)
    batch = rules.batch_of(batch, longest, machine.processes)
    in_time = seconds / seconds_per_token(cost * slower, batch, machine)
    tokens = min(in_time, most_tokens)
    if tokens < rules.LEAST_STEPS * batch:
        return None
    ends = rules.stage_ends(tokens, batch, lengths)
    return Draft(
        shape,
        lengths,
        ends,
        batch,
        cost,
        rules.predicted_loss(shape.parameters(corpus.vocab_size), ends[-1], corpus.tokens),
        "text" if most_tokens <= in_time else "time",
    )


def seconds_per_token(flops: float, batch: int, machine: Machine) -> float:
    """Of training, for ``flops`` a token and ``batch`` tokens a step, by all processes together."""
    return flops / (machine.processes * machine.flops) + STEP_SECONDS / batch


def training_flops(shape: Shape, objective: str, vocab_size: int, longest: int, length: int) -> float:
    """For each token in rows of ``length``, as ``nystrom plan`` counts them."""
    return TRAINING * forward_flops_per_token(training_model(shape, objective, vocab_size, longest), length)


def training_model(shape: Shape, objective: str, vocab_size: int, longest: int) -> ModelConfig:
    """The model of this size for rows of up to ``longest`` tokens."""
    return ModelConfig(**_model_settings(shape, objective, longest), vocab_size=vocab_size)


def _model_settings(shape: Shape, objective: str, longest: int) -> dict[str, Any]:
    return {"objective": objective, **shape._asdict(), **rules.form_settings(objective, longest)}


def drafts(objective: str, corpus: Corpus, machine: Machine) -> list[Draft]:
    """Runs of the sizes up to the one that the rule takes, which is the first; the smaller ones follow.

    Raises :class:`UserError` for text or hours that are too few for any.
    """
    found = [each for shape in rules.SHAPES if (each := draft(shape, objective, corpus, machine)) is not None]
    if not found:
        raise UserError(_too_little(corpus, machine))
    best = min(each.loss for each in found)
    taken = next(i for i, each in enumerate(found) if each.loss <= best * (1 + rules.CLOSE_ENOUGH))
    return found[taken::-1]


def _too_little(corpus: Corpus, machine: Machine) -> str:
    smallest = rules.LEAST_LENGTH * max(rules.LEAST_ROWS, machine.processes)
    steps = f"{rules.LEAST_STEPS} steps of {smallest:,} tokens"
    needed = math.ceil(rules.LEAST_STEPS * smallest / rules.EPOCHS)
    if corpus.tokens < needed:
        return (
            f"{corpus.train} holds {corpus.tokens:,} tokens: too few for any first run on {machine.processes} "
            f"process(es). {needed:,} are the least: {steps} in {rules.EPOCHS} passes over the text. Prepare more text"
        )
    return (
        f"{machine.hours:g} hours are too short for any first run on {machine.processes} process(es): the smallest "
        f"model does not come to {steps} in them. Give more --hours"
    )


def choose(name: str, objective: str, corpus: Corpus, machine: Machine) -> Choice:
    """The first configuration for this corpus and machine.

    Raises :class:`UserError` for text, hours or memory that are too little for any.
    """
    passed_over: list[Shape] = []
    for each in drafts(objective, corpus, machine):
        fitted = _fitted(name, objective, each, corpus, machine)
        if fitted is not None:
            return Choice(corpus, machine, *fitted, passed_over=tuple(passed_over))
        passed_over.append(each.shape)
    raise UserError(
        f"{machine.memory:.2g} GiB for one process are too little: the smallest model, {rules.SHAPES[0].hidden_size} "
        f"wide with a vocabulary of {corpus.vocab_size:,}, does not fit with one row at a time. Give each process more "
        "memory, or prepare the text with a smaller vocabulary"
    )


def _fitted(
    name: str, objective: str, each: Draft, corpus: Corpus, machine: Machine
) -> tuple[Draft, RunConfig, float, int] | None:
    """The draft, its configuration, seconds and peak under the cheapest memory settings that fit; None if none does."""
    budget = MemoryBudget(machine.processes, int(machine.memory * 2**30 * (1 - MARGIN)), machine.on_gpu)
    for zero_stage, checkpointing in MEMORY:
        if zero_stage > 1 and machine.processes == 1 and (zero_stage, checkpointing) != (2, True):
            continue  # nothing to divide
        # Recomputing the layers takes time, which the run then has fewer tokens for.
        slower = (TRAINING + 1) / TRAINING if checkpointing else 1.0
        run = draft(each.shape, objective, corpus, machine, slower) if checkpointing else each
        if run is None:
            continue
        for micro_batches in _micro_batches(run, machine):
            raw = settings(name, objective, run, corpus, machine, micro_batches, zero_stage, checkpointing)
            config = parse_config(raw)
            planned = resolve_for_plan(_with_vocabulary(config, corpus.vocab_size), machine.on_gpu).config
            stages = budget.peaks(planned)
            if max(stage.peak for stage in stages) <= budget.limit(planned, stages[0].state):
                seconds = run.tokens * seconds_per_token(run.flops_per_token * slower, run.batch, machine)
                return run, config, seconds, max(stage.peak for stage in stages)
    return None


def validations(tokens: int) -> int:
    """How many there are in the run: 20, or as many as read a tenth of its tokens with the fewest that one reads."""
    return min(20, max(2, int(VALIDATION_SHARE * tokens / LEAST_VALIDATION)))


def _with_vocabulary(config: RunConfig, size: int) -> RunConfig:
    return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": size})})


def _micro_batches(run: Draft, machine: Machine) -> Iterator[tuple[int, ...]]:
    """Rows at a time for each stage, from the most that are useful down to one: divisors of a process's rows."""
    tokens, before = MICRO_TOKENS[machine.on_gpu], None
    while tokens >= run.lengths[0]:
        rows = tuple(
            _divisor(run.batch // length // machine.processes, max(1, tokens // length)) for length in run.lengths
        )
        if rows != before:
            yield rows
        before, tokens = rows, tokens // 2


def _divisor(rows: int, most: int) -> int:
    """The largest divisor of ``rows`` that is at most ``most``: micro-batches of equal size."""
    return next(size for size in range(min(rows, most), 0, -1) if rows % size == 0)


def settings(
    name: str,
    objective: str,
    run: Draft,
    corpus: Corpus,
    machine: Machine,
    micro_batches: tuple[int, ...],
    zero_stage: int,
    checkpointing: bool,
) -> dict[str, Any]:
    """The configuration as plain values, in the order of the file."""
    data = {"train": corpus.train} | ({} if corpus.valid is None else {"valid": corpus.valid})
    raw: dict[str, Any] = {
        "name": name,
        "model": _model_settings(run.shape, objective, run.lengths[-1]),
        "data": data,
        "curriculum": [
            {"until_tokens": end, "seq_len": length, "micro_batch": rows}
            for end, length, rows in zip(run.ends, run.lengths, micro_batches, strict=True)
        ],
        "batch_tokens": run.batch,
        "precision": "auto",
        "zero_stage": zero_stage,
    }
    if checkpointing:
        raw["activation_checkpointing"] = True
    raw["optimizer"] = {"kind": "adamw", "lr": rules.learning_rate(run.flops, objective)}
    raw["schedule"] = {
        "kind": "wsd",
        "warmup_tokens": rules.rounded(min(0.05 * run.tokens, 2000 * run.batch)),
        "decay_tokens": rules.rounded(0.2 * run.tokens),
    }
    raw["checkpoint"] = {"every_tokens": rules.rounded(run.tokens / 10), "every_minutes": 30}
    if corpus.valid is not None:
        raw["validation"] = {"every_tokens": rules.rounded(run.tokens / validations(run.tokens))}
        if run.tokens >= LONG_RUN:
            raw["validation"]["tokens"] = 2_097_152
    return raw
