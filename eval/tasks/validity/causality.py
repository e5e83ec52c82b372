"""Whether a causal model's output at a position depends on what comes after it, by every way of computing it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from eval.tasks.validity.probe import LIKELIHOOD_BOUND, LOGIT_BOUND, Check, Probe, padded, share
from pretrain.model.attention.layout import Layout
from pretrain.model.decoding import decode, prefill

CONTROLS = 8
ROWS = 8
"""Rows of a batch of changed texts."""
DECODED_ROWS = 16
CONTINUOUS = 1024
"""Tokens decoded one after the other from a prompt of one token, at most. A step costs 2 to 3 ms for a model of a few
million parameters on a CPU."""


def perturbation(probe: Probe, positions: list[int]) -> list[Check]:
    """Replace every token after t: outputs up to t must stay, and those after it must move.

    For every second t special tokens are among the new ones, which a model may treat in a way of its own.

    Rows are compared in batches of one shape, so that rounding cancels and lower precisions can be looked at too.
    """
    text, leaks, effects = probe.text, [], []
    size = min(ROWS, probe.rows())
    scale = 0.0
    for start in range(0, len(positions), size):
        chosen = positions[start : start + size]
        base = probe.states(text.expand(len(chosen), -1))
        later = text.repeat(len(chosen), 1)
        for row, t in enumerate(chosen):
            other = probe.other(text[t + 1 :], t)
            later[row, t + 1 :] = probe.special(other, t) if row % 2 else other
        after = probe.states(later)
        scale = max(scale, probe.scale(base[0]))
        for row, t in enumerate(chosen):
            delta = probe.gap(after[row], base[row])
            leaks.append(delta[: t + 1].max())
            effects.append(delta[t + 1 :].max())
    leak = torch.stack(leaks)  # max and min of tensors keep a NaN, which then fails the check
    found = f"{len(positions)} positions t of {probe.where}"
    suffix = "" if probe.precision == "fp32" else f" ({probe.precision})"
    checks = [
        Check(
            "causality: later tokens changed" + suffix,
            share(leak.max(), scale),
            LOGIT_BOUND,
            detail=f"largest change of a logit at or before t, {found}"
            + (f"; worst t = {positions[int(leak.argmax())]}" if leak.any() else ""),
        )
    ]
    if probe.precision == "fp32":
        checks += [
            Check(
                "control: the change is seen after t",
                share(torch.stack(effects).min(), scale),
                LOGIT_BOUND,
                ">=",
                f"smallest change of the logits after t, {found}; a model that ignores its input would pass the "
                "check above",
            ),
        ]
    return checks


def context_control(probe: Probe, positions: list[int]) -> list[Check]:
    """Replace every token before t: the output at t must move, or the model knows its last token only."""
    chosen = [t for t in positions if t > 0] or [probe.length // 2]
    chosen = chosen[:: max(1, len(chosen) // CONTROLS)]
    base = probe.states(probe.text[None])[0]
    gaps = []
    for t in chosen:
        changed = torch.cat([probe.other(probe.text[:t], t), probe.text[t : t + 1]])
        gaps.append(probe.gap(probe.states(changed[None])[0, -1:], base[t : t + 1])[0])
    return [
        Check(
            "control: earlier tokens are seen",
            share(torch.stack(gaps).min(), probe.scale(base)),
            LOGIT_BOUND,
            ">=",
            f"smallest change of the logits at t when all tokens before it change, {len(chosen)} positions t of "
            f"{probe.where}",
        )
    ]


def prefix_likelihood(probe: Probe, positions: list[int]) -> list[Check]:
    """log p(token t+1) from one full forward against the forward of tokens 0..t alone."""
    text = probe.text
    targets = text[1:].to(probe.subject.device)
    chosen = torch.tensor(positions, device=targets.device)
    states = probe.states(text[None])[0]
    full = probe.logits(states[chosen]).log_softmax(-1).gather(1, targets[chosen, None])[:, 0]
    ends = torch.stack([probe.states(text[None, : t + 1])[0, -1] for t in positions])
    alone = probe.logits(ends).log_softmax(-1).gather(1, targets[chosen, None])[:, 0]
    gap = (full - alone).abs().max()
    detail = (
        f"nats; mean loss {-float(full.mean()):.4f} in the full forward, {-float(alone.mean()):.4f} from the prefix "
        f"alone, {len(positions)} positions of {probe.where}"
    )
    return [Check("causality: full against prefix-only likelihood", float(gap), LIKELIHOOD_BOUND, detail=detail)]


def row_lengths(probe: Probe) -> list[Check]:
    """Rows of a length from each octave against the beginning of the whole text: nothing depends on how long a row is.

    Each position of the shorter row is compared, so that a fault of certain lengths is found in one forward for each.
    """
    full = probe.states(probe.text[None])[0]
    rng = np.random.default_rng(probe.seed)
    lengths = [int(rng.integers(2**i, 2 ** (i + 1))) for i in range(1, probe.length.bit_length())]
    lengths = [n for n in lengths if n < probe.length]
    gaps = [probe.gap(probe.states(probe.text[None, :n])[0], full[:n]).max() for n in lengths]
    detail = f"every position of rows of {', '.join(map(str, lengths))} tokens against the same of {probe.where}"
    return [
        Check("causality: shorter rows", share(torch.stack(gaps).max(), probe.scale(full)), LOGIT_BOUND, detail=detail)
    ]


def decoding(probe: Probe) -> list[Check]:
    """What generation computes with a cache, against one full forward, at every position of the text.

    A cache has never been given what comes later. So this finds what a full forward takes from the future, whatever
    the distance and the place, beside what the cache itself does wrong. The prompts have unequal lengths, so that
    :data:`DECODED_ROWS` rows cover the text in one sixteenth of its steps. They are padded on the right, then on the
    left.
    """
    full = probe.states(probe.text[None])[0]
    scale = probe.scale(full)
    gaps = [_decoded(probe, full, side) for side in ("right", "left")]
    detail = f"every position of {probe.where}, from {DECODED_ROWS} prompts of unequal length, padded on either side"
    return [Check("decoding: every position", share(torch.stack(gaps).max(), scale), LOGIT_BOUND, detail=detail)]


def long_decoding(probe: Probe) -> list[Check]:
    """One token at a time with a cache as long as the text, against one full forward.

    Two texts, which begin with a single token and with a third of the text. So the cache grows far beyond a prompt of
    whole and unfinished segments, and from nothing.
    """
    length = min(probe.length, CONTINUOUS)
    third = length // 3 + 1
    ids = probe.text[None].to(probe.subject.device)
    full = probe.states(ids)[0]
    prompts, layout = padded([probe.text[:1], probe.text[:third]], third, lambda n: torch.full((n,), probe.pad_id))
    logits, cache = prefill(probe.subject.model, prompts.to(ids.device), layout, max_length=probe.length)
    gaps, reached = [], torch.tensor([1, third], device=ids.device)
    while True:
        gaps.append((logits.float() - probe.logits(full[reached - 1])).abs().max())
        if len(reached) > 1 and reached[-1] == length:
            cache.keep([0])
            reached = reached[:1]
        if reached[-1] == length:
            break
        logits = decode(probe.subject.model, ids[0, reached], cache)
        reached = reached + 1
    gap = share(torch.stack(gaps).max(), probe.scale(full))
    detail = f"up to {length} tokens of {probe.where} one at a time, from prompts of 1 and {third}, against one forward"
    return [Check("decoding: token by token", gap, LOGIT_BOUND, detail=detail)]


def _decoded(probe: Probe, full: Tensor, side: str) -> Tensor:
    """The largest difference of a logit between decoding and ``full`` (N, h), over all positions."""
    text, device, model = probe.text, probe.subject.device, probe.subject.model
    step = max(1, -(-(probe.length - 1) // DECODED_ROWS))
    starts = list(range(1, probe.length, step))
    width = starts[-1]
    ids, documents = torch.zeros(len(starts), width, dtype=torch.int64), torch.full((len(starts), width), -1)
    for row, n in enumerate(starts):
        at = slice(0, n) if side == "right" else slice(width - n, width)
        ids[row, at], documents[row, at] = text[:n], 0
    logits, cache = prefill(model, ids.to(device), Layout.from_documents(documents), max_length=probe.length)
    gaps, reached = [], starts
    for taken in range(step):
        expected = probe.logits(full[torch.tensor(reached, device=device) - 1])
        gaps.append((logits.float() - expected).abs().max())
        left = [row for row, t in enumerate(reached) if t < probe.length]
        if not left or taken == step - 1:
            break
        if len(left) < len(reached) or taken == step // 2:
            left = [*reversed(left), left[0]]  # rows leave, change places and are doubled, as beams are
            cache.keep(left)
            reached = [reached[row] for row in left]
        logits = decode(model, text[torch.tensor(reached)].to(device), cache)
        reached = [t + 1 for t in reached]
    return torch.stack(gaps).max()
