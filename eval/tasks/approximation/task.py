"""How far the attention of a trained model is from exact attention, and what that does to its quality.

On held-out text, the masked models' with the fixed noise of ``lm``:

* the output of each layer's attention, without the convolution, against exact softmax attention on the same queries,
  keys and values. The error is ||approximation - exact||_F / ||exact||_F over the tokens of a window, by layer and
  head, the mean over windows. Beside it uniform attention (the mean of V) and the ablations;
* the entropy of exact attention, and how much of it lies inside the causal form's window;
* the loss of the same weights with exact attention in one layer or in all, and with the window alone;
* both for other numbers of landmarks than the model was trained with.

Weights adapt to the attention that they are trained with: that exact attention lowers their quality says that they did,
and not that it is the worse attention.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.batches import IGNORE
from data_pipeline.batches.loader import validation_batches
from data_pipeline.batches.masking import Masking
from data_pipeline.errors import UserError
from eval.results.parts import Parts
from eval.results.schema import Outcome
from eval.shared.forms import changed, settings_read, with_attention
from eval.shared.progress import Progress
from eval.subject import Subject, batches
from eval.tasks.approximation import ApproximationSettings
from eval.tasks.approximation.figures import Figures
from eval.tasks.approximation.observe import observe
from eval.tasks.approximation.summary import summarize
from eval.tasks.approximation.variants import SWEPT, TRAINED, Variant, by_layer, defaults, sweeps, whole
from pretrain.model.attention.registry import forms_of
from pretrain.model.transformer import NystromformerLM

VERSION = 2
PART_TOKENS = 1024
"""Tokens of a part: some seconds for a model of five million weights on one core."""


def resolve(subject: Subject, settings: ApproximationSettings) -> ApproximationSettings:
    """The window and what is varied filled in; raises :class:`UserError` for a model that approximates nothing."""
    config = subject.loaded.model_config
    far = {form.far for form in forms_of(config).values()}
    if "approximate" not in far:
        words = {"exact": "computes exact attention", "unseen": "sees its window and nothing beyond it"}
        what = " or ".join(words[kind] for kind in sorted(far))
        raise UserError(
            f"suite approximation compares approximate with exact attention, and this model (attention: "
            f"{config.attention_label}) {what}: there is nothing to approximate. `efficiency` and `lm` measure it"
        )
    for name, key in SWEPT.items():
        if getattr(settings, name) and key not in settings_read(config):
            option, kind = f"--{name.replace('_', '-')}", "masked" if subject.causal else "causal"
            if key in settings_read(changed(config, {"objective": "mlm" if subject.causal else "clm"})):
                raise UserError(f"{option} is for {kind} models, and this one is not")
            raise UserError(f"{option} has no effect: attention {config.attention_label} does not read {key}")
    if settings.inverse_steps and not config.landmark_inverse:
        raise UserError("--inverse-steps has no effect: the model was trained without the inverse")
    length = subject.check_length(settings.length or subject.trained_length, "--length")
    open_values = {name: value for name, value in defaults(config).items() if not getattr(settings, name)}
    return settings.model_copy(update={"length": length, **open_values})


def data(subject: Subject, settings: ApproximationSettings) -> dict[str, Any]:
    """The held-out shards."""
    shards = subject.held_out()
    return {"path": str(shards.path), "tokens": shards.num_tokens, "hash": shards.fingerprint}


def run(subject: Subject, settings: ApproximationSettings, parts: Parts) -> Outcome:
    """Compare; raises :class:`UserError` without held-out shards or with less text than one window."""
    config = subject.loaded.model_config
    windows = HeldOutWindows.read(subject, settings)
    variants = [*whole(config), *by_layer(config), *sweeps(config, settings)]
    length = settings.length or 0
    with Progress(len(windows.inputs), "approximation", "window") as bar:

        def job(part: slice) -> Callable[[], list[dict[str, Any]]]:
            def work() -> list[dict[str, Any]]:
                found = measure(subject, variants, windows.inputs[part], windows.labels[part], settings.float64)
                bar.update(len(found))
                return found

            return work

        size = min(subject.rows(length), max(1, PART_TOKENS // length))
        jobs = [(f"windows {p.start} to {p.stop}", job(p)) for p in batches(len(windows.inputs), size)]
        measured = [window for found in parts.map(jobs) for window in found]
    for window, start, name in zip(measured, windows.starts, windows.ids(), strict=True):
        window |= {"start": int(start), "id": name}
    return summarize(Figures(config, settings, variants, measured))


@dataclass(frozen=True)
class HeldOutWindows:
    """W windows of held-out text, as the model is asked to read them."""

    inputs: Tensor
    """(W, n) int64."""
    labels: Tensor
    """(W, n) int64, -100 where there is no target."""
    starts: NDArray[np.int64]
    """(W,): where in the stream."""

    @classmethod
    def read(cls, subject: Subject, settings: ApproximationSettings) -> HeldOutWindows:
        """Spread evenly over the held-out stream; masked models see the same noise every time."""
        shards, length = subject.held_out(), settings.length or 0
        found = list(
            validation_batches(
                shards,
                objective="clm" if subject.causal else "mlm",
                seq_len=length,
                rows=1,
                max_tokens=min(settings.max_tokens, shards.num_tokens),
                seed=settings.seed,
                masking=Masking(settings.mask_rate, settings.mask_share, settings.random_share),
            )
        )
        inputs, labels = (torch.cat([getattr(batch, name) for batch in found]) for name in ("input_ids", "labels"))
        targets = (labels != IGNORE).any(1)
        if not targets.any():
            raise UserError(f"no token of {shards.path} was masked: the text is too short for --length {length}")
        starts = np.concatenate([batch.sample_ids.numpy() for batch in found])
        return cls(inputs[targets], labels[targets], starts[targets.numpy()])

    def ids(self) -> list[str]:
        """Hashes of what is read and where it stands."""
        rows = zip(self.starts, self.inputs.numpy(), self.labels.numpy(), strict=True)
        return [
            hashlib.sha256(b"%d" % start + inputs.tobytes() + labels.tobytes()).hexdigest()[:24]
            for start, inputs, labels in rows
        ]


def measure(
    subject: Subject, variants: list[Variant], inputs: Tensor, labels: Tensor, float64: bool
) -> list[dict[str, Any]]:
    """All that is known of each of R windows, as plain values."""
    model: NystromformerLM = copy.deepcopy(subject.model).double() if float64 else subject.model
    forms = {v.key: changed(model.config, v.changes) for v in variants if v.compared}
    seen = observe(model, inputs, forms)
    of_window = {
        "entropy": seen.entropy,
        "entropy_share": seen.entropy_share,
        "near": seen.near,
        "matrix": seen.matrix,
        "matrix_uniform": seen.matrix_uniform,
    }
    found: list[dict[str, Any]] = [
        {
            "errors": {key: errors[row].tolist() for key, errors in seen.errors.items()},
            **{key: None if value is None else value[row].tolist() for key, value in of_window.items()},
            "targets": int((labels[row] != IGNORE).sum()),
            "nats": {},
            "hits": {},
        }
        for row in range(len(inputs))
    ]
    for variant in variants:
        twin = model if variant.key == TRAINED else with_attention(model, variant.changes, variant.layers)
        for window, nats, hits in zip(found, *scores(twin, inputs, labels), strict=True):
            window["nats"][variant.key], window["hits"][variant.key] = nats, int(hits)
    return found


@torch.inference_mode()
def scores(model: NystromformerLM, inputs: Tensor, labels: Tensor) -> tuple[list[float], list[float]]:
    """For each of R windows: the sum of -log p of its targets, in nats, and how many of them the model puts first."""
    device = model.embeddings.word_embeddings.weight.device
    chosen = (labels != IGNORE).to(device)
    hidden = model(inputs.to(device), hidden=True).hidden
    assert hidden is not None
    logits, goal = model.head(hidden[chosen]), labels.to(device)[chosen]
    nats = torch.nn.functional.cross_entropy(logits, goal, reduction="none").double()
    row = chosen.nonzero()[:, 0]
    sums = torch.zeros(2, len(inputs), dtype=torch.float64, device=device)
    sums[0].index_add_(0, row, nats)
    sums[1].index_add_(0, row, (logits.argmax(-1) == goal).double())
    return sums[0].tolist(), sums[1].tolist()
