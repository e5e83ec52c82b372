"""May this configuration go on with that checkpoint? What is fixed for the life of a run, and what may change."""

from __future__ import annotations

from typing import Any

from data_pipeline.batches.order import Plan
from data_pipeline.errors import UserError
from pretrain.commit import Manifest
from pretrain.config import RunConfig, parse_config
from pretrain.curriculum import build_plan

# Dotted keys that the weights, the optimizer's state or the order of the data depend on.
FIXED = ("model", "seed", "batch_tokens", "precision", "zero_stage", "data.masking")
# Where something is, not what it is. The contents are compared by fingerprint.
_PLACES = ("name", "output_dir", "data.train", "data.valid", "data.tokenizer")


def identity(config: RunConfig, data_fingerprint: str, world_size: int) -> dict[str, Any]:
    """What a checkpoint keeps of its run, to be compared at a resume. Plain JSON values."""
    return {"config": config.model_dump(mode="json"), "data_fingerprint": data_fingerprint, "world_size": world_size}


def check_resume(
    manifest: Manifest, config: RunConfig, plan: Plan, data_fingerprint: str, world_size: int
) -> dict[str, Any]:
    """Compare a checkpoint with what is asked for now.

    Returns the changes that are allowed, {dotted key: [old, new]}: learning rate and its schedule, stages to come,
    micro-batches, validation, checkpoints, telemetry. Raises :class:`UserError` that names every change that is not.
    """
    old = manifest.identity
    old_config = parse_config(old["config"], where=f"checkpoint {manifest.tag}")
    before, now = _flatten(old["config"]), _flatten(config.model_dump(mode="json"))
    refused: list[str] = []
    changed: dict[str, Any] = {}
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) == now.get(key) or key.startswith(("curriculum", "data.block_length")) or key in _PLACES:
            continue
        if any(key == fixed or key.startswith(fixed + ".") for fixed in FIXED):
            refused.append(f"{key} was {before.get(key)!r} and is now {now.get(key)!r}")
        else:
            changed[key] = [before.get(key), now.get(key)]
    if old_config.block_length != config.block_length:
        refused.append(
            f"data.block_length was {old_config.block_length} and is now {config.block_length}: the order of the data "
            "would change (set data.block_length to a length for all stages to come at the start of a run)"
        )
    elif config.batch_tokens == old_config.batch_tokens:
        past = _past_stages(build_plan(old_config), manifest.state.tokens)
        if _past_stages(plan, manifest.state.tokens) != past:
            refused.append(
                f"curriculum differs in its past: at {manifest.state.tokens} tokens, the stages were (from, seq_len) "
                f"{past}; only stages to come may change"
            )
        elif old_config.curriculum != config.curriculum:
            changed["curriculum"] = [old["config"]["curriculum"], config.model_dump(mode="json")["curriculum"]]
    if old["data_fingerprint"] != data_fingerprint:
        refused.append(f"the shards in {config.data.train} are not those that the run was started with")
    if old["world_size"] != world_size:
        refused.append(
            f"the checkpoint was written by {old['world_size']} process(es) and this is {world_size}: start with "
            f"{old['world_size']} (another number is not supported yet)"
        )
    if refused:
        raise UserError(
            f"run {config.run_dir} stands at step {manifest.state.step} and cannot go on with these changes:\n  "
            + "\n  ".join(refused)
            + "\nGo back to the old values, or give the new run another `name`, or start over with --resume never (the "
            "old folder is moved aside)"
        )
    return changed


def _past_stages(plan: Plan, tokens: int) -> list[tuple[int, int]] | str:
    """(start, seq_len) of every stage begun before ``tokens``; the order of the data so far depends on nothing else."""
    if tokens > plan.total_tokens:
        return f"over after {plan.total_tokens} tokens"
    stages = [(stage.start_tokens, stage.seq_len) for stage in plan.stages if stage.start_tokens < tokens]
    current = plan.stages[plan.stage_index(tokens)]
    on_edge = (tokens - current.start_tokens) % current.batch_tokens == 0
    return stages if on_edge else "not at the edge of a batch"


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        out: dict[str, Any] = {}
        for key, item in value.items():
            out.update(_flatten(item, f"{prefix}.{key}" if prefix else str(key)))
        return out
    return {prefix: value}
