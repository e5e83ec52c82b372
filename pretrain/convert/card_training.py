"""The model card's sections on training data and training."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import PurePath

from data_pipeline.batches.order import Stage
from data_pipeline.units import count, format_bytes
from pretrain.checkpoint.load import LoadedModel
from pretrain.convert.markdown import code, listed, number, table
from pretrain.convert.run_record import RunRecord, SourceRecord
from pretrain.curriculum.plan import build_plan
from pretrain.curriculum.stages import stage_settings

MOST_INPUTS = 24


def data(loaded: LoadedModel, record: RunRecord) -> Iterator[str]:
    """The blocks of "Training data"."""
    yield "## Training data"
    if not loaded.tokens:
        yield "Unknown: these weights were not trained by nystrom-pretrain."
        return
    sources, total = record.sources, sum(source.weight for source in record.sources)
    rows = []
    for source in (*sources, *([record.held_out] if record.held_out else [])):
        known = source.manifest
        share = f"{source.weight / total:.1%}" if source is not record.held_out and total > 0 else "held out"
        rows.append(
            [
                code(source.name),
                share,
                f"{known.num_documents:,}" if known else "unknown",
                f"{known.num_tokens:,}" if known else "unknown",
                format_bytes(known.text_bytes) if known else "unknown",
            ]
        )
    yield table(["source", "share", "documents", "tokens", "text"], rows)
    for source in sources:
        yield _inputs(source, "Source")
    if record.held_out:
        yield _inputs(record.held_out, "Held-out text")
    if _held_out_is_read(record):
        yield "**The held-out text is also training text**: a loss on it says nothing about new text."
    if len(sources) == 1 and sources[0].manifest and loaded.tokens:
        times = loaded.tokens / sources[0].manifest.num_tokens
        yield f"Training read {times:.2f} times the tokens of the source."
    if any(source.manifest for source in sources):
        yield "The manifests record no licence of the texts: it is unknown here."
    packing = {
        "stream": "Documents are laid end to end, an end-of-text token after each, and cut into rows.",
        "documents": "Rows hold whole documents, and none attends to another. Padding counts as tokens.",
    }
    yield packing[loaded.run_config.data.packing]


def _held_out_is_read(record: RunRecord) -> bool:
    held_out = record.held_out.manifest if record.held_out else None
    read = [source.manifest.fingerprint for source in record.sources if source.manifest]
    return held_out is not None and held_out.fingerprint in read


def _inputs(source: SourceRecord, what: str) -> str:
    manifest = source.manifest
    if manifest is None:
        return (
            f"{what} {code(source.name)}: the shards were not found when this card was written: which texts it has, "
            "and under which licence, is unknown."
        )
    # Pieces of one dataset of the hub (NAME@COMMIT/CONFIG/SPLIT/0-of-8) are one input.
    names = list(dict.fromkeys(re.sub(r"/\d+-of-\d+$", "", entry.name) for entry in manifest.inputs))
    filters, dropped = manifest.settings.get("filters") or [], sum(manifest.dropped_documents.values())
    prepared = f"{count(len(filters), 'quality filter')}, " if filters else "No quality filter, "
    prepared += "duplicates removed" if manifest.settings.get("dedup") else "duplicates not looked for"
    if dropped:
        prepared += f"; {count(dropped, 'document')} left out"
    return (
        f"{what} {code(source.name)}: {listed(names, MOST_INPUTS)}. {prepared}. Fingerprint of the shards: "
        f"{code(manifest.fingerprint[:12])}."
    )


def training(loaded: LoadedModel, record: RunRecord) -> Iterator[str]:
    """The blocks of "Training"."""
    yield "## Training"
    if not loaded.tokens:
        yield "**Tokens seen with nystrom-pretrain: 0.** If and how the weights were trained elsewhere is unknown."
        return
    yield from _start(loaded, record)
    stages = build_plan(loaded.run_config).stages
    planned = stages[-1].end_tokens
    seen = f"**Tokens seen: {loaded.tokens:,}**"
    yield seen + (f" of the {planned:,} that were planned." if loaded.tokens < planned else ", the whole of the run.")
    yield from _curriculum(loaded, stages)
    config, optimizer = loaded.run_config, loaded.run_config.optimizer
    momentum = "" if optimizer.kind in ("adamw", "lion") else f", momentum {number(optimizer.momentum)}"
    own = momentum + "".join(f", {name} {number(value)}" for name, value in optimizer.settings.items())
    average = f", running average of the weights {number(optimizer.ema_decay)}" if optimizer.ema_decay else ""
    rows = [
        [
            "optimizer",
            f"{optimizer.kind}, peak learning rate {number(optimizer.lr)}, betas {number(optimizer.betas[0])} and "
            f"{number(optimizer.betas[1])}, weight decay {number(optimizer.weight_decay)}, "
            f"gradients clipped at norm {number(optimizer.grad_clip)}{own}{average}",
        ],
        ["schedule", _schedule(loaded)],
        ["precision", f"{config.precision}, ZeRO stage {config.zero_stage}"],
        ["dropout", number(config.model.dropout)],
        ["seed", str(config.seed)],
        *_environment(record),
    ]
    yield table(["setting", "value"], rows)


def _start(loaded: LoadedModel, record: RunRecord) -> Iterator[str]:
    if loaded.run_config.init_from is None:
        return
    source = record.init_from
    if not source:
        yield "The run started with trained weights, of which nothing else is recorded here."
        return
    name = code(PurePath(str(source.get("path"))).name)
    yield (
        f"The run started with the weights of {name} (hash {code(str(source.get('weights_hash'))[:12])}), which had "
        f"seen {number(source.get('tokens'))} tokens at lengths of up to {number(source.get('length'))}. The tokens "
        "below do not count those."
    )


def _curriculum(loaded: LoadedModel, stages: Sequence[Stage]) -> Iterator[str]:
    """The stages that these weights have been in."""
    config = loaded.run_config
    masked, several = loaded.model_config.objective == "mlm", len(config.data.sources) > 1
    rows = []
    for index, stage in enumerate(stages):
        if stage.start_tokens >= loaded.tokens:
            break
        row = [
            str(index + 1),
            f"{stage.seq_len:,}",
            f"{stage.batch_tokens:,}",
            f"{min(stage.end_tokens, loaded.tokens):,}",
        ]
        settings = stage_settings(config, index)
        if masked:
            row.append(f"{settings['masking_rate']:.1%}")
        if several:
            weights = config.stage_weights(index)
            row.append(", ".join(f"{code(name)} {w / sum(weights.values()):.1%}" for name, w in weights.items()))
        rows.append(row)
    columns = ["stage", "length", "tokens of a step", "until tokens"]
    yield table([*columns, *(["masked"] if masked else []), *(["sources"] if several else [])], rows)
    if masked:
        masking = config.data.masking
        unit = {"token": "single tokens", "word": "whole words", "span": "spans of words"}[masking.unit]
        yield (
            f"Targets are {unit}: {masking.mask_share:.0%} of them become the mask token, {masking.random_share:.0%} a "
            "random one."
        )


def _schedule(loaded: LoadedModel) -> str:
    schedule = loaded.run_config.schedule
    words = f"{schedule.kind}, warm-up {schedule.warmup_tokens:,} tokens"
    if schedule.kind == "wsd":
        length = "the last 20% of the run" if schedule.decay_tokens is None else f"{schedule.decay_tokens:,} tokens"
        words += f", decay over {length} ({schedule.decay_shape})"
    return words if schedule.kind == "constant" else words + f", down to {number(schedule.min_lr_ratio)} of the peak"


def _environment(record: RunRecord) -> Iterator[list[str]]:
    """Software and hardware of the last start. The host's name and its paths are nobody's business."""
    found = record.environment
    if not found:
        yield ["software", "unknown: the run's record was not there when this card was written"]
        return
    packages = found.get("packages") or {}
    software = [f"Python {found.get('python', 'unknown')}", *(f"{k} {v}" for k, v in packages.items() if v)]
    yield ["software", ", ".join(software) + (f" (last of {record.starts} starts)" if record.starts > 1 else "")]
    device, processes = str(found.get("device", "unknown")), found.get("world_size")
    cpu = f" ({found['cpu']})" if device == "cpu" and found.get("cpu") else ""
    yield ["hardware", f"{device}{cpu}; processes: {number(processes)}"]
    commit = (found.get("code") or {}).get("commit")
    if commit:
        changed = ", with changes" if found["code"].get("changed_since") else ""
        yield ["code", f"nystrom-pretrain, commit {code(commit[:12])}{changed}"]
