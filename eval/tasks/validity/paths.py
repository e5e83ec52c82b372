"""Whether the ways to compute an output agree, what a masked model sees, and whether weights survive their file."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from eval.tasks.validity.isolation import packed_layout
from eval.tasks.validity.probe import LIKELIHOOD_BOUND, LOGIT_BOUND, SEEN_BOUND, Check, Probe, padded, share
from pretrain.model.attention.layout import Layout
from pretrain.model.transformer import IGNORE, build_model

MASKED_SHARE = 0.15
LOOKED_AT = 8


def agreement(probe: Probe) -> list[Check]:
    """Logits, hidden states through the head, and the loss of labels: on full, padded and packed rows.

    Suites score by all three. A fault in one of them would pass every check that is made through another. Full rows
    are computed with a layout and without one.
    """
    n = probe.length
    documents = packed_layout(probe)
    rows = torch.stack([probe.text, *(probe.other(probe.text, 23 + i) for i in range(len(documents) - 1))])
    full = Layout.full(*rows.shape)
    batches: list[tuple[torch.Tensor, Layout, Layout | None, torch.Tensor]] = [
        (rows, full, None, torch.ones_like(rows))
    ]
    half = n // 2 + 1
    ids, layout = padded([rows[0], rows[1, :half]], n, lambda count: torch.full((count,), probe.pad_id))
    batches.append((ids, layout, layout, torch.arange(n) < torch.tensor([[n], [half]])))
    layout = Layout.from_documents(documents)
    batches.append((rows, layout, layout, documents >= 0))
    gaps, losses, counts, scale = [], [], [], 0.0
    for ids, layout, other, real in batches:
        real = real.bool().to(probe.subject.device)
        states, direct = probe.states(ids, layout), probe.direct(ids, other)
        logits = [probe.logits(row) for row in states]
        scale = max(scale, *(float(row.abs().max()) for row in logits))
        gaps += [(a - b)[kept].abs().max() for a, b, kept in zip(direct, logits, real, strict=True)]
        # Any labels will do; the tokens themselves are those that a leak would know.
        labels = torch.where(real, ids.to(real.device), IGNORE)
        expected = sum(
            F.cross_entropy(row, label, ignore_index=IGNORE, reduction="sum")
            for row, label in zip(direct, labels, strict=True)
        )
        loss_sum, targets = probe.loss(ids, labels, layout)
        losses.append((loss_sum - expected).abs() / max(1, targets))
        counts.append(abs(targets - int(real.sum())))
    suffix = "" if probe.precision == "fp32" else f" ({probe.precision})"
    detail = f"full, padded and packed rows of {probe.where}"
    found = [
        Check(
            "paths: hidden states and logits" + suffix,
            share(torch.stack(gaps).max(), scale),
            LOGIT_BOUND,
            detail=detail,
        ),
        Check(
            "paths: loss and logits" + suffix,
            float(torch.stack(losses).max()),
            LIKELIHOOD_BOUND,
            detail=f"nats a token, {detail}",
        ),
    ]
    if probe.precision == "fp32":
        found.append(Check("paths: number of targets", float(max(counts)), 0.0, detail=f"counted wrongly, {detail}"))
    return found


def masked_control(probe: Probe) -> list[Check]:
    """A masked model's prediction at a masked token must depend on the tokens before it and on those after it."""
    mask = probe.subject.loaded.tokenizer.mask_id
    assert mask is not None
    n = probe.length
    rng = np.random.default_rng(probe.seed)
    masked = torch.from_numpy(rng.permutation(n) < max(1, int(MASKED_SHARE * n)))
    ids = torch.where(masked, mask, probe.text)
    places = [int(i) for i in np.linspace(1, n - 2, LOOKED_AT)]
    ids[places] = mask
    other = torch.where(ids == mask, mask, probe.other(probe.text, 29))
    base = probe.states(ids[None])
    scale = probe.scale(base[0])
    gaps: dict[str, list[torch.Tensor]] = {"before": [], "after": []}
    for place in places:
        before, after = ids.clone(), ids.clone()
        before[:place], after[place + 1 :] = other[:place], other[place + 1 :]
        for side, changed in (("before", before), ("after", after)):
            if (changed != ids).any():
                states = probe.states(changed[None])
                gaps[side].append(probe.gap(states[0, place : place + 1], base[0, place : place + 1])[0])
    detail = f"smallest change of the logits at {len(places)} masked tokens of {probe.where}"
    return [
        Check(
            f"control: tokens {side} a mask are seen", share(torch.stack(found).min(), scale), SEEN_BOUND, ">=", detail
        )
        for side, found in gaps.items()
        if found
    ]


def save_and_load(probe: Probe) -> list[Check]:
    """Write the weights as safetensors, read them into a new model: the same bytes and the same logits."""
    from safetensors.torch import load_file, save_file

    model, device = probe.subject.model, probe.subject.device
    state = model.state_dict()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        save_file({name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}, file)
        fresh = build_model(probe.subject.loaded.model_config)
        fresh.load_state_dict(load_file(file))
    fresh = fresh.to(device).eval()
    again = fresh.state_dict()
    unequal = sum(not torch.equal(tensor.cpu(), again[name].cpu()) for name, tensor in state.items())
    with torch.inference_mode():
        gap = (fresh(probe.text[None].to(device)).logits.float() - probe.direct(probe.text[None])).abs().max()
    return [
        Check(
            "save and load: tensors that differ",
            float(unequal),
            0.0,
            detail=f"{len(state)} tensors through safetensors",
        ),
        Check("save and load: logits", float(gap), 0.0, detail="largest difference in a model built anew"),
    ]
