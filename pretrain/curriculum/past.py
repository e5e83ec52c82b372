"""The part of a run that has been trained, as a resume compares it: stage by stage, with every default filled in.

A stage is past once a step of it was made. Its settings shaped the order of the data, the noise or the weights and are
fixed; those of stages to come may change. What counts is what a stage really had, not where in the configuration that
was written: a default may move into the stages, and a rule may change where it has not applied yet.
"""

from __future__ import annotations

import dataclasses

from data_pipeline.batches.mixture import PERIOD, quotas
from data_pipeline.batches.order import Plan
from pretrain.config import RunConfig
from pretrain.curriculum.stages import stage_settings

COMPARED_BY_STAGE = ("batch_tokens", "model.rope_theta", "model.rope_scaling", "model.rope_position_scale")
"""Keys of the configuration outside ``curriculum`` that matter through the stages only."""


@dataclasses.dataclass(frozen=True)
class PastStage:
    """A stage that a step was made in."""

    start_tokens: int
    seq_len: int
    settings: dict[str, float]
    weights: dict[str, float]  # shares of the sources


def past_stages(config: RunConfig, plan: Plan, tokens: int) -> list[PastStage]:
    """Every stage begun before ``tokens``, in order."""
    out: list[PastStage] = []
    for i, stage in enumerate(plan.stages):
        if stage.start_tokens >= tokens:
            break
        weights = config.stage_weights(i)
        counts = quotas(list(weights.values()), list(weights))
        shares = {name: count / PERIOD for name, count in zip(weights, counts, strict=True)}
        out.append(PastStage(stage.start_tokens, stage.seq_len, stage_settings(config, i), shares))
    return out


def past_differs(old: RunConfig, old_plan: Plan, new: RunConfig, new_plan: Plan, tokens: int) -> list[str]:
    """What of the past a new configuration would change: a line for each fault, naming the stage and its key.

    ``tokens`` is where the run stands under the old configuration. What ``data.masking`` says is compared elsewhere.
    """
    if tokens > new_plan.total_tokens:
        return [f"curriculum differs in its past: it is over after {new_plan.total_tokens} tokens, at {tokens} tokens"]
    new = new.model_copy(update={"data": new.data.model_copy(update={"masking": old.data.masking})})
    before, now = past_stages(old, old_plan, tokens), past_stages(new, new_plan, tokens)
    were, are = ([(s.start_tokens, s.seq_len) for s in stages] for stages in (before, now))
    if were != are:
        return [
            f"curriculum differs in its past: at {tokens} tokens, the stages were (from, seq_len) {were} and are now "
            f"{are}; only stages to come may change"
        ]
    faults = []
    for i, (was, is_now) in enumerate(zip(before, now, strict=True)):
        here = f"stage {i} began at {was.start_tokens} tokens and the run stands at {tokens}"
        for key, value in was.settings.items():
            if is_now.settings.get(key, value) != value:  # without the key model.positions or objective has changed
                faults.append(
                    f"curriculum differs in its past: curriculum.{i}.{key} was {value} and is now "
                    f"{is_now.settings[key]} ({here}; only stages to come may change)"
                )
    changes, wanted = _changes(before), _changes(now)
    if changes != wanted:
        faults.append(
            f"the weights of the sources differ in the past: at {tokens} tokens, they were (from, weights) {changes}; "
            "only those of stages to come may change"
        )
    return faults


def _changes(stages: list[PastStage]) -> list[tuple[int, dict[str, float]]]:
    """(start, shares) of every stage that changed the shares."""
    out: list[tuple[int, dict[str, float]]] = []
    for stage in stages:
        if not out or out[-1][1] != stage.weights:
            out.append((stage.start_tokens, stage.weights))
    return out
