"""Dynamic masking for masked language modeling (Devlin et al. 2019, section 3.1; dynamic as in Liu et al. 2019,
section 4.1).

The noise of a row is a pure function of (seed, sample id): it does not depend on the batch a row is in, its place
there, the number of processes or what came before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from data_pipeline.errors import UserError

IGNORE = -100  # label of a position that is no target


def mask_tokens(
    input_ids: np.ndarray,
    sample_ids: np.ndarray,
    *,
    seed: int,
    rate: float,
    mask_share: float,
    random_share: float,
    mask_id: int,
    special_ids: Sequence[int],
    vocab_size: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Choose targets among the ordinary tokens of each row and hide them.

    ``input_ids`` (B, L) int64, ``sample_ids`` (B,) int64 >= 0. Each ordinary token becomes a target with probability
    ``rate``, independently; of the targets a share ``mask_share`` is replaced by ``mask_id``, ``random_share`` by an
    ordinary token drawn uniformly (perhaps the same one), the rest is left. Special tokens are never targets and never
    drawn.

    Returns (inputs (B, L) int64, labels (B, L) int64: the original token at targets, -100 elsewhere). ``input_ids`` is
    not changed. One word of the counter-based generator Philox4x64 (Salmon et al. 2011) with key (seed, sample id)
    belongs to each position, so a shorter row with the same sample id gets the beginning of the longer one's noise.
    """
    check_shares(rate, mask_share, random_share)
    rows, length = input_ids.shape
    noise = np.empty((rows, length), dtype=np.uint64)
    generator = np.random.Philox(key=np.array([seed, 0], dtype=np.uint64))
    state: Any = generator.state  # at the start of its stream; setting it costs a tenth of making a generator
    for row, sample in enumerate(sample_ids.tolist()):
        state["state"]["key"][1] = sample
        generator.state = state
        noise[row] = generator.random_raw(length)

    ordinary = np.ones(vocab_size, dtype=bool)
    ordinary[list(special_ids)] = False
    flat_ids, flat_noise = input_ids.reshape(-1), noise.reshape(-1)
    chosen = np.flatnonzero(flat_noise < _threshold(rate))
    targets = chosen[ordinary[flat_ids[chosen]]]
    originals, words = flat_ids[targets], flat_noise[targets]

    # Given that a uniform number is below `rate`, it is uniform below it: the same number says what happens there.
    # Which token is drawn comes from the lower half of the word, which has next to no say in that comparison.
    candidates = np.flatnonzero(ordinary)
    drawn = candidates[((words & np.uint64(0xFFFFFFFF)) * np.uint64(len(candidates))) >> np.uint64(32)]
    masked, redrawn = words < _threshold(rate * mask_share), words < _threshold(rate * (mask_share + random_share))
    inputs = np.array(input_ids, dtype=np.int64)
    inputs.reshape(-1)[targets] = np.where(masked, mask_id, np.where(redrawn, drawn, originals))
    labels = np.full(input_ids.shape, IGNORE, dtype=np.int64)
    labels.reshape(-1)[targets] = originals
    return inputs, labels


def _threshold(probability: float) -> np.uint64:
    """Words below it come with this probability."""
    return np.uint64(probability * 2.0**64)


def check_shares(rate: float, mask_share: float, random_share: float) -> None:
    """Raise :class:`UserError` unless the three are probabilities and the shares leave nothing below zero."""
    if not 0.0 < rate < 1.0:
        raise UserError(f"masking rate must lie between 0 and 1, got {rate}")
    if mask_share < 0.0 or random_share < 0.0 or mask_share + random_share > 1.0 + 1e-12:
        raise UserError(
            f"mask_share {mask_share} and random_share {random_share} must not be negative nor sum to more than 1"
        )
