"""The one typed configuration of a pretraining run: a YAML file, strict keys, dotted overrides.

Everything that a run does follows from this object; it is written to the run folder as ``config.yaml`` and read back
from there. The DeepSpeed JSON is generated from it (``pretrain/deepspeed_config.py``), never written by hand.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from data_pipeline.batches.masking import Masking
from data_pipeline.errors import UserError
from pretrain.model.config import ModelConfig


class Strict(BaseModel):
    """Base of every block: unknown keys are refused, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class MaskingConfig(Strict):
    """What masked language modeling hides (``data_pipeline/batches/masking.py``); read only for ``objective: mlm``."""

    rate: float = Field(0.15, gt=0.0, lt=1.0, description="share of ordinary tokens that become targets")
    mask_share: float = Field(
        0.8, ge=0.0, le=1.0, description="of the targets, how many are replaced by the mask token"
    )
    random_share: float = Field(0.1, ge=0.0, le=1.0, description="of the targets, how many by a random ordinary token")
    unit: Literal["token", "word", "span"] = Field(
        "token", description="what becomes a target as a whole: a token, a word, or a span of words (SpanBERT)"
    )
    span_p: float = Field(0.2, gt=0.0, le=1.0, description="span: parameter of the geometric length in words")
    span_max: int = Field(10, ge=1, le=255, description="span: the most words")

    @model_validator(mode="after")
    def _check(self) -> MaskingConfig:
        if self.mask_share + self.random_share > 1.0:
            raise ValueError(f"mask_share {self.mask_share} + random_share {self.random_share} is more than 1")
        return self

    def build(self) -> Masking:
        """The same values as the data pipeline takes them."""
        return Masking(**self.model_dump())


class SourceConfig(Strict):
    """One of several sources of training text."""

    path: str = Field(description="folder of shards written by `nystrom data prepare`")
    weight: float = Field(
        ge=0.0, allow_inf_nan=False, description="share of the tokens; any scale, 0 leaves the source out"
    )
    name: str = Field("", description="what stages and metrics call it; left out: the folder's name")

    @model_validator(mode="before")
    @classmethod
    def _name(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and not raw.get("name") and isinstance(raw.get("path"), str):
            return {**raw, "name": Path(raw["path"]).name or "train"}
        return raw


_TRAIN_TAGS = ("folder", "sources")


class DataConfig(Strict):
    """Where the tokens are and how they become rows. Paths are relative to the working directory."""

    train: Annotated[
        Annotated[str, Tag(_TRAIN_TAGS[0])]
        | Annotated[tuple[SourceConfig, ...], Field(min_length=1), Tag(_TRAIN_TAGS[1])],
        Discriminator(lambda value: _TRAIN_TAGS[isinstance(value, (list, tuple))]),
    ] = Field(description="folder of shards written by `nystrom data prepare`, or a list of sources")
    valid: str | None = Field(None, description="held-out shards; without them there is no validation in the loop")
    tokenizer: str | None = Field(None, description="tokenizer folder to check the shards against; normally left out")
    block_length: int | None = Field(
        None, gt=0, description="tokens of the unit that is shuffled; left out: the longest seq_len of the curriculum"
    )
    packing: Literal["stream", "documents"] = Field(
        "stream",
        description="stream: rows are cut from the documents laid end to end; documents: whole documents are packed "
        "into rows, and none attends to another",
    )
    max_padding: float = Field(0.02, ge=0.0, lt=1.0, description="packing documents: share of padding at most")
    masking: MaskingConfig = MaskingConfig()

    @model_validator(mode="after")
    def _check_names(self) -> DataConfig:
        names = [source.name for source in self.sources]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"train: two sources are called '{name}': give them names of their own (name: ...)")
        return self

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """The sources by name, so that the order of the list in the file does not matter."""
        if isinstance(self.train, str):
            return (SourceConfig(path=self.train, weight=1.0),)
        return tuple(sorted(self.train, key=lambda source: source.name))


class StageConfig(Strict):
    """One stage of the length curriculum."""

    until_tokens: int = Field(
        gt=0, description="the stage ends at this many tokens of the run (rounded up, see order.py)"
    )
    seq_len: int = Field(gt=1)
    micro_batch: int = Field(gt=0, description="rows that one process holds in memory at a time")
    weights: dict[str, Annotated[float, Field(ge=0.0, allow_inf_nan=False)]] | None = Field(
        None, description="of the sources by name, all of them; left out: those of data.train"
    )


class OptimizerConfig(Strict):
    """AdamW (Loshchilov & Hutter 2019); no weight decay on norms, biases and other vectors."""

    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    grad_clip: float = Field(1.0, ge=0, description="largest norm of the global gradient; 0 does not clip")


class ScheduleConfig(Strict):
    """Learning rate as a function of tokens seen."""

    kind: Literal["wsd", "cosine", "linear", "constant"] = "cosine"
    warmup_tokens: int = Field(0, ge=0)
    decay_tokens: int | None = Field(
        None, gt=0, description="wsd only: length of the final decay; left out: 20% of the run"
    )
    min_lr_ratio: float = Field(0.1, ge=0.0, le=1.0, description="the last learning rate as a share of the peak")


class CheckpointConfig(Strict):
    """When a checkpoint is committed and how many stay."""

    every_tokens: int | None = Field(None, gt=0, description="left out: only at the end and on SIGTERM")
    keep_last: int = Field(2, gt=0)


