"""Does the configuration fit the data and the processes? All that can be known before the slow imports."""

from __future__ import annotations

from data_pipeline.errors import UserError
from data_pipeline.shards.shardset import ShardSet
from data_pipeline.tokenization.roles import check_objective
from pretrain.callbacks import check_callbacks
from pretrain.config import RunConfig
from pretrain.curriculum.plan import build_plan, check_world_size
from pretrain.engine.deepspeed_config import build_deepspeed_config
from pretrain.sources import Inputs, check_sample, fingerprint, open_sources
from pretrain.telemetry.trackers import check_trackers


def check_inputs(config: RunConfig, world_size: int) -> Inputs:
    """Open the shards and compare them with the configuration; raises :class:`UserError` for what would fail later."""
    _check_deepspeed(config)
    check_trackers(config.telemetry)
    check_callbacks(config.callbacks)
    plan = build_plan(config)
    check_world_size(plan, world_size)
    expected = None
    if config.data.tokenizer is not None:
        from data_pipeline.tokenization.tokenizer import Tokenizer

        expected = Tokenizer.load(config.data.tokenizer).hash
    train = open_sources(config, plan, expected)
    for blocks in train.blocks:
        check_sample(blocks.shards)
    shards = train.shards
    check_objective(shards.manifest.special_ids, config.model.objective, f"the shards in {shards.path}")
    vocab_size = config.model.vocab_size or shards.vocab_size
    if vocab_size < shards.vocab_size:
        raise UserError(
            f"model.vocab_size {vocab_size} does not match the shards in {shards.path}, whose tokenizer has "
            f"{shards.vocab_size} tokens: leave model.vocab_size out (it then follows the shards) or use shards made "
            "with the other tokenizer"
        )
    valid = None
    if config.data.valid is not None:
        valid = ShardSet.open(config.data.valid)
        check_sample(valid)
        if valid.tokenizer_hash != shards.tokenizer_hash:
            raise UserError(
                f"the shards in {valid.path} were made with another tokenizer than those in {shards.path}: "
                "prepare both with the same"
            )
        longest = max(stage.seq_len for stage in plan.stages)
        if valid.num_tokens - 1 < longest:
            raise UserError(
                f"the held-out shards in {valid.path} hold {valid.num_tokens} tokens, less than one row of {longest}: "
                "prepare more held-out text, or shorten the longest curriculum seq_len"
            )
    resolved = config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": vocab_size})})
    return Inputs(resolved, plan, train, fingerprint(config, plan, train), valid)


def _check_deepspeed(config: RunConfig) -> None:
    """The block ``deepspeed:`` must fit whatever ``precision: auto`` comes to."""
    if config.precision != "auto":
        build_deepspeed_config(config)
        return
    for precision in ("fp32",) if config.zero_stage == 0 else ("bf16", "fp32"):
        try:
            build_deepspeed_config(config.model_copy(update={"precision": precision}))
        except UserError as error:
            raise UserError(
                f"{error} (precision is auto, which may come to {precision}; name the one you mean)"
                if "with precision" in str(error)
                else str(error)
            ) from None
