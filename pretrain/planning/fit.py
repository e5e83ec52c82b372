"""Whether a run fits the memory of its GPUs, and which changes would make it fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pretrain.config import RunConfig
from pretrain.curriculum.plan import build_plan
from pretrain.planning.memory import StageMemory, allocatable_bytes, plan_memory
from pretrain.planning.state import StateBytes


@dataclass(frozen=True)
class MemoryBudget:
    """What there is to fit into."""

    processes: int
    memory: int
    """Bytes for one process less the margin: that PyTorch may allocate on a GPU, or of resident memory on CPUs."""
    on_gpu: bool = True

    def limit(self, config: RunConfig, state: StateBytes) -> int:
        """The highest peak of a stage that fits; on CPUs it depends on the state and on what freed blocks keep."""
        return self.memory if self.on_gpu else allocatable_bytes(config, self.memory, state)

    def peaks(self, config: RunConfig) -> list[StageMemory]:
        """Of each stage."""
        return plan_memory(config, self.processes, on_gpu=self.on_gpu)

    def holds(self, config: RunConfig) -> bool:
        """Every stage fits."""
        stages = self.peaks(config)
        return peak(stages) <= self.limit(config, stages[0].state)


@dataclass(frozen=True)
class Change:
    """A way to need less."""

    overrides: tuple[str, ...]
    """As ``--set`` takes them."""
    peak: int
    """Bytes of the fullest stage then."""
    cost: str
    """What is paid for it."""


def peak(stages: Sequence[StageMemory]) -> int:
    """Of the fullest stage."""
    return max(stage.peak for stage in stages)


LINE_GUESSES = 6
"""Guesses along a line before halving: enough unless memory jumps."""


def largest_micro_batch(config: RunConfig, stage: int, budget: MemoryBudget) -> int:
    """The most rows at a time that fit in one stage of the curriculum; 0 if not even one does.

    Never more than a process has in a step. Memory grows with the rows nearly in a straight line, so the line through
    what has been tried is followed.
    """
    most = build_plan(config).stages[stage].rows // budget.processes
    guess = min(config.curriculum[stage].micro_batch, most)
    first = budget.peaks(config)[stage]
    tried = {guess: first.peak}
    limit = budget.limit(config, first.state)  # rows do not change it

    def need(rows: int) -> int:
        if rows not in tried:
            tried[rows] = budget.peaks(with_micro_batch(config, stage, rows))[stage].peak
        return tried[rows]

    low, high = 0, most + 1  # low fits, high does not
    while high - low > 1:
        if need(guess) <= limit:
            low = guess
        else:
            high = guess
        guess = _on_the_line(tried, limit) if len(tried) < LINE_GUESSES else (low + high) // 2
        guess = min(max(guess, low + 1), high - 1)
    return low


def _on_the_line(tried: dict[int, int], limit: int) -> int:
    nearest = sorted(tried, key=lambda rows: abs(tried[rows] - limit))[:2]
    if len(nearest) < 2:
        return max(1, nearest[0] // 2) if tried[nearest[0]] > limit else 2 * nearest[0]
    a, b = nearest
    slope = (tried[a] - tried[b]) / (a - b)
    return int(a + (limit - tried[a]) / slope) if slope > 0 else a


def with_micro_batch(config: RunConfig, stage: int, rows: int) -> RunConfig:
    """The configuration with another micro-batch in one stage."""
    stages = list(config.curriculum)
    stages[stage] = stages[stage].model_copy(update={"micro_batch": rows})
    return config.model_copy(update={"curriculum": tuple(stages)})


def changes_that_fit(config: RunConfig, budget: MemoryBudget) -> list[Change]:
    """The smallest changes, each by itself, that make a run fit which does not; if none does, the first of their sums.

    Every one is computed as the run itself is. Empty if nothing helps.
    """
    found = [change for change, changed in _single(config, budget) if budget.holds(changed)]
    if found:
        return found
    collected: list[str] = []
    costs: list[str] = []
    for override, cost, changed in _together(config, budget):
        collected.append(override)
        costs.append(cost)
        smaller = _smaller_micro_batches(changed, budget)
        if smaller is not None:
            overrides, fitting = smaller
            return [Change((*collected, *overrides), peak(budget.peaks(fitting)), ", ".join(costs))]
    return []


def _single(config: RunConfig, budget: MemoryBudget) -> Iterator[tuple[Change, RunConfig]]:
    smaller = _smaller_micro_batches(config, budget)
    if smaller is not None:
        overrides, changed = smaller
        yield Change(overrides, peak(budget.peaks(changed)), "less work at a time"), changed
    for override, cost, changed in _switches(config, budget):
        yield Change((override,), peak(budget.peaks(changed)), cost), changed


RECOMPUTE = "about a third more arithmetic"
COMMUNICATE = "more communication"
OFFLOAD = "a slower step, on the host's processors"


def _switches(config: RunConfig, budget: MemoryBudget) -> Iterator[tuple[str, str, RunConfig]]:
    if not config.activation_checkpointing:
        yield "activation_checkpointing=true", RECOMPUTE, config.model_copy(update={"activation_checkpointing": True})
    for stage in range(config.zero_stage + 1, 4) if budget.processes > 1 else ():
        changed = config.model_copy(update={"zero_stage": stage})
        if stage == 3 or budget.holds(changed):  # the lowest that is enough
            yield f"zero_stage={stage}", COMMUNICATE, changed
            break
    if config.zero_stage and not config.offload_optimizer:
        yield "offload_optimizer=true", OFFLOAD, config.model_copy(update={"offload_optimizer": True})


def _together(config: RunConfig, budget: MemoryBudget) -> Iterator[tuple[str, str, RunConfig]]:
    """All switches one after the other, each on top of those before."""
    if not config.activation_checkpointing:
        config = config.model_copy(update={"activation_checkpointing": True})
        yield "activation_checkpointing=true", RECOMPUTE, config
    if config.zero_stage < 3 and budget.processes > 1:
        config = config.model_copy(update={"zero_stage": 3})
        yield "zero_stage=3", COMMUNICATE, config
    if config.zero_stage and not config.offload_optimizer:
        yield "offload_optimizer=true", OFFLOAD, config.model_copy(update={"offload_optimizer": True})


def _smaller_micro_batches(config: RunConfig, budget: MemoryBudget) -> tuple[tuple[str, ...], RunConfig] | None:
    """The stages that do not fit with the largest micro-batch that does; None if one row does not."""
    overrides = []
    for index, stage in enumerate(budget.peaks(config)):
        if stage.peak <= budget.limit(config, stage.state):
            continue
        rows = largest_micro_batch(config, index, budget)
        if rows == 0:
            return None
        overrides.append(f"curriculum.{index}.micro_batch={rows}")
        config = with_micro_batch(config, index, rows)
    return tuple(overrides), config
