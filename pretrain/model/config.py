"""The typed description of a model: everything about it that is not a weight."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from data_pipeline.configuration import Strict
from pretrain.model.attention.pattern import Attention, Pattern, by_layer, label, shortest, written
from pretrain.model.attention.registry import FORMS
from pretrain.model.feed_forward import FEED_FORWARDS, GATED, default_width, feed_forward_kind
from pretrain.model.norms import NORMS, norm_name

POSITIONS = ("rotary", "learned", "none")
BY_LAYER = ("rotary", "none")
"""Positions that layers may differ in."""
ROTARY_FIELDS = ("rope_theta", "rope_position_scale", "rope_original_length")
"""What the rotary angles follow from, beside the rule ``rope_scaling``."""
STAGE_FIELDS = (*ROTARY_FIELDS, "trained_positions")
"""What the curriculum changes of a model while it trains; see :mod:`pretrain.curriculum.stages`."""
REMOVED = {"landmark_query_rank": 0}
"""Keys that are gone, with the value that meant nothing: with that one, configurations of earlier versions are read."""


class ModelConfig(Strict):
    """A Nyströmformer: a masked encoder (``objective: mlm``) or a causal decoder (``objective: clm``).

    It is saved beside every checkpoint, so whatever changes the function that the weights compute (landmarks, segment
    length, iterations of the inverse) belongs here and nowhere else.
    """

    objective: Literal["mlm", "clm"] = Field(
        "mlm", description="mlm: masked encoder, guesses hidden tokens. clm: causal decoder, guesses the next token."
    )
    attention: Attention = Field(
        "nystrom",
        description="nystrom: landmarks, linear in the length. window: near tokens only. softmax: exact attention, "
        "quadratic in the length. A list is a pattern by layer, as `[window, window, nystrom]`. It repeats from the "
        "first layer and is cut behind the last.",
        json_schema_extra={"type": f"{' | '.join(FORMS.names())}, or a list of these"},
    )
    vocab_size: int | None = Field(
        None,
        gt=0,
        description="Tokens of the vocabulary: rows of the word table. At least that of the shards' tokenizer.",
        json_schema_extra={"left_out": "from the shards' manifest"},
    )
    hidden_size: int = Field(
        256, gt=0, description="Width of the residual stream. `num_heads` must divide it, into even parts with rotary."
    )
    num_layers: int = Field(4, gt=0, description="Transformer layers: attention and feed-forward each.")
    num_heads: int = Field(4, gt=0, description="Attention heads of a layer, each hidden_size / num_heads wide.")
    intermediate_size: int | None = Field(
        None,
        gt=0,
        description="Width of the feed-forward layer. Gated kinds have three matrices of it instead of two.",
        json_schema_extra={"left_out": "4 x hidden_size; gated: 2/3 of that, rounded up to a multiple of 16"},
    )
    ffn: str = Field(
        "gelu",
        description="Kind of the feed-forward layer. gelu: two matrices. geglu, swiglu: a third one gates them. relu2: "
        "two matrices and squared ReLU.",
        json_schema_extra={"type": " | ".join(FEED_FORWARDS)},
    )
    dropout: float = Field(
        0.0, ge=0.0, lt=1.0, description="Probability of dropout of embeddings and of each sublayer's output. 0: none."
    )
    norm: Literal["pre", "post"] = Field(
        "pre", description="Norm before each sublayer, or after its residual sum as in the Nyströmformer paper."
    )
    norm_kind: str = Field(
        "layernorm",
        description="Kind of every norm. rmsnorm divides by the root mean square, without mean and bias.",
        json_schema_extra={"type": " | ".join(NORMS)},
    )
    norm_eps: float = Field(
        1e-5, gt=0, description="Added to the variance, or mean square, in each norm, against division by 0."
    )
    qk_norm: bool = Field(
        False,
        description="RMS norm of each head's queries and keys before rotary positions, with a learned gain each. The "
        "logits' scale stays.",
    )
    bias: bool = Field(
        True, description="Biases in linear layers and norms. The output bias of a masked model's head stays."
    )
    tie_embeddings: bool = Field(
        True, description="The output head shares the word table. false adds vocab_size x hidden_size parameters."
    )
    init_std: float = Field(
        0.02,
        gt=0,
        description="Standard deviation of the initial weights; see `residual_init`.",
    )
    residual_init: Literal["same", "scaled"] = Field(
        "same",
        description="Initial weights of a layer's two maps into the residual stream. same: as all others. scaled: "
        "init_std / sqrt(2 x num_layers).",
    )

    positions: Pattern = Field(
        "rotary",
        description="How a token's place enters: rotated queries and keys, a learned table, or not at all. With none a "
        "masked model has the convolution only. A list of rotary and none is a pattern by layer, as in `attention`.",
        json_schema_extra={"type": f"{' | '.join(POSITIONS)}, or a list of rotary and none"},
    )
    rope_theta: float = Field(
        10_000.0,
        gt=0,
        description="Base of the rotary angles. A larger one turns slower and suits longer texts. Stages may change "
        "it.",
    )
    rope_scaling: Literal["none", "ntk", "linear", "yarn"] = Field(
        "none",
        description="Rotary angles where a stage is longer than all before. none: they stay. ntk: the base grows until "
        "the slowest angle spans the new length. linear: positions shrink to the old length. yarn: they shrink for "
        "slow angles only, and logits grow a little.",
    )
    rope_position_scale: float = Field(
        1.0,
        gt=0.0,
        le=1.0,
        description="Factor of rotary positions. 1 leaves them; `rope_scaling` linear and yarn make it smaller by "
        "stage. Under yarn fast angles are left as they are.",
    )
    rope_original_length: int | None = Field(
        None,
        gt=0,
        description="Under `rope_scaling: yarn` alone: tokens of the length that was trained on before angles were "
        "scaled. The curriculum sets it in checkpoints.",
        json_schema_extra={"left_out": "by the curriculum"},
    )
    max_positions: int = Field(
        512,
        gt=0,
        description="Learned positions only: rows of the table, in tokens, at least. A run makes it as long as "
        "`data.block_length`.",
    )
    trained_positions: int | None = Field(
        None,
        gt=0,
        description="Learned positions only: later positions repeat the rows before this one, in tokens. The "
        "curriculum sets it in checkpoints; a run's file leaves it out.",
        json_schema_extra={"left_out": "by the curriculum"},
    )

    # Landmarks' values: through the (pseudo-)inverse of the landmark matrix, as in the paper, or pooled.
    landmark_inverse: bool = Field(
        description="Landmarks' values go through the (pseudo-)inverse of the landmark matrix, or are pooled. The "
        "defaults were measured (docs/attention.md).",
        json_schema_extra={"left_out": "mlm: true; clm: false"},
    )

    # Bidirectional Nystrom attention (paper, section 3): F · pinv(A) · (B V).
    num_landmarks: int = Field(
        64,
        gt=0,
        description="Landmarks m of a sequence, objective mlm only. Sequences of fewer than 2 m tokens get exact "
        "attention; with `landmark_inverse: false`, of up to m.",
    )
    inverse_iterations: int = Field(
        6,
        gt=0,
        description="Steps of the iterative pseudo-inverse. More come closer to the inverse, with larger gradients. "
        "Trained weights are adapted to their number.",
    )
    inverse_init: Literal["block", "original"] = Field(
        "block",
        description="Starting scale of that iteration. block: by matrix and document. original: the maximum over the "
        "batch, as published, for parity only.",
    )

    # Causal Nystrom attention: exact inside a window of segments, landmarks beyond it. (attention: window has the same
    # windows; for objective mlm a token sees w - 1 segments on both sides of its own.)
    segment_length: int = Field(
        64,
        gt=1,
        description="Tokens c of a segment, for clm and for `attention: window`. In clm a landmark stands for one "
        "segment.",
    )
    window_segments: int = Field(
        2,
        gt=0,
        description="Segments w that a token sees exactly, its own included. Causal sequences of up to w x c tokens "
        "get exact attention.",
    )
    landmark_keys: Literal["weighted", "mean"] = Field(
        "weighted",
        description="Keys of causal landmarks. weighted: means weighted by the segment's softmax, its tangent. mean: "
        "plain means.",
    )
    landmark_levels: int = Field(
        1,
        gt=0,
        description="Levels of causal landmarks, at most. 1: one for each segment, however far. More: far ones get "
        "parents that stand for several, so that a token reads about log n of them. 16 is enough for any text.",
    )
    landmark_band: int = Field(
        16,
        gt=0,
        description="Landmarks of each level that a token sees at least, before the next level begins; with "
        "`landmark_levels` above 1.",
    )
    landmark_branching: int = Field(
        2, gt=1, description="Landmarks that a parent stands for; with `landmark_levels` above 1."
    )
    recall_segments: int = Field(
        0,
        ge=0,
        description="Far segments that each token of a causal model reads exactly, in place of their landmarks, beside "
        "the window. It chooses those whose landmarks it asks for most. Decoding keeps all tokens then. 0: none.",
    )
    learn_landmark_query: bool = Field(
        False, description="Causal landmarks' queries get a learned offset for each head."
    )
    gamma_init: float = Field(
        0.75,
        gt=0.5,
        lt=1.0,
        description="Weight of the identity in the causal inverse, with `landmark_inverse`. Near 1 it is close to "
        "pooling; near 0.5 nothing bounds the inverse.",
    )
    learn_gamma: bool = Field(
        True, description="That weight is learned for each head, from `gamma_init`, or stays what it is."
    )

    conv_kernel: int = Field(
        65,
        ge=0,
        description="Taps, in tokens, of the depthwise convolution over values. Odd for mlm. 0 leaves it out.",
    )

    @field_validator("attention", mode="before")
    @classmethod
    def _known_forms(cls, given: Any) -> Attention:
        names = _names(given, "form", "[window, nystrom]")
        return shortest([FORMS.check(name) for name in names])

    @field_validator("positions", mode="before")
    @classmethod
    def _known_positions(cls, given: Any) -> Pattern:
        names = _names(given, "kind of positions", "[rotary, none]")
        unknown = [name for name in names if name not in POSITIONS]
        if unknown:
            raise ValueError(f"there are no positions '{unknown[0]}': known: {', '.join(POSITIONS)}")
        return shortest(names)

    @field_validator("ffn")
    @classmethod
    def _known_feed_forward(cls, given: str) -> str:
        feed_forward_kind(given)
        return given

    @field_validator("norm_kind")
    @classmethod
    def _known_norm(cls, given: str) -> str:
        return norm_name(given)

    @model_validator(mode="before")
    @classmethod
    def _without_removed(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {key: value for key, value in values.items() if key not in REMOVED or value != REMOVED[key]}

    @model_validator(mode="before")
    @classmethod
    def _defaults_by_objective(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("landmark_inverse") is None:
            return {**values, "landmark_inverse": values.get("objective", "mlm") == "mlm"}
        return values

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        for key, used in (("attention", self.attention_by_layer), ("positions", self.positions_by_layer)):
            names = getattr(self, key)
            idle = [] if isinstance(names, str) else [name for name in names if name not in used]
            if idle:
                raise ValueError(
                    f"{key} {written(names)}: with num_layers {self.num_layers} no layer has {idle[0]}: give "
                    f"the model more layers, or leave {'that form' if key == 'attention' else 'it'} out"
                )
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}: "
                "choose heads that divide it"
            )
        if self.objective == "mlm" and self.conv_kernel and self.conv_kernel % 2 == 0:
            raise ValueError(
                f"conv_kernel {self.conv_kernel} is even: a bidirectional convolution is centred, "
                f"use {self.conv_kernel + 1}"
            )
        return self

    @model_validator(mode="after")
    def _check_positions(self) -> ModelConfig:
        positions = written(self.positions)
        if not isinstance(self.positions, str) and "learned" in self.positions:
            raise ValueError(
                f"positions {positions}: learned positions are added to the words, before the first layer, and so are "
                "those of all layers: write learned alone, or a list of rotary and none"
            )
        if self.rotary and self.head_dim % 2:
            raise ValueError(
                f"rotary positions need an even head width, and hidden_size / num_heads is {self.head_dim}"
            )
        if not self.rotary and self.rope_scaling != "none":
            raise ValueError(f"rope_scaling {self.rope_scaling} has no effect with positions: {positions}")
        if not self.rotary and self.rope_position_scale != 1.0:
            raise ValueError(
                f"rope_position_scale {self.rope_position_scale} has no effect with positions: {positions}"
            )
        if self.rope_scaling == "ntk" and self.head_dim <= 2:
            raise ValueError(
                f"rope_scaling ntk needs heads wider than 2, and hidden_size / num_heads is {self.head_dim}: there is "
                "a single angle, which does not depend on the base"
            )
        if self.trained_positions is not None and self.positions != "learned":
            raise ValueError(f"trained_positions {self.trained_positions} has no effect with positions: {positions}")
        if self.trained_positions is not None and self.trained_positions > self.max_positions:
            raise ValueError(
                f"trained_positions {self.trained_positions} is more than max_positions {self.max_positions}"
            )
        return self

    @model_validator(mode="after")
    def _check_yarn(self) -> ModelConfig:
        if self.rope_scaling != "yarn":
            if self.rope_original_length is not None:
                raise ValueError(
                    f"rope_original_length {self.rope_original_length} has no effect with rope_scaling: "
                    f"{self.rope_scaling}"
                )
            return self
        if self.rope_theta <= 1:
            raise ValueError(f"rope_scaling yarn needs a rope_theta above 1, and it is {self.rope_theta}")
        if self.rope_position_scale != 1.0 and self.rope_original_length is None:
            raise ValueError(
                f"rope_scaling yarn with rope_position_scale {self.rope_position_scale} needs rope_original_length, "
                "the length that was trained on before positions were scaled"
            )
        return self

    @property
    def attention_by_layer(self) -> tuple[str, ...]:
        """The name of each layer's form of attention."""
        return by_layer(self.attention, self.num_layers)

    @property
    def attention_label(self) -> str:
        """The forms in words: ``nystrom``, or with their numbers of layers ``window x4 + nystrom x2``."""
        return label(self.attention, self.num_layers)

    @property
    def positions_by_layer(self) -> tuple[str, ...]:
        """The kind of each layer's positions."""
        return by_layer(self.positions, self.num_layers)

    @property
    def rotary(self) -> bool:
        """Whether some layer has rotary positions."""
        return "rotary" in self.positions_by_layer

    def of_layer(self, number: int) -> ModelConfig:
        """What layer ``number``, from 0, computes by: the same settings under its one form and kind of positions."""
        if isinstance(self.attention, str) and isinstance(self.positions, str):
            return self
        attention, positions = (by_layer(names, number + 1)[number] for names in (self.attention, self.positions))
        own: dict[str, Any] = {"attention": attention, "positions": positions}
        if positions == "none":  # what a model without rotary positions has
            own |= {"rope_scaling": "none", "rope_position_scale": 1.0, "rope_original_length": None}
        return self.model_copy(update=own)

    @property
    def head_dim(self) -> int:
        """Width of one attention head, d."""
        return self.hidden_size // self.num_heads

    @property
    def ffn_size(self) -> int:
        """Width of the feed-forward layer."""
        return self.intermediate_size or default_width(self.hidden_size, self.ffn in GATED)


def _names(given: Any, what: str, example: str) -> list[str]:
    """The names of a pattern as one writes it, one name or a list."""
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{given!r} is neither the name of a {what} nor a list of names")
    if not names:
        raise ValueError(f"an empty list gives the layers no {what}: name one, or a pattern as {example}")
    return list(names)
