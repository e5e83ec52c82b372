"""The typed description of a model: everything about it that is not a weight."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from pretrain.model.attention.registry import check_name

STAGE_FIELDS = ("rope_theta", "rope_position_scale", "trained_positions")
"""What the curriculum changes of a model while it trains; see :mod:`pretrain.curriculum.stages`."""


class ModelConfig(BaseModel):
    """A Nyströmformer: a masked encoder (``objective: mlm``) or a causal decoder (``objective: clm``).

    It is saved beside every checkpoint, so whatever changes the function that the weights compute (landmarks, segment
    length, iterations of the inverse) belongs here and nowhere else.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    objective: Literal["mlm", "clm"] = Field("mlm", description="mlm: masked encoder; clm: causal decoder")
    attention: str = Field(
        "nystrom",
        description="nystrom: landmarks, linear in the length; window: near tokens only; softmax: exact attention",
    )
    vocab_size: int | None = Field(None, gt=0, description="left out: taken from the shards' manifest")
    hidden_size: int = Field(256, gt=0)
    num_layers: int = Field(4, gt=0)
    num_heads: int = Field(4, gt=0)
    intermediate_size: int | None = Field(None, gt=0, description="left out: 4 x hidden_size")
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    norm: Literal["pre", "post"] = Field("pre", description="where the layer norm sits; post is the paper's")
    norm_eps: float = Field(1e-5, gt=0)
    tie_embeddings: bool = True
    init_std: float = Field(0.02, gt=0)

    positions: Literal["rotary", "learned", "none"] = "rotary"
    rope_theta: float = Field(
        10_000.0, gt=0, description="base of the rotary angles; stages of the curriculum may change it"
    )
    rope_scaling: Literal["none", "ntk", "linear"] = Field(
        "none",
        description="rotary angles where a stage is longer than those before. none: they stay; ntk: the base grows so "
        "that the slowest angle spans the new length; linear: positions are shrunk to the old one",
    )
    rope_position_scale: float = Field(
        1.0, gt=0.0, le=1.0, description="rotary positions are multiplied by it; rope_scaling: linear makes it smaller"
    )
    max_positions: int = Field(
        512,
        gt=0,
        description="learned: rows of the position table, at least; a run makes it as long as the longest stage",
    )
    trained_positions: int | None = Field(
        None,
        gt=0,
        description="learned: positions from here on repeat the rows of those before; set by the curriculum, which "
        "copies the rows where a longer stage begins",
    )

    # Landmarks' values: through the (pseudo-)inverse of the landmark matrix, as in the paper, or pooled.
    landmark_inverse: bool = Field(description="left out: true for mlm, false for clm, as measured (docs/attention.md)")

    # Bidirectional Nystrom attention (paper, section 3): F · pinv(A) · (B V).
    num_landmarks: int = Field(64, gt=0, description="m, for objective mlm")
    inverse_iterations: int = Field(6, gt=0, description="steps of the iterative pseudo-inverse; part of the function")
    inverse_init: Literal["block", "original"] = Field(
        "block", description="starting scale per matrix and document, or the published global maximum (for parity only)"
    )

    # Causal Nystrom attention: exact inside a window of segments, landmarks beyond it. (attention: window has the same
    # windows; for objective mlm a token sees w - 1 segments on both sides of its own.)
    segment_length: int = Field(64, gt=1, description="c, tokens a landmark stands for; for objective clm")
    window_segments: int = Field(2, gt=0, description="w, segments seen exactly, the token's own included")
    landmark_keys: Literal["weighted", "mean"] = Field(
        "weighted", description="weighted: the tangent of the segment's softmax; mean: plain means"
    )
    learn_landmark_query: bool = Field(False, description="a learned offset to the landmarks' queries, per head")
    gamma_init: float = Field(
        0.75, gt=0.5, lt=1.0, description="weight of the identity in the triangular inverse; with landmark_inverse"
    )
    learn_gamma: bool = True

    conv_kernel: int = Field(65, ge=0, description="width of the depthwise convolution over values; 0 leaves it out")

    @field_validator("attention")
    @classmethod
    def _known_form(cls, name: str) -> str:
        return check_name(name)

    @model_validator(mode="before")
    @classmethod
    def _defaults_by_objective(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("landmark_inverse") is None:
            return {**values, "landmark_inverse": values.get("objective", "mlm") == "mlm"}
        return values

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}: "
                "choose heads that divide it"
            )
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(
                f"rotary positions need an even head width, and hidden_size / num_heads is {self.head_dim}"
            )
        if self.positions != "rotary" and self.rope_scaling != "none":
            raise ValueError(f"rope_scaling {self.rope_scaling} has no effect with positions: {self.positions}")
        if self.positions != "rotary" and self.rope_position_scale != 1.0:
            raise ValueError(
                f"rope_position_scale {self.rope_position_scale} has no effect with positions: {self.positions}"
            )
        if self.rope_scaling == "ntk" and self.head_dim <= 2:
            raise ValueError(
                f"rope_scaling ntk needs heads wider than 2, and hidden_size / num_heads is {self.head_dim}: there is "
                "a single angle, which does not depend on the base"
            )
        if self.trained_positions is not None and self.positions != "learned":
            raise ValueError(
                f"trained_positions {self.trained_positions} has no effect with positions: {self.positions}"
            )
        if self.trained_positions is not None and self.trained_positions > self.max_positions:
            raise ValueError(
                f"trained_positions {self.trained_positions} is more than max_positions {self.max_positions}"
            )
        if self.objective == "mlm" and self.conv_kernel and self.conv_kernel % 2 == 0:
            raise ValueError(
                f"conv_kernel {self.conv_kernel} is even: a bidirectional convolution is centred, "
                f"use {self.conv_kernel + 1}"
            )
        return self

    @property
    def head_dim(self) -> int:
        """Width of one attention head, d."""
        return self.hidden_size // self.num_heads

    @property
    def ffn_size(self) -> int:
        """Width of the feed-forward layer."""
        return self.intermediate_size or 4 * self.hidden_size
