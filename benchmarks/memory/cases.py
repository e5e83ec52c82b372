"""What is predicted and measured: models, shapes, precisions, ZeRO stages, processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pretrain.config import RunConfig, parse_config

SMALL_BUCKET = {"zero_optimization": {"reduce_bucket_size": 2_000_000}}
"""A share of these small models as the default's is of large ones; with the default one number would hide the rest."""


@dataclass(frozen=True)
class Case:
    """A run of a few steps."""

    name: str
    model: dict[str, Any]
    rows: int
    length: int
    precision: str = "bf16"
    zero_stage: int = 2
    processes: int = 1
    micro_batches: int = 2
    resident: bool = False
    """Large enough for the system's count of its memory to mean something."""
    more: dict[str, Any] = field(default_factory=dict)

    def config(self) -> RunConfig:
        """Of a run whose step is ``micro_batches`` of ``rows`` on each process."""
        batch = self.rows * self.length * self.micro_batches * self.processes
        return parse_config(
            {
                "name": self.name,
                "model": self.model,
                "data": {"train": "none"},
                "curriculum": [{"until_tokens": 2 * batch, "seq_len": self.length, "micro_batch": self.rows}],
                "batch_tokens": batch,
                "precision": self.precision,
                "zero_stage": self.zero_stage,
                "deepspeed": SMALL_BUCKET,
                **self.more,
            }
        )


def _model(objective: str, attention: str = "nystrom", **more: Any) -> dict[str, Any]:
    size = {"hidden_size": 256, "num_layers": 6, "num_heads": 4, "vocab_size": 8000}
    return {"objective": objective, "attention": attention, **size, **more}


def _base(objective: str) -> dict[str, Any]:
    return _model(objective, hidden_size=768, num_layers=12, num_heads=12, vocab_size=32000)


MLM, CLM = _model("mlm"), _model("clm")
SMALL = _model("clm", hidden_size=64, num_layers=2, vocab_size=2000)
"""For CPUs without bfloat16 instructions, where a step of the others takes minutes."""
WIDE = _model("clm", hidden_size=384, num_heads=6)
SMALLER_BUCKET = {"deepspeed": {"zero_optimization": {"reduce_bucket_size": 50_000}}}
FOUR = _model("clm", hidden_size=384, num_layers=4, num_heads=6, vocab_size=8192)
REVIEWS = _model("clm", hidden_size=192, num_layers=3, num_heads=3, vocab_size=16384, conv_kernel=17)
AGAIN = {"activation_checkpointing": True}

CASES = (
    Case("mlm-fp32", MLM, 4, 512, "fp32", 0),
    Case("mlm-softmax-fp32", _model("mlm", "softmax"), 4, 512, "fp32", 0),
    Case("mlm-fp32-once", MLM, 4, 512, "fp32", 0, micro_batches=1),
    Case("mlm-fp32-checkpointing", MLM, 4, 512, "fp32", 0, more=AGAIN),
    Case("mlm-fp32-zero1", MLM, 4, 512, "fp32", 1),
    Case("mlm-fp32-zero2-2", MLM, 4, 512, "fp32", 2, processes=2),
    Case("clm-long-row", CLM, 1, 2048),
    Case("clm-softmax", _model("clm", "softmax"), 4, 512),
    Case("clm-checkpointing", CLM, 4, 512, more=AGAIN),
    Case("clm-zero1", CLM, 4, 512, zero_stage=1),
    Case("mlm-dropout-post-zero1-2", _model("mlm", norm="post", dropout=0.1), 4, 512, zero_stage=1, processes=2),
    Case("clm-zero2-2", CLM, 4, 512, processes=2),
    Case("clm-small-zero2-2", SMALL, 2, 256, processes=2, more=SMALLER_BUCKET),
    Case("clm-zero3-2", CLM, 4, 512, zero_stage=3, processes=2),
    Case("clm-documents", CLM, 4, 512, more={"data": {"train": "none", "packing": "documents"}}),
    Case("clm-offload", CLM, 4, 512, more={"offload_optimizer": True}),
    Case("clm-base-zero2", _base("clm"), 2, 512, micro_batches=1, resident=True),
    Case("clm-four-fp32", FOUR, 4, 1024, "fp32", 0, micro_batches=1, resident=True),
    Case("clm-four-fp32-checkpointing", FOUR, 4, 1024, "fp32", 0, micro_batches=1, resident=True, more=AGAIN),
    Case("clm-wide-fp32-checkpointing", WIDE, 4, 1024, "fp32", 0, micro_batches=1, resident=True, more=AGAIN),
    Case("mlm-base-fp32", _base("mlm"), 4, 512, "fp32", 0, micro_batches=1, resident=True),
    Case("clm-reviews", REVIEWS, 16, 512, micro_batches=1, resident=True),
)
