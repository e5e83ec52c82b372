"""The gate that runs before any score: is the model what its numbers will be taken for?

A "causal" model that sees the future reports a wonderful perplexity and cannot generate. A model whose output moves
with its batch mates or with the amount of padding has scores that depend on how they were computed. Each check measures
one number and holds it against a bound, on the weights as loaded.

What is looked at is what is scored. The checks run at the length that the model's structure needs and at the longest
that is to be scored, in batches as large as scored ones, through every path that computes a score: logits, hidden
states, the loss of labels, padded and packed rows, decoding with a cache. They run in float32, and those that compare
rows of one shape also in bf16 where the device is fast in it. docs/evaluation.md lists what each one finds.

Differences of logits are given as a share of the largest absolute logit. Rounding in float32 leaves about 1e-6 of it;
what published Nyströmformers do wrong is 4e-4 (batch mates) to 1e-1 (padding).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eval.results.parts import Parts
from eval.results.schema import Metric, ModelInfo, Outcome, Table, read_result_or_none
from eval.results.store import result_key
from eval.shared.progress import Progress
from eval.subject import Subject
from eval.tasks.validity import CHECKS_TABLE, ValiditySettings
from eval.tasks.validity.causality import (
    context_control,
    decoding,
    long_decoding,
    perturbation,
    prefix_likelihood,
    row_lengths,
)
from eval.tasks.validity.isolation import batch_mates, packing, padding, repeated
from eval.tasks.validity.paths import agreement, masked_control, save_and_load
from eval.tasks.validity.probe import Check, Probe, check_positions, probed_length, structure_length, text_of, worst_of
from pretrain.precision import fast_precision

TASK = "validity"
VERSION = 3
PREFIXES = 8
"""Prefixes that are computed alone at the scored length: decoding covers every position there."""


def resolve(subject: Subject, settings: ValiditySettings) -> ValiditySettings:
    """With the length filled in: what the model was trained on, and what its structure needs."""
    if settings.length is not None:
        subject.check_length(settings.length, "--length")
    return settings.model_copy(update={"length": probed_length(subject, settings.length or 0)})


def data(subject: Subject, settings: ValiditySettings) -> dict[str, Any]:
    """The held-out text that is looked at, where there is some."""
    shards = subject.shards
    return {"path": str(shards.path), "hash": shards.fingerprint} if shards else {"path": None, "hash": "random tokens"}


def run(subject: Subject, settings: ValiditySettings, parts: Parts | None = None) -> Outcome:
    """All checks that apply to the model's objective, as a table and a metric ``passed`` of 1 or 0."""
    checks = worst_of(all_checks(subject, resolve(subject, settings)))
    rows: list[list[Any]] = [[c.name, c.measured, f"{c.sense} {c.bound:g}", c.passed, c.detail] for c in checks]
    passed = sum(c.passed for c in checks)
    return Outcome(
        metrics={"passed": Metric(float(passed == len(checks)), True, n=len(checks), unit="checks")},
        tables=[Table(CHECKS_TABLE, ["check", "measured", "bound", "passed", "detail"], rows)],
    )


def all_checks(subject: Subject, settings: ValiditySettings) -> list[Check]:
    """Every check at every length; those of one name measure the same thing."""
    found, jobs = [], list(experiments(subject, settings))
    with Progress(
        len(jobs), "validity", "experiment"
    ) as progress:  # half a minute on a quiet core, and many on a busy one
        for job in jobs:
            found += job.run()
            progress.update()
    return found


@dataclass(frozen=True)
class Experiment:
    """Some checks that share their forward passes."""

    probe: Probe
    compute: Callable[..., list[Check]]
    positions: tuple[list[int], ...] = ()

    def run(self) -> list[Check]:
        """The checks."""
        return self.compute(self.probe, *self.positions)


def experiments(subject: Subject, settings: ValiditySettings) -> Iterator[Experiment]:
    """What is looked at: at the length of the structure, then at the scored one, then in bf16."""
    scored = settings.length or 0
    for length in sorted({structure_length(subject), scored} - {0}):
        probe = Probe(subject, text_of(subject, length, settings.seed), settings.seed)
        positions = check_positions(subject, length, settings)
        few = positions
        if length == scored:  # decoding covers every position there
            positions, few = positions[::2], positions[:: max(1, len(positions) // PREFIXES)]
        if subject.causal:
            yield Experiment(probe, perturbation, (positions,))
            yield Experiment(probe, context_control, (positions,))
            yield Experiment(probe, prefix_likelihood, (few,))
            yield from (Experiment(probe, compute) for compute in (row_lengths, decoding, long_decoding))
        elif subject.loaded.tokenizer.mask_id is not None:
            yield Experiment(probe, masked_control)
        yield from (Experiment(probe, compute) for compute in (batch_mates, padding, packing, repeated, agreement))
        if length == scored and looks_at_bf16(subject):
            lower = replace(probe, precision="bf16")
            if subject.causal:
                yield Experiment(lower, perturbation, (positions,))
            yield from (Experiment(lower, compute) for compute in (batch_mates, padding, packing, agreement))
    yield Experiment(probe, save_and_load)


def looks_at_bf16(subject: Subject) -> bool:
    """Whether suites would choose bf16 on this device: scores in it are then to be trusted too."""
    return fast_precision(subject.device) == "bf16"


def stands(path: Path, model: ModelInfo, length: int) -> bool | None:
    """Whether the result at ``path`` passed for this model up to ``length`` tokens.

    None where it is of another model, of other code, of fewer positions than are looked at by default, of shorter
    texts, or not there.
    """
    result = read_result_or_none(path)
    if result is None or result.task != TASK or not covers(result.settings, length):
        return None
    if result.key != result_key(TASK, VERSION, model, result.settings, result.data["hash"]):
        return None
    return result.metrics["passed"].value == 1.0


def covers(settings: dict[str, Any], length: int) -> bool:
    """Whether a result with these settings speaks for scores at ``length`` tokens."""
    return settings.get("positions", 0) >= ValiditySettings().positions and (settings.get("length") or 0) >= length


def failures(table: Table) -> list[str]:
    """The failed checks of a result's table, as text."""
    return [
        f"{name}: {'not a number' if measured is None else f'{measured:.3g}'}, must be {bound}"
        for name, measured, bound, passed, _ in table.rows
        if not passed
    ]
