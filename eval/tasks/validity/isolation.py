"""Whether a row's output depends on anything but the row: batch mates, padding, packed neighbours, earlier calls."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from eval.tasks.validity.probe import LOGIT_BOUND, Check, Probe, padded, share
from pretrain.model.attention.layout import Layout
from pretrain.model.decoding import prefill

ALONE = 4
"""Rows of a batch that are computed alone too: the first, the last and some between."""
NARROW = 16
"""Tokens of the rows of a wide batch."""
WIDER = 37
"""Columns of padding beyond the longest row."""
CROWD = 40
"""Documents of a row of many; several are computed alone."""


def batch_mates(probe: Probe) -> list[Check]:
    """Rows together against alone, and with other content in all other rows of the same batch.

    Rows of full length, as many as are scored together, and a wide batch of short rows.
    """
    whole = probe.rows()
    narrow = min(NARROW, probe.length)
    wide = probe.rows(narrow)
    batches = [torch.stack([probe.text, *(probe.other(probe.text, 2 + i) for i in range(whole - 1))])]
    batches.append(probe.random(wide * narrow, 3).view(wide, narrow))
    gaps, scale = [], 0.0
    for rows in batches:
        count = len(rows)
        chosen = sorted({int(i) for i in np.linspace(0, count - 1, ALONE)})
        together = probe.states(rows)
        scale = max(scale, probe.scale(together[0]))
        if probe.precision == "fp32":  # of another shape: rounding differs, and in bf16 visibly
            gaps += [probe.gap(probe.states(rows[row : row + 1])[0], together[row]).max() for row in chosen]
        for parity in (0, 1):  # of the rows that stay
            kept = torch.arange(count) % 2 == parity
            changed = probe.states(torch.where(kept[:, None], rows, probe.other(rows, 100)))
            kept = kept.to(changed.device)
            gaps.append(probe.gap(changed[kept].flatten(0, 1), together[kept].flatten(0, 1)).max())
    alone = f"{ALONE} of each alone; " if probe.precision == "fp32" else ""
    detail = f"{whole} rows of {probe.where} and {wide} of {narrow}, {alone}every second row changed, then the others"
    return [_check("batch mates", probe, torch.stack(gaps).max(), scale, detail)]


def padding(probe: Probe) -> list[Check]:
    """Rows of unequal length: alone, together, with more padding and with other content in the padding.

    The last row of each batch has padding only, as batches of several processes may have.
    """
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
        ids, layout = padded([*rows, rows[0][:0]], width, fills[fill])
        return [states[:n] for states, n in zip(probe.states(ids, layout)[:-1], lengths, strict=True)]

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
    """Documents packed into rows: each against itself alone, and with other content in other documents."""
    cuts = _cuts(probe)
    ids = torch.stack([probe.text, *(probe.other(probe.text, 11 + i) for i in range(len(cuts) - 1))])
    documents = packed_layout(probe)
    layout = Layout.from_documents(documents)
    packed = probe.states(ids, layout)
    scale = probe.scale(packed[0])
    neighbours = []
    for every, stays in ((2, 0), (2, 1), (7, 3)):  # every second document, the others, and few of them
        kept = (documents % every == stays) & (documents >= 0)
        other = probe.states(torch.where(kept | (documents < 0), ids, probe.other(ids, 13)), layout)
        kept = kept.to(other.device)
        if kept.any():
            neighbours.append(probe.gap(other[kept], packed[kept]).max())
    count = sum(map(len, cuts))
    sizes = [n for lengths in cuts for n in lengths]
    detail = f"{count} documents of {min(sizes)} to {max(sizes)} tokens in {len(cuts)} rows of {probe.where}"
    checks = [_check("packed documents: neighbours changed", probe, torch.stack(neighbours).max(), scale, detail)]
    if probe.precision == "fp32":
        alone = []
        for row, lengths in enumerate(cuts):
            places = _places(lengths)
            for start, n in places[:: max(1, len(places) // 8)]:
                own = packed[row, start : start + n]
                alone.append(probe.gap(probe.states(ids[row : row + 1, start : start + n])[0], own).max())
        against = f"{detail}, {len(alone)} of them against themselves alone"
        checks.append(_check("packed documents: alone", probe, torch.stack(alone).max(), scale, against))
    return checks


def repeated(probe: Probe) -> list[Check]:
    """The same rows again after calls of other shapes: a model keeps nothing of earlier calls, and draws nothing."""
    rows = torch.stack([probe.text, probe.other(probe.text, 17)])
    first = probe.states(rows)
    scale = probe.scale(first[0])
    short = max(1, probe.length // 9)
    calls: list[tuple[str, Callable[[], object]]] = [
        ("another text", lambda: probe.states(probe.random(probe.length, 19)[None])),
        ("a short row", lambda: probe.states(probe.random(short, 19)[None])),
        ("many short rows", lambda: probe.states(probe.random(8 * short, 19).view(8, short))),
        ("packed rows", lambda: probe.states(probe.text.expand(len(_cuts(probe)), -1), _packed(probe))),
    ]
    if probe.subject.causal:
        prompt = probe.text[None, :short].to(probe.subject.device)
        calls.append(("a prompt", lambda: prefill(probe.subject.model, prompt, max_length=probe.length)))
    gaps = []
    for _, call in calls:
        call()
        gaps.append(probe.gap(probe.states(rows).flatten(0, 1), first.flatten(0, 1)).max())
    detail = f"after {', '.join(name for name, _ in calls)}, {probe.where}"
    return [_check("the same input again", probe, torch.stack(gaps).max(), scale, detail)]


def _packed(probe: Probe) -> Layout:
    return Layout.from_documents(packed_layout(probe))


def packed_layout(probe: Probe) -> Tensor:
    """Numbers of the documents in three rows, (3, length) int64; -1 is padding."""
    return torch.stack([_numbers(lengths, probe.length) for lengths in _cuts(probe)])


def _cuts(probe: Probe) -> list[list[int]]:
    return [_documents(probe, 0), _documents(probe, 1), _crowd(probe)]


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


def _crowd(probe: Probe) -> list[int]:
    """Lengths of up to :data:`CROWD` short documents, of one token and more."""
    rng = np.random.default_rng(probe.seed + 2)
    most = max(2, 2 * probe.length // CROWD)
    lengths: list[int] = []
    left = probe.length - 2
    while left > 0 and len(lengths) < CROWD:
        lengths.append(min(left, int(rng.integers(1, most))))
        left -= lengths[-1]
    return lengths


def _numbers(lengths: list[int], width: int) -> Tensor:
    numbers = torch.full((width,), -1)
    for number, (start, n) in enumerate(_places(lengths)):
        numbers[start : start + n] = number
    return numbers


def _places(lengths: list[int]) -> list[tuple[int, int]]:
    return list(zip(np.cumsum([0, *lengths[:-1]]).tolist(), lengths, strict=True))
