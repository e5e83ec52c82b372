"""May this configuration resume from that checkpoint? What is fixed for the life of a run, and what may change."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from data_pipeline.batches.mixture import PERIOD, quotas
from data_pipeline.batches.order import Plan
from data_pipeline.errors import UserError
from pretrain.checkpoint.commit import Manifest
from pretrain.config import RunConfig, parse_config
from pretrain.curriculum.plan import build_plan, slice_length
from pretrain.curriculum.stages import stage_settings
from pretrain.model.config import ROTARY_FIELDS
from pretrain.optim.schedule import learning_rate

# Dotted keys that the weights, the optimizer's state or the order of the data depend on. What only decides where the
# same numbers lie or are computed (processes, zero_stage, offload_optimizer, compile ...) may change.
FIXED = ("init_from", "init_length", "model", "seed", "optimizer.kind", "data.masking", "data.packing")
MOST_RISE = 1.1
"""A learning rate that is higher after a resume than before it by more than this factor is told."""
# Where something is, not what it is (the contents are compared by fingerprint), and what has a comparison of its own.
_ELSEWHERE = ("name", "output_dir", "data.train", "data.valid", "data.tokenizer")
# What may change without the steps to come being other ones.
_IMMATERIAL = ("checkpoint", "validation", "telemetry", "callbacks", "stall_seconds", "max_bad_steps", "data.valid")
ROTARY_KEYS = ROTARY_FIELDS
"""Keys of the model that a run takes from the source of its weights (``init_from``) if they are left out."""
COMPARED_BY_STAGE = ("batch_tokens", "model.rope_scaling", *(f"model.{key}" for key in ROTARY_KEYS))
"""Keys of the configuration outside ``curriculum`` that matter through the stages only."""


def changes_training(changed: Iterable[str]) -> bool:
    """Whether a resume with these changes (:func:`check_resume`) takes other steps than the run would have taken."""
    return any(
        not any(key == part or key.startswith(part + ".") for part in (*_IMMATERIAL, "processes")) for key in changed
    )


def identity(
    config: RunConfig,
    data_fingerprint: str,
    world_size: int,
    valid_fingerprint: str | None = None,
    source: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What a checkpoint keeps of its run, to be compared at a resume. Plain JSON values.

    ``source``: of the weights that it started with (``init_from``), with their hash.
    """
    return {
        **({} if source is None else {"init_from": source}),
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
    and back. The number of processes is there as ``processes``. ``precision: auto`` is no change, nor is
    ``validation.tokens`` left out: they are the checkpoint's. Raises :class:`UserError` that names every change that is
    not allowed.
    """
    old = manifest.identity
    old_config = _config_of(manifest)
    refused = _precision(old_config, config)
    if config.precision == "auto":
        config = config.model_copy(update={"precision": old_config.precision})
    if config.validation.tokens is None:
        config = config.with_validation_tokens(old_config.validation.tokens)
    config = with_start_of(config, old_config)
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
        past = trained_differences(old_config, build_plan(old_config), config, plan, manifest.state.tokens)
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
            f"run {config.run_dir} stands at step {manifest.state.step} and cannot resume with these changes:\n  "
            + "\n  ".join(refused)
            + "\nGo back to the old values, or give the new run another `name`, or start over with --resume never (the "
            "old folder is moved aside)"
        )
    return changed


def with_start_of(config: RunConfig, began: RunConfig) -> RunConfig:
    """``config`` with what the run settled when it took trained weights (``init_from``), where it leaves that out."""
    if began.init_from is None:
        return config
    known = [key for key in ROTARY_KEYS if key != "rope_original_length" or config.model.rope_scaling == "yarn"]
    left_out = [key for key in known if key not in config.model.model_fields_set]
    model = config.model.model_copy(update={key: getattr(began.model, key) for key in left_out})
    length = began.init_length if config.init_length is None else config.init_length
    return config.model_copy(update={"model": model, "init_length": length})


def describe_change(key: str, old: Any, new: Any) -> list[str]:
    """Lines in words about a change that :func:`check_resume` found: of the curriculum only what is different."""
    if key != "curriculum":
        return [f"{key} from {old} to {new}"]
    lines = []
    for i in range(max(len(old), len(new))):
        if i >= len(new):
            lines.append(f"curriculum.{i} is gone ({_stage_words(old[i])})")
        elif i >= len(old):
            lines.append(f"curriculum.{i} is new ({_stage_words(new[i])})")
        else:
            keys = [name for name in new[i] if old[i].get(name) != new[i][name]]
            lines += [f"curriculum.{i}.{name} from {old[i].get(name)} to {new[i][name]}" for name in keys]
    return lines


def _stage_words(stage: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in stage.items() if value is not None)


def extension(manifest: Manifest, plan: Plan) -> str | None:
    """What becomes of a run that had come to its end and is to train further; None if it had not, or is not to."""
    tokens = manifest.state.tokens
    if tokens < build_plan(_config_of(manifest)).total_tokens or plan.total_tokens <= tokens:
        return None
    return (
        f"extends a finished run of {tokens:,} tokens to {plan.total_tokens:,}; export/ holds the weights of step "
        f"{manifest.state.step} until the new end"
    )


def refuse_extension(manifest: Manifest, config: RunConfig, plan: Plan) -> None:
    """Raise :class:`UserError` if the configuration asks for more than a finished run was to train."""
    if extension(manifest, plan) is None:
        return
    tokens, jump = manifest.state.tokens, rate_jump(manifest, config, plan)
    raise UserError(
        f"run {config.run_dir} is finished after {tokens:,} tokens, and this configuration trains to "
        f"{plan.total_tokens:,}. To train the {plan.total_tokens - tokens:,} more and replace export/: --resume extend"
        f". To leave the run as it is, end the curriculum at until_tokens {_config_of(manifest).total_tokens}, or give "
        "the new run another `name`" + ("" if jump is None else f". If it is extended, {jump}")
    )


def _config_of(manifest: Manifest) -> RunConfig:
    return parse_config(manifest.identity["config"], where=f"checkpoint {manifest.tag}")


def rate_jump(manifest: Manifest, config: RunConfig, plan: Plan) -> str | None:
    """What to say if the changes raise the learning rate at once, as a longer run does after a decay; else None."""
    old = _config_of(manifest)
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
    """What is wrong with resuming in the precision that is asked for; ``auto`` asks for the one there was."""
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


@dataclasses.dataclass(frozen=True)
class TrainedStage:
    """A stage in which a step was made, with every default filled in.

    Its settings shaped the order of the data, the noise or the weights, and are fixed. What counts is what a stage
    really had, and not where in the configuration that was written: a default may move into the stages, and a rule may
    change where it has not applied yet.
    """

    start_tokens: int
    seq_len: int
    settings: dict[str, float]
    weights: dict[str, float]  # shares of the sources


def trained_stages(config: RunConfig, plan: Plan, tokens: int) -> list[TrainedStage]:
    """Every stage begun before ``tokens``, in order."""
    out: list[TrainedStage] = []
    for i, stage in enumerate(plan.stages):
        if stage.start_tokens >= tokens:
            break
        weights = config.stage_weights(i)
        counts = quotas(list(weights.values()), list(weights))
        shares = {name: count / PERIOD for name, count in zip(weights, counts, strict=True)}
        out.append(TrainedStage(stage.start_tokens, stage.seq_len, stage_settings(config, i), shares))
    return out


def trained_differences(old: RunConfig, old_plan: Plan, new: RunConfig, new_plan: Plan, tokens: int) -> list[str]:
    """What of the past a new configuration would change: a line for each fault, naming the stage and its key.

    ``tokens`` is where the run stands under the old configuration. What ``data.masking`` says is compared elsewhere.
    """
    if tokens > new_plan.total_tokens:
        return [f"curriculum differs in its past: it is over after {new_plan.total_tokens} tokens, at {tokens} tokens"]
    new = new.model_copy(update={"data": new.data.model_copy(update={"masking": old.data.masking})})
    before, now = trained_stages(old, old_plan, tokens), trained_stages(new, new_plan, tokens)
    were, are = ([(s.start_tokens, s.seq_len) for s in stages] for stages in (before, now))
    if were != are:
        return [
            f"curriculum differs in its past: at {tokens} tokens, the stages were (from, seq_len) {were} and are now "
            f"{are}; only stages to come may change"
        ]
    faults = []
    for i, (was, is_now) in enumerate(zip(before, now, strict=True)):
        here = f"stage {i} began at {was.start_tokens} tokens and the run stands at {tokens}"
        for key, value, value_now in _pairs(was.settings, is_now.settings):
            if value_now != value:
                faults.append(
                    f"curriculum differs in its past: curriculum.{i}.{key} was {value} and is now {value_now} ({here}; "
                    "only stages to come may change)"
                )
    changes, wanted = _changes(before), _changes(now)
    if changes != wanted:
        faults.append(
            f"the weights of the sources differ in the past: at {tokens} tokens, they were (from, weights) {changes}; "
            "only those of stages to come may change"
        )
    return faults


def _pairs(was: Mapping[str, float], is_now: Mapping[str, float]) -> Iterator[tuple[str, float | None, float | None]]:
    """Each setting with both values. A key that only one has tells YaRN from linear positions; otherwise objective or
    positions are others, which is refused elsewhere."""
    for key in dict.fromkeys((*was, *is_now)):
        if key == "rope_original_length" or (key in was and key in is_now):
            yield key, was.get(key), is_now.get(key)


def _changes(stages: list[TrainedStage]) -> list[tuple[int, dict[str, float]]]:
    """(start, shares) of every stage that changed the shares."""
    out: list[tuple[int, dict[str, float]]] = []
    for stage in stages:
        if not out or out[-1][1] != stage.weights:
            out.append((stage.start_tokens, stage.weights))
    return out
