"""Held-out loss in the loop, and what a causal model writes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from data_pipeline.batches import IGNORE
from data_pipeline.batches.loader import Batch, validation_batches
from data_pipeline.shards.shardset import ShardSet
from pretrain.config import RunConfig
from pretrain.distributed import randomness, watchdog
from pretrain.distributed.world import World
from pretrain.model.attention.layout import Layout
from pretrain.telemetry.lines import write_or_warn
from pretrain.telemetry.reports import perplexity

if TYPE_CHECKING:
    from pretrain.engine.training import TrainingEngine

SAMPLE_TOKENS = 64
PROMPT_TOKENS = 16


def validate(
    engine: TrainingEngine,
    shards: ShardSet,
    config: RunConfig,
    world: World,
    *,
    seq_len: int,
    micro_batch: int,
    stop: Callable[[], bool],
) -> dict[str, Any] | None:
    """Mean loss (nats) over the held-out targets, and for masked models the share of targets that are predicted right.

    Beside them, of a run with ``document_loss``, what it would add to the loss here, its weight included.

    Rows and noise are the same every time: masked tokens are those of ``data.masking.rate`` in every stage, whatever
    share the stage trains on, so that its numbers compare with those of other stages. Documents are packed where those
    of training are, with the default padding, so that the rows do not change with ``max_padding``. Returns None on all
    processes as soon as ``stop`` is true on one. The generators of training are left as they were.
    """
    masked = config.model.objective == "mlm"
    totals = [0.0, 0.0, 0.0, 0.0]  # loss, targets, right, document loss
    batches = validation_batches(
        shards,
        objective=config.model.objective,
        seq_len=seq_len,
        rows=micro_batch,
        max_tokens=config.validation.tokens or shards.num_tokens,  # a run has set it at its start
        seed=config.seed,
        masking=config.data.masking.build(),
        documents_apart=config.data.packing == "documents",
        rank=world.rank,
        world_size=world.world_size,
    )
    with randomness.preserved():
        for batch in batches:
            watchdog.at("validating")
            part = _evaluate(engine, batch, world.device, masked)
            *sums, stopped = world.sum([*part, float(stop())])
            if stopped:
                return None
            totals = [total + value for total, value in zip(totals, sums, strict=True)]
    loss_sum, targets, right, document_sum = totals
    loss = loss_sum / targets if targets else math.nan  # 0 would look like a perfect one
    result = {"loss": loss, "perplexity": perplexity(loss), "targets": int(targets), "seq_len": seq_len}
    if masked:
        result["accuracy"] = right / targets if targets else math.nan
    if config.document_loss:
        result["document_loss"] = config.document_loss * document_sum / targets if targets else math.nan
    return result


def validate_longest(
    engine: TrainingEngine,
    shards: ShardSet,
    config: RunConfig,
    world: World,
    *,
    seq_len: int,
    stop: Callable[[], bool],
) -> dict[str, Any] | None:
    """As :func:`validate`, at the longest length of the curriculum; nothing ({}) where that is ``seq_len`` itself.

    It tells how well the model of a short stage does at the length that the run ends with, before and after a change of
    stage. The names of the result begin with ``longest_``.
    """
    longest = max(config.curriculum, key=lambda stage: stage.seq_len)
    if longest.seq_len <= seq_len:
        return {}
    result = validate(
        engine, shards, config, world, seq_len=longest.seq_len, micro_batch=longest.micro_batch, stop=stop
    )
    return None if result is None else {f"longest_{name}": value for name, value in result.items()}


@torch.no_grad()
def _evaluate(engine: TrainingEngine, batch: Batch, device: torch.device, masked: bool) -> list[float]:
    """[loss sum, targets, right predictions, document loss sum] of this process's rows."""
    input_ids, labels = batch.input_ids.to(device), batch.labels.to(device)
    documents = batch.document_ids
    layout = Layout.full(*input_ids.shape) if documents is None else Layout.from_documents(documents)
    targets = labels != IGNORE
    # With labels the model computes no logits. A masked one is asked for the hidden states, and its head applied to the
    # targets here: loss and predictions come from one pass.
    out = engine.evaluate(input_ids, None if masked else labels, layout=layout, hidden=True)
    assert out.hidden is not None
    loss_sum, right = out.loss_sum, 0.0
    if masked:
        logits = engine.model.head(out.hidden[targets]).float()
        loss_sum = torch.nn.functional.cross_entropy(logits, labels[targets], reduction="sum")
        right = float((logits.argmax(-1) == labels[targets]).sum())
    assert loss_sum is not None
    document_sum = engine.model.document_sum(out.hidden, input_ids, labels, layout)
    return [float(loss_sum), float(targets.sum()), right, 0.0 if document_sum is None else float(document_sum)]


def write_samples(
    engine: TrainingEngine, shards: ShardSet, config: RunConfig, world: World, out: Path, step: int
) -> list[str]:
    """Let a causal model continue the beginnings of held-out documents; the first process writes ``out/stepN.txt``.

    Under ZeRO-3 every process generates, for each forward pass gathers the weights from all of them; the generator is
    seeded alike, and the text cannot end early, so that they stay in step.
    """
    from pretrain.model.generation import generate

    if not (world.is_first or engine.zero_stage == 3):
        return []
    tokenizer = shards.tokenizer()
    documents = shards.documents(limit=config.validation.samples)
    prompts = [document[:PROMPT_TOKENS].tolist() or [shards.eos_id] for document in documents]
    if not prompts:
        return []
    with randomness.preserved():
        written = generate(engine.model, prompts, max_new_tokens=SAMPLE_TOKENS, seed=config.seed)
    texts = [f"{tokenizer.decode(p)} ⟶ {tokenizer.decode(t)}" for p, t in zip(prompts, written, strict=True)]
    if world.is_first and texts:
        write_or_warn(out / f"step{step:09d}.txt", ("\n\n---\n\n".join(texts) + "\n").encode())
    return texts
