"""The blocks that are compared: each key alone, and all of them together.

Names joined by ``+`` make all their changes: ``rmsnorm+swiglu``. YaRN is not among them: it acts where a stage of a
curriculum is longer than those before, and these runs have one length.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.attention_ablation.forms import Changes, Variant, configure
from data_pipeline.errors import UserError
from pretrain.model.config import ModelConfig

BASELINE = "published"
BLOCKS: dict[str, Changes] = {
    BASELINE: {},
    "geglu": {"ffn": "geglu"},
    "swiglu": {"ffn": "swiglu"},
    "relu2": {"ffn": "relu2"},
    "rmsnorm": {"norm_kind": "rmsnorm"},
    "qk-norm": {"qk_norm": True},
    "no-bias": {"bias": False},
    "nope-4th": {"positions": ["rotary", "rotary", "rotary", "none"]},
    "residual-scaled": {"residual_init": "scaled"},
    "z-loss": {"z_loss": 1e-4},
}
TRAINING = ("z_loss",)
"""Keys of the recipe and not of the model."""
MODERN = ("swiglu", "rmsnorm", "qk-norm", "no-bias", "nope-4th", "residual-scaled", "z-loss")
"""The parts of ``modern``; of the kinds of feed-forward layers one."""


def select(names: Sequence[str] | None, base: ModelConfig) -> list[Variant]:
    """The named blocks in that order, the baseline before them; None: all, and ``modern``.

    Raises :class:`UserError` for an unknown name or a change that the base does not allow.
    """
    wanted = [*BLOCKS, "modern"] if names is None else names
    return [_variant(name, base) for name in dict.fromkeys((BASELINE, *wanted))]


def _variant(name: str, base: ModelConfig) -> Variant:
    changes: Changes = {}
    for part in name.split("+"):
        if part not in BLOCKS and part != "modern":
            raise UserError(f"no block '{part}'; there are {', '.join(BLOCKS)}, modern, and several joined by '+'")
        for one in MODERN if part == "modern" else (part,):
            changes |= BLOCKS[one]
    training = {key: changes.pop(key) for key in TRAINING if key in changes}
    return Variant(name, changes, configure(base.model_dump() | changes, f"block {name}"), training)
