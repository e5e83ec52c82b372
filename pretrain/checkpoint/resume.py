"""May this configuration go on with that checkpoint? What is fixed for the life of a run, and what may change."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from data_pipeline.batches.order import Plan
from data_pipeline.errors import UserError
from pretrain.checkpoint.commit import Manifest
from pretrain.config import RunConfig, parse_config
from pretrain.curriculum.past import COMPARED_BY_STAGE, past_differs
from pretrain.curriculum.plan import build_plan, slice_length
from pretrain.optim.schedule import learning_rate

# Dotted keys that the weights, the optimizer's state or the order of the data depend on. What only decides where the
# same numbers lie or are computed (processes, zero_stage, offload_optimizer, compile ...) may change.
FIXED = ("model", "seed", "optimizer.kind", "data.masking", "data.packing")
MOST_RISE = 1.1
"""A learning rate that is higher after a resume than before it by more than this factor is told."""
# Where something is, not what it is (the contents are compared by fingerprint), and what has a comparison of its own.
_ELSEWHERE = ("name", "output_dir", "data.train", "data.valid", "data.tokenizer")
# What may change without the steps to come being other ones.
_BESIDE = ("checkpoint", "validation", "telemetry", "callbacks", "stall_seconds", "max_bad_steps", "data.valid")


def trains_otherwise(changed: Iterable[str]) -> bool:
    """Whether a resume with these changes (:func:`check_resume`) takes other steps than the run would have taken."""
    return any(
        not any(key == part or key.startswith(part + ".") for part in (*_BESIDE, "processes")) for key in changed
    )


def identity(
    config: RunConfig, data_fingerprint: str, world_size: int, valid_fingerprint: str | None = None
) -> dict[str, Any]:
    """What a checkpoint keeps of its run, to be compared at a resume. Plain JSON values."""
    return {
        "config": config.model_dump(mode="json"),
        "data_fingerprint": data_fingerprint,
        "valid_fingerprint": valid_fingerprint,
        "world_size": world_size,
    }


def check_resume(
    manifest: Manifest,
    config: RunConfig,
    plan: Plan,
    data_fingerprint: str,
    world_size: int,
    valid_fingerprint: str | None = None,
) -> dict[str, Any]:
    """Compare a checkpoint with what is asked for now.

    Returns the changes that are allowed, {dotted key: [old, new]}: learning rate and its schedule, stages to come,
    micro-batches, validation and the held-out text, checkpoints, telemetry, callbacks, the ZeRO stage, bf16 for fp32
    and fp32 for bf16 and, as ``processes``, their number. ``precision: auto`` is no change: it is the checkpoint's.
    Raises :class:`UserError` that names every change that is not allowed.
    """
    old = manifest.identity
    old_config = parse_config(old["config"], where=f"checkpoint {manifest.tag}")
    refused = _precision(old_config, config)
    if config.precision == "auto":
        config = config.model_copy(update={"precision": old_config.precision})
    # What the checkpoint's version did not know yet had its default value.
    before, now = _flatten(old_config.model_dump(mode="json")), _flatten(config.model_dump(mode="json"))
    changed: dict[str, Any] = {}
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) == now.get(key) or key.startswith(("curriculum", "data.block_length")) or key in _ELSEWHERE:
            continue
        if key not in COMPARED_BY_STAGE and any(key == fixed or key.startswith(fixed + ".") for fixed in FIXED):
            refused.append(f"{key} was {before.get(key)!r} and is now {now.get(key)!r}")
        else:
            changed[key] = [before.get(key), now.get(key)]
    if old_config.block_length != config.block_length:
        refused.append(
            f"data.block_length was {old_config.block_length} and is now {config.block_length}: the order of the data "
            "would change (set data.block_length to a length for all stages to come at the start of a run)"
        )
    else:
        past = past_differs(old_config, build_plan(old_config), config, plan, manifest.state.tokens)
        refused += past
        if not past and old_config.curriculum != config.curriculum:
            changed["curriculum"] = [old["config"]["curriculum"], config.model_dump(mode="json")["curriculum"]]
    repacked = _repacked(old_config, config)
    refused += repacked
    # The fingerprint covers the packing too: what is refused by name is not said twice.
    if old["data_fingerprint"] != data_fingerprint and not repacked and old_config.data.packing == config.data.packing:
        paths = " and ".join(source.path for source in config.data.sources)
        names = ", ".join(source.name for source in old_config.data.sources)
        were = f" (its sources were {names})" if len(old_config.data.sources) > 1 else ""
        refused.append(f"the shards in {paths} are not those that the run was started with{were}")
    changed |= _other_held_out_text(old_config, config, old.get("valid_fingerprint"), valid_fingerprint)
    if old["world_size"] != world_size:
        changed["processes"] = [old["world_size"], world_size]
    if refused:
        raise UserError(
            f"run {config.run_dir} stands at step {manifest.state.step} and cannot go on with these changes:\n  "
            + "\n  ".join(refused)
            + "\nGo back to the old values, or give the new run another `name`, or start over with --resume never (the "
            "old folder is moved aside)"
        )
    return changed


def rate_jump(manifest: Manifest, config: RunConfig, plan: Plan) -> str | None:
    """What to say if the changes raise the learning rate at once, as a longer run does after a decay; else None."""
    old = parse_config(manifest.identity["config"], where=f"checkpoint {manifest.tag}")
    tokens, lengths = manifest.state.tokens, (build_plan(old).total_tokens, plan.total_tokens)
    before, now = (
        learning_rate(tokens, total_tokens=total, peak=run.optimizer.lr, schedule=run.schedule)
        for run, total in zip((old, config), lengths, strict=True)
    )
    if tokens >= plan.total_tokens or now <= MOST_RISE * before:
        return None
    return (
        f"the learning rate rises from {before:.3g} to {now:.3g} in one step: that is where {config.schedule.kind} "
        f"over {lengths[1]:,} tokens stands, and where {old.schedule.kind} over {lengths[0]:,} stood. A run that is to "
        "be extended is better resumed from a checkpoint before its decay"
    )


def _other_held_out_text(
    old: RunConfig, new: RunConfig, fingerprint: str | None, now: str | None
) -> dict[str, list[str | None]]:
    """Losses before and after are of different texts then. A checkpoint of an older version tells the path only."""
    paths = [old.data.valid, new.data.valid]
    if fingerprint is None or now is None:
        return {"data.valid": paths} if paths[0] != paths[1] else {}
    if fingerprint == now:
        return {}  # the same text, wherever it is
    marks = (fingerprint, now)
    return {"data.valid": [f"{path} (hash {mark[:8]})" for path, mark in zip(paths, marks, strict=True)]}


def _precision(old: RunConfig, new: RunConfig) -> list[str]:
    """What is wrong with going on in the precision that is asked for; ``auto`` asks for the one there was."""
    if new.precision == "auto" and new.zero_stage == 0 and old.precision != "fp32":
        return [
            f"zero_stage is now 0, which has fp32 only, and the run is in {old.precision}"
            + (" (--set precision=fp32 changes that too)" if old.precision == "bf16" else "")
        ]
    # fp16's gradients are scaled by what its last steps came to; nobody tried to leave it or to begin in the middle.
    if new.precision not in ("auto", old.precision) and "fp16" in (new.precision, old.precision):
        return [
            f"precision was {old.precision!r} and is now {new.precision!r}: only bf16 and fp32 take each other's place"
        ]
    return []


def _repacked(old: RunConfig, new: RunConfig) -> list[str]:
    """What besides the text decides how documents are packed, and has changed."""
    if not old.data.packing == new.data.packing == "documents":
        return []
    faults = []
    if new.data.max_padding != old.data.max_padding:
        faults.append(f"data.max_padding was {old.data.max_padding} and is now {new.data.max_padding}")
    before, now = (slice_length(build_plan(config)) for config in (old, new))
    if before != now:
        faults.append(f"the common divisor of the curriculum's lengths was {before} and is now {now}")
    return [f"{fault}: the documents would be packed anew" for fault in faults]


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        out: dict[str, Any] = {}
        for key, item in value.items():
            out.update(_flatten(item, f"{prefix}.{key}" if prefix else str(key)))
        return out
    return {prefix: value}
