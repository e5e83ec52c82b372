"""Long Range Arena: its settings and its registration."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from data_pipeline.sources.reading import Quotes
from eval.task import ModuleTask, Row, Settings, quotes_field, register
from pretrain.model.attention.registry import pattern_of

PUBLISHED = "left out: as published for the dataset"


class LRASettings(Settings):
    """The data, the network and its training; what is left out is that of the Nyströmformer repository."""

    benchmark: Literal["listops", "text", "retrieval", "image", "pathfinder"] = Field(
        "listops", description="which of the five; listops is generated, the others are read from path"
    )
    path: str | None = Field(
        None, description="folder (or .npz of images) with the dataset's files; left out: ListOps is generated"
    )
    cache_dir: str | None = Field(
        None, description="where generated ListOps is kept; left out: ~/.cache/nystrom-pretrain"
    )
    train_size: int | None = Field(
        None, ge=2, description="training examples generated, or read at most; left out: 96000, or all of the files"
    )
    dev_size: int | None = Field(
        None, ge=1, description="examples to choose the weights on; left out: 2000, or all of the files"
    )
    test_size: int | None = Field(None, ge=1, description="examples scored; left out: 2000, or all of the files")
    dev_share: float = Field(
        0.1, gt=0, lt=1, description="share of the training data on which the weights are chosen, if there is no split"
    )
    min_symbols: int = Field(500, ge=0, description="generated ListOps: an expression has more symbols than this")
    max_symbols: int = Field(2000, ge=2, description="generated ListOps: an expression has fewer symbols than this")
    max_depth: int = Field(10, ge=2, description="generated ListOps: depth at which all nodes are digits")
    max_args: int = Field(10, ge=2, description="generated ListOps: arguments of an operator, at most")
    text_field: str = Field("text", description="field or column with the text")
    label_field: str = Field("label", description="field or column with the label")
    quotes: Quotes = quotes_field()
    max_length: int | None = Field(None, ge=2, description=f"tokens read of each text; {PUBLISHED}")

    networks: tuple[str, ...] = Field(
        ("softmax", "nystrom"),
        min_length=1,
        description="networks trained side by side, by their form of attention, a pattern by layer as window/nystrom; "
        "softmax has no convolution, as published, and softmax-conv has it",
    )
    hidden_size: int = Field(64, ge=2, description="width of the network")
    layers: int = Field(2, ge=1, description="of the network")
    heads: int = Field(2, ge=1, description="of attention")
    ffn_size: int = Field(128, ge=1, description="width of the feed-forward layers, and of the head's")
    hidden_dropout: float = Field(0.1, ge=0, lt=1, description="on the residual path and the embeddings")
    num_landmarks: int = Field(
        64, ge=1, description="of nystrom; sequences of fewer than twice as many tokens get exact attention"
    )
    conv_kernel: int = Field(35, ge=0, description="width of the convolution over values; 0 leaves it out")

    steps: int | None = Field(None, ge=3, description=f"of training; {PUBLISHED}")
    warmup: int | None = Field(None, ge=2, description=f"steps of rising learning rate; {PUBLISHED}")
    validate_every: int | None = Field(None, ge=1, description=f"steps between looks at the dev split; {PUBLISHED}")
    batch_size: int | None = Field(None, ge=1, description=f"examples of one step; {PUBLISHED}")
    lr: float = Field(1e-4, gt=0, description="peak learning rate")
    weight_decay: float = Field(0.0, ge=0, description="of AdamW")
    seeds: int = Field(1, ge=1, description="trainings from different random seeds")
    seed: int = Field(0, ge=0, description="of random choices")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="of training; auto: bf16 where it is fast")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...")

    @field_validator("networks")
    @classmethod
    def _known_networks(cls, networks: tuple[str, ...]) -> tuple[str, ...]:
        for name in networks:
            if name != "softmax-conv":
                pattern_of(name)
        return networks

    @model_validator(mode="after")
    def _check(self) -> LRASettings:
        if self.hidden_size % self.heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not divisible by heads {self.heads}")
        if self.conv_kernel and self.conv_kernel % 2 == 0:
            raise ValueError(f"conv_kernel {self.conv_kernel} is even: the convolution is centred, make it odd")
        if len(set(self.networks)) != len(self.networks):
            raise ValueError(f"networks names one twice: {' '.join(self.networks)}")
        if self.max_symbols <= self.min_symbols + 1:
            raise ValueError(f"no number of symbols is above {self.min_symbols} and below {self.max_symbols}")
        return self

    def as_dict(self) -> dict[str, Any]:
        """Without what changes no number: where generated data is kept, and which device computes."""
        return self.model_dump(mode="json", exclude={"cache_dir", "device"})


@register
class LongRangeArena(ModuleTask):
    """See ``task``."""

    name = "lra"
    summary = "Long Range Arena: softmax and Nystrom attention trained from nothing on long sequences"
    settings = LRASettings
    module = "eval.tasks.lra.task"
    needs_checkpoint = held_out = False
    variants = False
    order = 40
    heading, lead = "Long Range Arena", "Networks trained from nothing on long sequences."
    rows = (
        Row("accuracy_softmax", "Long Range Arena accuracy, softmax"),
        Row("accuracy_nystrom", "Long Range Arena accuracy, Nyström"),
        Row("accuracy_softmax_conv", "Long Range Arena accuracy, softmax with convolution"),
        # No winner: a difference can be large for the control's sake.
        Row("nystrom_minus_softmax", "Long Range Arena, Nyström minus softmax", ranked=False),
    )
