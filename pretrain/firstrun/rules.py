"""The rules of a first configuration: sizes, length of the run, batch, learning rate, lengths. Pure functions.

Sources:

- Muennighoff et al. 2023, Scaling Data-Constrained Language Models, arXiv 2305.16264: the loss by size and text, also
  where text is repeated. With text to spare its optimum is 20 tokens a parameter, as Hoffmann et al. 2022 (arXiv
  2203.15556) found.
- DeepSeek LLM, arXiv 2401.02954, equation 1: batch and learning rate of AdamW by compute. Their setting is
  this project's default: betas 0.9 and 0.95, weight decay 0.1, clipping at 1.

All were fitted to causal models of more than 1e17 FLOP. Below that they are extrapolated. One comparison at 6e12 FLOP
(novels, vocabulary 8192, batches of 4096 tokens, rate 2e-3, one seed) agrees: held-out loss 5.24 with the width of 64
and 1.56 million tokens, 5.70 with 128 and 0.51 million.
"""

from __future__ import annotations

import math
from typing import NamedTuple

EPOCHS = 4
"""Passes over the text that are worth nearly as much as new text (Muennighoff et al. 2023, section 6)."""
LEAST_STEPS, WANTED_STEPS = 100, 500
"""Optimizer steps: fewer are refused, and below the second number the batch is made smaller."""
LEAST_ROWS = 8
"""Rows of the longest length in a batch, as in ``configs/books-clm.yaml``."""
LEAST_LENGTH, LONGEST_LENGTH = 64, 8192
CLOSE_ENOUGH = 0.01
"""Of two sizes whose predicted losses are within this share, the smaller one: it is faster, and decodes faster."""


class Shape(NamedTuple):
    """Width, depth and heads of a model."""

    hidden_size: int
    num_layers: int
    num_heads: int

    def parameters(self, vocab_size: int) -> int:
        """All weights but norms, biases and the convolution's: 12 h^2 a layer, and the word table."""
        return 12 * self.num_layers * self.hidden_size**2 + vocab_size * self.hidden_size


SHAPES = (
    Shape(64, 2, 2),
    Shape(96, 3, 3),
    Shape(128, 4, 4),
    Shape(192, 4, 3),
    Shape(256, 4, 4),
    Shape(320, 6, 5),
    Shape(384, 6, 6),
    Shape(448, 8, 7),
    Shape(512, 8, 8),
    Shape(640, 10, 10),
    Shape(768, 12, 12),
    Shape(1024, 16, 16),
    Shape(1024, 24, 16),
    Shape(1280, 24, 20),
    Shape(1536, 24, 24),
    Shape(2048, 24, 16),
    Shape(2560, 32, 20),
    Shape(4096, 32, 32),
)
"""Heads are 64 wide, 32 in the smallest, 128 from 2048 on. 128 and 256 are those of ``configs/``, 768 BERT's base and
GPT-3's small, 1024 of 24 layers, 2048 and 4096 Pythia's (Biderman et al. 2023). The others lie between."""

_E, _A, _B, _EXPONENT = 1.87, 521.0, 1488.0, 0.353
_WORTH_TOKENS, _WORTH_PARAMETERS = 15.4, 5.3


def predicted_loss(parameters: float, tokens: float, unique: float) -> float:
    """Nats a token after ``tokens`` tokens, of which ``unique`` are different; Muennighoff et al. 2023, equation 6.

    Its value means little for another vocabulary and text. It ranks sizes.
    """
    text = min(unique, tokens)
    repeated = tokens / text - 1
    worth = text + text * _WORTH_TOKENS * (1 - math.exp(-repeated / _WORTH_TOKENS))
    # Parameters that this text is enough for, at the optimum: with equal exponents N / D = (A / B)^(1 / exponent).
    enough = min(parameters, text * (_A / _B) ** (1 / _EXPONENT))
    excess = parameters / enough - 1
    useful = enough + enough * _WORTH_PARAMETERS * (1 - math.exp(-excess / _WORTH_PARAMETERS))
    return _E + _A / useful**_EXPONENT + _B / worth**_EXPONENT


