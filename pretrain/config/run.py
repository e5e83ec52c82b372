"""A whole pretraining run as one typed value: strict keys, frozen, checked for contradictions."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, model_validator

from data_pipeline.configuration import Strict
from pretrain.config.data import DataConfig
from pretrain.config.optimizer import OptimizerConfig, ScheduleConfig
from pretrain.config.outputs import CallbackConfig, CheckpointConfig, TelemetryConfig, ValidationConfig
from pretrain.model.config import ModelConfig


class StageConfig(Strict):
    """One stage of the curriculum: a length, and what else changes with it."""

    until_tokens: int = Field(
        gt=0,
        description="Tokens of the run at which the stage ends, counted from the run's start. It must increase from "
        "stage to stage. The last one is the length of the run. The end is rounded up so that no token is lost.",
    )
    seq_len: int = Field(
        gt=1, description="Tokens of a row in this stage. It must divide `data.block_length`; powers of two do."
    )
    micro_batch: int = Field(
        gt=0,
        description="Rows that one process holds in memory at a time. It changes memory and speed, not the batch of an "
        "optimizer step.",
    )
    weights: dict[str, Annotated[float, Field(ge=0.0, allow_inf_nan=False)]] | None = Field(
        None,
        description="Shares of the tokens by name of the source, in any scale. Every source needs one; 0 leaves it "
        "out.",
        json_schema_extra={"left_out": "those of data.train"},
    )
    batch_tokens: int | None = Field(
        None,
        gt=0,
        description="Tokens of one optimizer step in this stage, over all processes. A multiple of "
        "`data.block_length`.",
        json_schema_extra={"left_out": "the run's batch_tokens"},
    )
    masking_rate: float | None = Field(
        None,
        gt=0.0,
        lt=1.0,
        description="Share of ordinary tokens that become targets in this stage. Objective mlm only. Validation keeps "
        "`data.masking.rate` in every stage, so that its losses compare.",
        json_schema_extra={"left_out": "data.masking.rate"},
    )
    rope_theta: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Base of the rotary angles from this stage on. It wins over the rule `model.rope_scaling`, which "
        "continues from it.",
        json_schema_extra={"left_out": "as before, by model.rope_scaling"},
    )


class RunConfig(Strict):
    """A whole pretraining run."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="Name of the run. The same name in the same `output_dir` resumes that run.",
    )
    output_dir: str = Field(
        "runs",
        description="Folder of the run folders, relative to the working directory. A run writes `output_dir/name`.",
    )
    seed: int = Field(
        1234, ge=0, lt=2**63, description="Decides the initial weights, the order of the data, the masks and dropout."
    )
    init_from: str | None = Field(
        None,
        min_length=1,
        description="Folder of a run, a checkpoint or an export whose weights a new run starts with. A resume does not "
        "need it again.",
        json_schema_extra={"left_out": "weights drawn by seed"},
    )
    init_length: int | None = Field(
        None,
        gt=0,
        description="Only with `init_from`: the longest sequence that those weights were trained on, in tokens. Rules "
        "for positions begin there.",
        json_schema_extra={"left_out": "as the source says"},
    )
    model: ModelConfig = Field(description="The network. A resume takes no other one.")
    data: DataConfig = Field(description="Where the tokens are, and how they become rows.")
    curriculum: tuple[StageConfig, ...] = Field(
        min_length=1, description="Stages in order, each with its length. One stage is a run at one length."
    )
    batch_tokens: int = Field(
        gt=0,
        description="Tokens of one optimizer step, over all micro-batches and processes. A multiple of "
        "`data.block_length`. A stage may have its own.",
    )
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto",
        description="Number format of weights and activations in the passes; master weights are float32 always. auto: "
        "bf16 where the machine is faster in it, else fp32. A run keeps what it began in.",
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        2,
        description="What ZeRO divides among processes. 1: optimizer states. 2: gradients too. 3: weights too, with "
        "more communication. 0: nothing, in fp32 only.",
    )
    offload_optimizer: bool = Field(
        False,
        description="Keep optimizer states in the host's memory (ZeRO-Offload). Saves GPU memory, costs time. Not with "
        "`zero_stage: 0`.",
    )
    activation_checkpointing: bool = Field(
        False,
        description="Keep each layer's input only and compute the rest again in the backward pass. Saves memory, costs "
        "about a forward pass.",
    )
    compile: bool = Field(
        False, description="Run layers through torch.compile. Each length compiles anew. Not with `zero_stage: 3`."
    )
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="The rule that turns gradients into steps.")
    z_loss: float = Field(
        0.0,
        ge=0.0,
        allow_inf_nan=False,
        description="Weight of the squared log-partition of the logits in the training loss of each target; PaLM has "
        "1e-4. It keeps logits from drifting. Reported losses are without it. 0: none.",
    )
    document_loss: float = Field(
        0.0,
        ge=0.0,
        allow_inf_nan=False,
        description="Weight in the training loss of the document objective: a document's mean state predicts which "
        "tokens it has. For classification and retrieval. Reported losses are without it. 0: none.",
    )
    schedule: ScheduleConfig = Field(ScheduleConfig(), description="Learning rate as a function of tokens seen.")
    checkpoint: CheckpointConfig = Field(
        CheckpointConfig(), description="When a checkpoint is written, and how many stay."
    )
    validation: ValidationConfig = Field(
        ValidationConfig(), description="Held-out loss while training. Needs `data.valid`."
    )
    telemetry: TelemetryConfig = Field(
        TelemetryConfig(), description="What is written while training, besides metrics.jsonl."
    )
    max_bad_steps: int = Field(
        5,
        gt=0,
        description="Optimizer steps in a row with a non-finite loss or gradient that end the run, with status 76. "
        "Each is skipped.",
    )
    callbacks: tuple[CallbackConfig, ...] = Field(
        (),
        description="Classes that are called while the run trains, each `my.module:Class`, or `call` with `settings`.",
    )
    stall_seconds: float = Field(
        1800.0,
        gt=0,
        description="Seconds without progress of a process that end the run, with status 77 and its name. Below 20 "
        "imports may look like a stall.",
    )
    deepspeed: dict[str, Any] = Field(
        default_factory=dict,
        description="Keys that only DeepSpeed has, merged into its JSON. Unknown and contradicting ones are refused.",
    )

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        ends = [stage.until_tokens for stage in self.curriculum]
        if ends != sorted(set(ends)):
            raise ValueError(f"curriculum: until_tokens must increase from stage to stage, got {ends}")
        block = self.block_length
        for i, stage in enumerate(self.curriculum):
            if stage.seq_len > block:
                raise ValueError(
                    f"curriculum.{i}.seq_len {stage.seq_len} is longer than data.block_length {block}: raise it "
                    "(or leave it out, it then follows the longest stage) or shorten the stage"
                )
            if block % stage.seq_len:
                raise ValueError(
                    f"curriculum.{i}.seq_len {stage.seq_len} does not divide the block of {block} tokens: every length "
                    "must divide the longest, so that no token is lost at a switch (powers of two do)"
                )
            if stage.weights is not None:
                self._check_weights(i, stage.weights)
            if stage.rope_theta is not None and not self.model.rotary:
                raise ValueError(
                    f"curriculum.{i}.rope_theta has no effect with model.positions: {self.model.positions}"
                )
            if stage.rope_theta is not None and stage.rope_theta <= 1 and self.model.rope_scaling == "yarn":
                raise ValueError(
                    f"curriculum.{i}.rope_theta {stage.rope_theta}: rope_scaling yarn needs a base above 1"
                )
            if stage.masking_rate is not None and self.model.objective != "mlm":
                raise ValueError(f"curriculum.{i}.masking_rate has no effect with model.objective: clm")
            if stage.batch_tokens is not None:
                self._check_batch(f"curriculum.{i}.batch_tokens", stage.batch_tokens)
        self._check_batch("batch_tokens", self.batch_tokens)
        if self.model.trained_positions is not None:
            raise ValueError("model.trained_positions follows from the curriculum: leave it out")
        if self.init_length is not None and self.init_from is None:
            raise ValueError("init_length has no effect without init_from")
        if self.zero_stage == 0 and self.precision not in ("auto", "fp32"):
            raise ValueError(
                f"zero_stage 0 with {self.precision} is refused: DeepSpeed 0.19.8 takes a phantom optimizer step there "
                "and trains wrongly; use zero_stage 1 or more, or precision fp32"
            )
        if self.schedule.warmup_tokens >= self.total_tokens:
            raise ValueError(
                f"schedule.warmup_tokens {self.schedule.warmup_tokens} leaves nothing of the run's "
                f"{self.total_tokens} tokens"
            )
        return self

    def _check_batch(self, key: str, tokens: int) -> None:
        block = self.block_length
        if tokens % block:
            raise ValueError(
                f"{key} {tokens} is not a multiple of the longest length, {block}: use {-(-tokens // block) * block}"
            )

    def _check_weights(self, stage: int, weights: dict[str, float]) -> None:
        names = [source.name for source in self.data.sources]
        for name in weights:
            if name not in names:
                close = difflib.get_close_matches(name, names, n=1)
                hint = f"did you mean '{close[0]}'?" if close else f"the sources are {', '.join(names)}"
                raise ValueError(f"curriculum.{stage}.weights: there is no source '{name}': {hint}")
        missing = [name for name in names if name not in weights]
        if missing:
            raise ValueError(
                f"curriculum.{stage}.weights leaves out {', '.join(missing)}: give every source a weight (0 for none)"
            )

    def stage_weights(self, stage: int) -> dict[str, float]:
        """The weight of each source, by name, in one stage of the curriculum."""
        own = self.curriculum[stage].weights
        return {s.name: s.weight if own is None else own[s.name] for s in self.data.sources}

    def with_validation_tokens(self, tokens: int | None) -> RunConfig:
        """This configuration with ``validation.tokens`` of that value."""
        return self.model_copy(update={"validation": self.validation.model_copy(update={"tokens": tokens})})

    @property
    def block_length(self) -> int:
        """Tokens of the unit that is shuffled."""
        return self.data.block_length or max(stage.seq_len for stage in self.curriculum)

    @property
    def total_tokens(self) -> int:
        """Tokens of the whole run as asked for (the plan rounds each stage up to the end of a window)."""
        return self.curriculum[-1].until_tokens

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return Path(self.output_dir) / self.name

    def to_yaml(self) -> str:
        """The configuration as YAML that :func:`load_config` reads back to an equal object."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