class ValidationConfig(Strict):
    """Held-out loss in the loop."""

    every_tokens: int | None = Field(None, gt=0, description="left out: only at the end of each stage")
    tokens: int = Field(131_072, gt=0, description="tokens of the held-out set that one validation reads")
    samples: int = Field(1, ge=0, description="texts generated at each validation (objective clm)")


class TelemetryConfig(Strict):
    """What is written while training, beside metrics.jsonl, which always is."""

    wandb: Literal["offline", "online", "disabled"] = "offline"
    wandb_project: str = "nystrom"
    log_every_steps: int = Field(10, gt=0)
    peak_flops: float | None = Field(
        None, gt=0, description="peak FLOP/s of one device, for MFU; left out: known GPUs only"
    )


class RunConfig(Strict):
    """A whole pretraining run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    output_dir: str = Field("runs", description="the run folder is output_dir/name")
    seed: int = Field(1234, ge=0, lt=2**63)
    model: ModelConfig
    data: DataConfig
    curriculum: tuple[StageConfig, ...] = Field(min_length=1)
    batch_tokens: int = Field(
        gt=0, description="tokens of one optimizer step, over all processes; the same in every stage"
    )
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    zero_stage: Literal[0, 1, 2, 3] = 2
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig = ValidationConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    max_bad_steps: int = Field(5, gt=0, description="stop after this many non-finite steps in a row")
    deepspeed: dict[str, Any] = Field(default_factory=dict, description="passed through to the DeepSpeed JSON")

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
            if self.model.positions == "learned" and stage.seq_len > self.model.max_positions:
                raise ValueError(
                    f"curriculum.{i}.seq_len {stage.seq_len} is longer than model.max_positions "
                    f"{self.model.max_positions}: raise max_positions or use positions: rotary"
                )
            if stage.weights is not None:
                self._check_weights(i, stage.weights)
        if self.batch_tokens % block:
            raise ValueError(
                f"batch_tokens {self.batch_tokens} is not a multiple of the longest length, {block}: "
                f"use {-(-self.batch_tokens // block) * block}"
            )
        if self.zero_stage == 0 and self.precision != "fp32":
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


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML run configuration and apply ``key.sub=value`` overrides (``curriculum.0.seq_len=256`` in a list).

    Raises :class:`UserError` with the file and the key for a missing file, bad YAML, an unknown key or a bad value.
    """
    path = Path(path)
    if not path.is_file():
        near = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = f"; {path.parent} has {', '.join(near)}" if near else ""
        raise UserError(f"configuration {path} does not exist{hint}")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} must hold keys and values at the top, not {type(raw).__name__}")
    for override in overrides:
        _apply_override(raw, override)
    return parse_config(raw, where=str(path))


def parse_config(raw: dict[str, Any], where: str = "configuration") -> RunConfig:
    """Validate a plain dictionary; raises :class:`UserError` that lists every fault with its dotted key."""
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        lines = [_describe(e) for e in error.errors()]
        raise UserError(f"{where}: " + ("; ".join(lines) if len(lines) == 1 else "\n  " + "\n  ".join(lines))) from None


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, sep, text = override.partition("=")
    if not sep or not key:
        raise UserError(f"--set {override}: write it as key.sub=value, for example optimizer.lr=3e-4")
    value = _yaml_scalar(text)
    node: Any = raw
    parts = key.split(".")
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise UserError(
                    f"--set {override}: '{'.'.join(parts[:depth])}' is a list of {len(node)}, no item '{part}'"
                )
            index: Any = int(part)
        elif isinstance(node, dict):
            index = part
            if not last and node.get(part) is None:
                node[part] = {}
        else:
            raise UserError(f"--set {override}: '{'.'.join(parts[:depth])}' is a single value and has no '{part}'")
        if last:
            node[index] = value
        else:
            node = node[index]


def _yaml_scalar(text: str) -> Any:
    value = yaml.safe_load(text) if text else ""
    if isinstance(value, str):  # YAML 1.1 reads 3e-4 as a string
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _describe(error: Any) -> str:
    parts = tuple(error["loc"])
    if parts[:2] == ("data", "train") and parts[2:3] and parts[2] in _TRAIN_TAGS:  # which of two forms it was taken for
        parts = (*parts[:2], *parts[3:])
    loc = ".".join(str(part) for part in parts)
    if error["type"] == "extra_forbidden":
        known = _known_keys(parts[:-1])
        close = difflib.get_close_matches(str(parts[-1]), known, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"known keys: {', '.join(known)}"
        return f"unknown key '{loc}': {hint}"
    if error["type"] == "missing":
        return f"key '{loc}' is missing"
    message = error["msg"].removeprefix("Value error, ")
    if not loc or error["type"] == "value_error":
        return f"{loc}: {message}" if loc else message
    return f"{loc}: {message}, got {error['input']!r}"


def _known_keys(loc: Iterable[str | int]) -> list[str]:
    model: Any = RunConfig
    for part in loc:
        if isinstance(part, int):
            continue
        model = next(_models(model.model_fields[part].annotation), None)
        if model is None:
            return []
    return list(model.model_fields)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The configuration blocks within a type such as ``tuple[StageConfig, ...] | None``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)