def wanted_batch(flops: float, tokens: float) -> int:
    """Tokens of a batch by the FLOP of the whole run: 0.2920 C^0.3271, rounded to a power of two.

    Smaller where the run's ``tokens`` would make fewer than :data:`WANTED_STEPS` steps, and never below
    :data:`LEAST_ROWS` of the shortest rows.
    """
    wanted = 2 ** round(math.log2(max(1.0, min(0.2920 * flops**0.3271, tokens / WANTED_STEPS))))
    return max(LEAST_ROWS * LEAST_LENGTH, wanted)


MOST_LR = 2e-3
"""The rate of this project's runs of 2 to 5 million parameters with AdamW. The rule exceeds it below 4e17 FLOP: it has
7e-3 for the comparison above, where 6e-3 had a loss of 6.27 after 160 steps and 2e-3 had 5.85."""


def learning_rate(flops: float, objective: str) -> float:
    """Peak rate of AdamW by the FLOP of the whole run: 0.3118 C^-0.1250, to two digits, at most :data:`MOST_LR`.

    Half of it for masked models: ModernBERT (Warner et al. 2024) took 8e-4 at 149 million parameters.
    """
    rate = 0.3118 * flops**-0.1250 * (0.5 if objective == "mlm" else 1.0)
    return float(f"{min(MOST_LR, rate):.2g}")


def longest_length(p90: int, batch: int, processes: int, text: int) -> int:
    """Tokens of the longest rows: a power of two that nine in ten documents fit into, within reason.

    ``batch``: its wanted tokens, of which a row is an eighth at most, and small enough that each process has one.
    ``text``: tokens of the shorter of training and held-out text.
    """
    documents = 1 << max(0, p90 - 1).bit_length()
    fits = max(1, min(batch // max(LEAST_ROWS, processes), text // 4))
    return max(LEAST_LENGTH, min(documents, LONGEST_LENGTH, 1 << (fits.bit_length() - 1)))


def lengths_up_to(longest: int) -> tuple[int, ...]:
    """Lengths of the stages, as in ``configs/books-clm.yaml``: a quarter, a half, the whole; none below 64."""
    return tuple(longest // part for part in (4, 2, 1) if longest // part >= LEAST_LENGTH)


SHARES = {1: (1.0,), 2: (0.5, 0.5), 3: (0.5, 0.25, 0.25)}
"""Of the run's tokens for each stage, by the number of stages."""


def mean_over_stages(values: dict[int, float]) -> float:
    """Mean of what each token costs, from its value for each length of :func:`lengths_up_to`."""
    lengths = sorted(values)
    return sum(share * values[length] for share, length in zip(SHARES[len(lengths)], lengths, strict=True))


def batch_of(wanted: int, longest: int, processes: int) -> int:
    """The multiple of ``longest * processes`` that is nearest to the wanted tokens: each process gets as many rows."""
    unit = longest * processes
    return max(1, round(wanted / unit)) * unit


def stage_ends(tokens: float, batch: int, lengths: tuple[int, ...]) -> tuple[int, ...]:
    """Where the stages end, as multiples of the window that a stage is rounded to; the last is at most ``tokens``."""
    window = batch * (lengths[-1] // lengths[0])
    windows = max(len(lengths), int(tokens // window))
    ends, share = [], 0.0
    for i, part in enumerate(SHARES[len(lengths)]):
        share += part
        ends.append(max(i + 1, min(round(share * windows), windows - (len(lengths) - 1 - i))))
    return tuple(end * window for end in ends)


def form_settings(objective: str, longest: int) -> dict[str, int]:
    """What the Nyström form has by length.

    Causal: segments of 64 tokens (half the landmarks of 32 at the same loss, docs/attention.md), 32 in rows of fewer
    than 1024, and a window of 4 segments from 4096 on. Masked: the paper's 64 landmarks, 32 in rows of fewer than 512.
    The convolution is as long as a segment, and centred.
    """
    short = longest < 1024
    if objective == "mlm":
        return {"num_landmarks": 32 if longest < 512 else 64, "conv_kernel": 33 if longest < 512 else 65}
    return {
        "segment_length": 32 if short else 64,
        "window_segments": 4 if longest >= 4096 else 2,
        "conv_kernel": 33 if short else 65,
    }


def rounded(tokens: float) -> int:
    """Two significant digits."""
    return int(float(f"{tokens:.2g}"))
