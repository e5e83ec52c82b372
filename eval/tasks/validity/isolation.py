"""Whether a row's output depends on anything but the row: batch mates, padding, packed neighbours, earlier calls."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from eval.tasks.validity.probe import LOGIT_BOUND, Check, Probe, padded, share
from pretrain.model.attention.layout import Layout

ALONE = 4
"""Rows of a batch that are computed alone too: the first, the last and some between."""
WIDER = 37
"""Columns of padding beyond the longest row."""


def batch_mates(probe: Probe) -> list[Check]:
    """Rows of full length: together against alone, and with other content in all other rows of the same batch."""
    count = probe.rows()
    rows = torch.stack([probe.text, *(probe.other(probe.text, 2 + i) for i in range(count - 1))])
    chosen = sorted({int(i) for i in np.linspace(0, count - 1, ALONE)})
    together = probe.states(rows)
    scale = probe.scale(together[0])
    gaps = []
    if probe.precision == "fp32":  # of another shape: rounding differs, and in bf16 visibly
        gaps = [probe.gap(probe.states(rows[row : row + 1])[0], together[row]).max() for row in chosen]
    for parity in (0, 1):  # of the rows that stay
        kept = torch.arange(count) % 2 == parity
        changed = probe.states(torch.where(kept[:, None], rows, probe.other(rows, 100)))
        gaps += [probe.gap(changed[row], together[row]).max() for row in range(parity, count, 2)]
    alone = f"{', '.join(str(row + 1) for row in chosen)} of them alone; " if probe.precision == "fp32" else ""
    detail = f"{count} rows of {probe.where}, {alone}every second row changed, then the others"
    return [_check("batch mates", probe, torch.stack(gaps).max(), scale, detail)]


def padding(probe: Probe) -> list[Check]:
    """Rows of unequal length: alone, together, with more padding and with other content in the padding."""
    lengths = probe.cut_lengths()
    rows = [probe.text[probe.length - n :] for n in lengths]  # from the end, so that the rows differ everywhere
    config = probe.subject.loaded.model_config
    wider = probe.length + WIDER
    if config.positions == "learned":
        wider = min(wider, config.max_positions)
    pad, noise = probe.pad_id, probe.random(wider, 1)
    fills: dict[str, Callable[[int], Tensor]] = {
        "pad": lambda count: torch.full((count,), pad),
        "noise": lambda count: noise[:count],
        "other noise": lambda count: probe.other(noise[:count], 7),
    }

    def computed(width: int, fill: str) -> list[Tensor]:
        ids, layout = padded(rows, width, fills[fill])
        return [states[:n] for states, n in zip(probe.states(ids, layout), lengths, strict=True)]

    def worst(a: list[Tensor], b: list[Tensor]) -> Tensor:
        return torch.stack([probe.gap(x, y).max() for x, y in zip(a, b, strict=True)]).max()

    with_noise = computed(wider, "noise")
    scale = max(probe.scale(states) for states in with_noise)
    detail = f"rows of {', '.join(map(str, lengths))} tokens"
    content = _check(
        "padding: content",
        probe,
        worst(with_noise, computed(wider, "other noise")),
        scale,
        f"{detail}, padded to {wider} with two sorts of random tokens" + _in(probe),
    )
    if probe.precision != "fp32":
        return [content]
    alone = [probe.states(row[None])[0] for row in rows]
    return [
        _check(
            "padding: unequal rows together",
            probe,
            worst(computed(probe.length, "pad"), alone),
            scale,
            f"{detail} against each alone",
        ),
        _check(
            "padding: amount",
            probe,
            worst(computed(wider, "pad"), alone),
            scale,
            f"{detail} against each alone, padded to {wider}",
        ),
        _check("padding: random tokens", probe, worst(with_noise, alone), scale, "as above, random tokens as padding"),
        content,
    ]


def packing(probe: Probe) -> list[Check]:
    """Documents packed into rows: each against itself alone, and with other content in all other documents."""
    cuts = _cuts(probe)
    ids = torch.stack([probe.text, probe.other(probe.text, 11)])
    documents = packed_layout(probe)
    layout = Layout.from_documents(documents)
    packed = probe.states(ids, layout)
    scale = probe.scale(packed[0])
    alone, neighbours = [], []
    for parity in (0, 1):  # of the documents that stay
        changed = torch.where((documents % 2 == parity) & (documents >= 0), ids, probe.other(ids, 13))
        other = probe.states(changed, layout)
        for row, lengths in enumerate(cuts):
            for number, (start, n) in enumerate(_places(lengths)):
                if number % 2 == parity:
                    own = packed[row, start : start + n]
                    neighbours.append(probe.gap(other[row, start : start + n], own).max())
                    if probe.precision == "fp32":
                        alone.append(probe.gap(probe.states(ids[row : row + 1, start : start + n])[0], own).max())
    count = sum(map(len, cuts))
    detail = f"{count} documents of {min(map(min, cuts))} to {max(map(max, cuts))} tokens in 2 rows of {probe.where}"
    checks = [_check("packed documents: neighbours changed", probe, torch.stack(neighbours).max(), scale, detail)]
    if alone:
        against = f"{detail}, against each alone"
        checks.append(_check("packed documents: alone", probe, torch.stack(alone).max(), scale, against))
    return checks


def repeated(probe: Probe) -> list[Check]:
    """The same rows again after others: a model keeps nothing of earlier calls, and draws nothing."""
    rows = torch.stack([probe.text, probe.other(probe.text, 17)])
    first = probe.states(rows)
    probe.states(probe.random(probe.length, 19)[None])
    again = probe.states(rows)
    gaps = torch.stack([probe.gap(a, b).max() for a, b in zip(first, again, strict=True)])
    return [_check("the same input again", probe, gaps.max(), probe.scale(first[0]), f"after another, {probe.where}")]


def packed_layout(probe: Probe) -> Tensor:
    """Numbers of the documents in two rows, (2, length) int64; -1 is padding."""
    return torch.stack([_numbers(lengths, probe.length) for lengths in _cuts(probe)])


def _cuts(probe: Probe) -> list[list[int]]:
    return [_documents(probe, seed) for seed in (0, 1)]


def _check(name: str, probe: Probe, gap: Tensor, scale: float, detail: str) -> Check:
    suffix = "" if probe.precision == "fp32" else f" ({probe.precision})"
    return Check(name + suffix, share(gap, scale), LOGIT_BOUND, detail=detail)


def _in(probe: Probe) -> str:
    return "" if probe.precision == "fp32" else f", in {probe.precision}"


def _documents(probe: Probe, seed: int) -> list[int]:
    """Lengths of documents that fill the text but for its last tokens, which are padding: short, long, at edges."""
    rng = np.random.default_rng(probe.seed + seed)
    lengths: list[int] = []
    left = probe.length - 2
    for share_of_row in (0.5, 0.02, 0.01, 0.2, 0.1) if seed == 0 else (0.05, 0.3, 0.01, 0.4):
        n = max(1, int(probe.length * share_of_row * rng.uniform(0.8, 1.0)))
        if n < left:
            lengths.append(n)
            left -= n
    return [*lengths, *([left] if left > 0 else [])]


def _numbers(lengths: list[int], width: int) -> Tensor:
    numbers = torch.full((width,), -1)
    for number, (start, n) in enumerate(_places(lengths)):
        numbers[start : start + n] = number
    return numbers


def _places(lengths: list[int]) -> list[tuple[int, int]]:
    return list(zip(np.cumsum([0, *lengths[:-1]]).tolist(), lengths, strict=True))
