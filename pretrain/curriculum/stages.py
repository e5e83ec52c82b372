"""What the stages of a curriculum change besides the length: the model's positions and the share of masked tokens.

The function that the weights stand for depends on the stage. It follows from the configuration and the tokens consumed
alone, and training, validation, a resume, an export and an evaluation all get it from here. It never depends on the
length of the sequence at hand, for then the logits of a prefix would change with what follows it.

``model.rope_scaling`` names what becomes of rotary angles where a stage is longer than every one before it. With d the
width of a head and L / L0 the growth of the length:

- ``none``: they stay.
- ``ntk``: the base is multiplied by (L / L0)^(d / (d - 2)). That slows the slowest angle by L / L0 and leaves the
  fastest as it is ("NTK-aware" interpolation: Peng et al. 2023, YaRN, arXiv 2309.00071, section 3.1).
- ``linear``: positions are multiplied by L0 / L (position interpolation: Chen et al. 2023, arXiv 2306.15595, eq. 4).
- ``yarn``: those of slow angles are, fast ones stay, and logits are multiplied by (0.1 ln(L / L0) + 1)^2 (Peng et al.
  2023). The model then has three constants: base, L0 / L and L0 (``rope_original_length``).

A run that starts with trained weights (``init_from``) continues as if a stage of ``init_length`` came before its first.

A stage's own ``rope_theta`` replaces the rule's base. Later stages keep it, and under ``ntk`` it grows with the length
from there.

Learned positions have a table that is long enough for every stage from the start. Rows that no stage has reached yet
are never read: positions from ``trained_positions`` on repeat the rows of those before, and where a longer stage begins
the engine makes the copies real (:mod:`pretrain.engine.positions`).
"""

from __future__ import annotations

import dataclasses

from data_pipeline.batches.masking import Masking
from pretrain.config import RunConfig
from pretrain.curriculum.plan import build_plan
from pretrain.model.config import ModelConfig


def stage_model(config: RunConfig, index: int) -> ModelConfig:
    """The model as it is in a stage: base and scale of its rotary angles, or how many learned positions are trained.

    A stage that is shorter than one before it changes nothing: what was extended stays so.
    """
    model = config.model
    stages = config.curriculum[: index + 1]
    before = config.init_length or 0
    longest = max(before, *(stage.seq_len for stage in stages))
    if model.positions == "learned":
        # For the block and not for the longest stage: stages to come may be given up to this length at a resume.
        rows = max(model.max_positions, config.block_length)
        return model.model_copy(update={"max_positions": rows, "trained_positions": min(longest, rows)})
    if not model.rotary:
        return model
    chosen = max((i for i, stage in enumerate(stages) if stage.rope_theta is not None), default=0)
    theta, scale = stages[chosen].rope_theta or model.rope_theta, model.rope_position_scale
    first = before or stages[0].seq_len
    if model.rope_scaling == "ntk":
        own = stages[chosen].rope_theta is not None
        growth = longest / (max(before, *(stage.seq_len for stage in stages[: chosen + 1])) if own else first)
        theta *= growth ** (model.head_dim / (model.head_dim - 2))
    elif model.rope_scaling in ("linear", "yarn"):
        scale *= first / longest
    update: dict[str, float] = {"rope_theta": theta, "rope_position_scale": scale}
    if model.rope_scaling == "yarn":
        update["rope_original_length"] = model.rope_original_length or first
    return model.model_copy(update=update)


def model_at(config: RunConfig, tokens: int) -> ModelConfig:
    """The model as it is after ``tokens`` tokens of the run.

    On the edge of two stages that of the earlier one, in which the last step was made; the change belongs to the first
    step of the later one. Beyond the end of the run it is that of the last stage.
    """
    return stage_model(config, _stage_of(config, tokens))


def trained_length(config: RunConfig, tokens: int) -> int:
    """The longest sequence length of the stages up to ``tokens`` tokens of the run."""
    return max(stage.seq_len for stage in config.curriculum[: _stage_of(config, tokens) + 1])


def _stage_of(config: RunConfig, tokens: int) -> int:
    plan = build_plan(config)
    return plan.stage_index(min(max(0, tokens - 1), plan.total_tokens))


def stage_maskings(config: RunConfig) -> tuple[Masking, ...]:
    """What each stage hides from a masked model: ``data.masking``, with the stage's own rate where it has one."""
    base = config.data.masking.build()
    return tuple(
        base if stage.masking_rate is None else dataclasses.replace(base, rate=stage.masking_rate)
        for stage in config.curriculum
    )


def stage_settings(config: RunConfig, index: int) -> dict[str, float]:
    """What a stage really has of all that may differ between stages, by the name of its key in ``curriculum.N``."""
    stage, model = config.curriculum[index], stage_model(config, index)
    out: dict[str, float] = {"batch_tokens": stage.batch_tokens or config.batch_tokens}
    if model.objective == "mlm":
        out["masking_rate"] = stage_maskings(config)[index].rate
    if model.rotary:
        out |= {"rope_theta": model.rope_theta, "rope_position_scale": model.rope_position_scale}
        if model.rope_original_length is not None and model.rope_position_scale < 1:
            out["rope_original_length"] = model.rope_original_length
    return out


def describe_changes(config: RunConfig) -> list[str]:
    """Lines in plain words about what changes with the stages besides length and batch; none if nothing does."""
    stages = range(len(config.curriculum))
    models = [stage_model(config, i) for i in stages]
    shares = [f"{masking.rate:.1%}" for masking in stage_maskings(config)]
    lines = []
    if len(set(shares)) > 1:
        lines.append(f"Masked in the stages: {', '.join(shares)} (in validation {config.data.masking.rate:.1%}).")
    angles = [(model.rope_theta, model.rope_position_scale) for model in models]
    if len(set(angles)) > 1:
        shown = [f"{theta:,.6g}" + (f" and positions x {scale:.4g}" if scale != 1 else "") for theta, scale in angles]
        lines.append(f"Rotary base in the stages: {'; '.join(shown)} (rule {config.model.rope_scaling}).")
    trained = [model.trained_positions for model in models]
    if len(set(trained)) > 1:
        lines.append(
            f"Learned positions in the stages: {', '.join(f'{count:,}' for count in trained if count is not None)}; "
            "each larger number begins with copies of the rows before."
        )
    return lines
