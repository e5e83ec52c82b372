"""A written file against the model, by onnxruntime."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from data_pipeline.errors import UserError
from pretrain.model.attention.registry import forms_of
from pretrain.model.config import ModelConfig
from pretrain.model.transformer import NystromformerLM

if TYPE_CHECKING:
    import onnxruntime

TOLERANCES = {"fp32": 1e-4, "fp16": 1e-2}
"""Largest difference allowed, as a share of the largest value of that output. Measured: see docs/onnx.md."""


@dataclass(frozen=True)
class Batch:
    """Token ids and mask, (B, N) int64, to try a file on."""

    ids: torch.Tensor
    mask: torch.Tensor
    side: str
    """Where the padding is, left or right."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [int(n) for n in self.mask.sum(1)]

    def __str__(self) -> str:
        padding = f", padding {self.side}" if bool((self.mask == 0).any()) else ""
        return f"{' + '.join(map(str, self.lengths))} tokens{padding}"


@dataclass(frozen=True)
class Difference:
    """The largest of one output."""

    share: float
    """Of the largest value that the model gives for the row."""
    absolute: float
    where: str
    """The batch."""


def batches(config: ModelConfig, seed: int = 0) -> Iterator[Batch]:
    """Batches of 1 to 4 rows of random tokens, on both sides of the length where landmarks begin, padded left and
    right, one of a single token and one with an empty row."""
    assert config.vocab_size is not None
    limits = {form.pooled_to is not None: form.exact_up_to for form in forms_of(config).values() if form.exact_up_to}
    limit = limits.get(True) or limits.get(False) or 64
    most = config.max_positions if config.positions == "learned" else 2**31
    rows = [[1], [limit], [limit + 1], [3 * limit], [5 * limit + 3, 0, limit + 1, limit], [2 * limit + 1, 1, limit - 1]]
    generator = torch.Generator().manual_seed(seed)
    for lengths in rows:
        counts = torch.tensor([min(n, most) for n in lengths])
        width = int(counts.max()) + (len(lengths) > 1)
        ids = torch.randint(0, config.vocab_size, (len(counts), width), generator=generator)
        columns = torch.arange(width)
        yield Batch(ids, (columns < counts[:, None]).long(), "right")
        if len(lengths) > 1:
            yield Batch(ids, (columns >= width - counts[:, None]).long(), "left")


def open_session(path: Path, threads: int = 0) -> onnxruntime.InferenceSession:
    """The file in onnxruntime on the CPU, which says nothing. Raises :class:`UserError` if it cannot be loaded."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the library's own have no common class
        raise UserError(f"onnxruntime {onnxruntime.__version__} cannot load {path}: {_line(error)}") from None


def run(session: Any, batch: Batch, outputs: Sequence[str]) -> list[np.ndarray]:
    """Outputs of a batch. Raises :class:`UserError` if onnxruntime cannot compute it."""
    try:
        return session.run(list(outputs), {"input_ids": batch.ids.numpy(), "attention_mask": batch.mask.numpy()})
    except Exception as error:
        raise UserError(f"onnxruntime fails on {batch}: {_line(error)}") from None


def compare(session: Any, model: NystromformerLM, outputs: Sequence[str]) -> dict[str, Difference]:
    """Every row of every batch of :func:`batches` against ``model`` (float32, evaluation mode) on that row's tokens
    alone; the largest difference by output. Raises :class:`UserError` for outputs that are not finite."""
    found: dict[str, Difference] = {}
    for batch in batches(model.config):
        got = dict(zip(outputs, run(session, batch, outputs), strict=True))
        for name, values in got.items():
            if not np.isfinite(values).all():
                raise UserError(f"onnxruntime gives {name} that are not finite for {batch}")
        for row, count in enumerate(batch.lengths):
            real = batch.mask[row] > 0
            for name, expected in _of_model(model, batch.ids[row][real], outputs).items() if count else ():
                error = float(np.abs(got[name][row][real.numpy()] - expected).max())
                share = error / float(np.abs(expected).max())
                if name not in found or share > found[name].share:
                    found[name] = Difference(share, error, str(batch))
    return found


def _of_model(model: NystromformerLM, ids: torch.Tensor, outputs: Sequence[str]) -> dict[str, np.ndarray]:
    with torch.no_grad():
        hidden = model(ids[None], hidden=True).hidden
        assert hidden is not None
        found = {"last_hidden_state": hidden[0].numpy()}
        if "logits" in outputs:
            found["logits"] = model.head(hidden)[0].numpy()
    return found


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
