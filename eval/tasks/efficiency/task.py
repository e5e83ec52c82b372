"""Tokens per second and memory by length: the model's attention beside exact softmax attention and its window alone.
A pyramid stands beside flat landmarks, too.

All forms run on the same weights through the same code, in one process, a round of all of them at a time
(``measure.interleave``); ratios are taken within rounds. Timings are of a machine: the result's environment says which,
and the same machine with another load gives others.

* forward: all layers over full sequences, without the head: scoring, encoding, reading a prompt;
* forward and backward (``backward``): the loss with its head, and the gradients of all weights;
* decoding (causal models): milliseconds per token at texts that end at each length, and the bytes of the cache.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from typing import Any

import torch

from data_pipeline.errors import UserError
from eval.results.parts import Parts
from eval.results.schema import Outcome
from eval.shared.forms import EXACT, FLAT, WINDOW, settings_read, with_attention
from eval.shared.progress import Progress
from eval.subject import Subject, choose_precision
from eval.tasks.efficiency import EfficiencySettings
from eval.tasks.efficiency.measure import interleave, peak_memory
from eval.tasks.efficiency.summary import Measured, summarize
from eval.tasks.efficiency.work import (
    BACKWARD,
    DECODE,
    FORWARD,
    Decoding,
    backward,
    forward,
    out_of_memory,
    tokens,
    warm,
)
from pretrain.machine import cpu_name
from pretrain.model.decoding import cache_bytes
from pretrain.model.transformer import NystromformerLM

VERSION = 1
LENGTHS = {"cpu": (512, 1024, 2048, 4096), "cuda": (1024, 4096, 16384, 32768)}


def resolve(subject: Subject, settings: EfficiencySettings) -> EfficiencySettings:
    """Lengths and precision filled in; raises :class:`UserError` for lengths that the model cannot read."""
    config = subject.loaded.model_config
    lengths = tuple(subject.check_length(length, "--lengths") for length in settings.lengths)
    if not lengths:
        lengths = LENGTHS["cuda" if subject.device.type == "cuda" else "cpu"]
        if config.positions == "learned":
            lengths = (*(n for n in lengths if n < config.max_positions), config.max_positions)
    precision = choose_precision(settings.precision, subject.device)
    decode_tokens = settings.decode_tokens if subject.causal else 0
    decoded = decode_tokens * (settings.rounds + 1)
    if decoded >= lengths[0]:
        raise UserError(
            f"--decode-tokens {decode_tokens} in {settings.rounds} rounds and one to warm up are {decoded} tokens, and "
            f"the shortest text has {lengths[0]} (--lengths): decode fewer, or 0"
        )
    return settings.model_copy(update={"lengths": lengths, "precision": precision, "decode_tokens": decode_tokens})


def data(subject: Subject, settings: EfficiencySettings) -> dict[str, Any]:
    """No text is read. What stands for the data is the machine: another one gives other numbers."""
    found = {"tokens": "random", "device": machine(subject), "threads": torch.get_num_threads()}
    return {**found, "hash": hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()}


def machine(subject: Subject) -> str:
    """The device by name."""
    if subject.device.type == "cuda":
        return torch.cuda.get_device_name(subject.device)
    return f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}"


def run(subject: Subject, settings: EfficiencySettings, parts: Parts) -> Outcome:
    """Measure, in a single part: several processes at work would disturb each other."""
    config = subject.loaded.model_config
    own = f"as trained ({config.attention_label})"
    forms: dict[str, dict[str, Any]] = {own: {}, "exact softmax": EXACT, "window alone": WINDOW}
    if config.landmark_levels > 1 and "landmark_levels" in settings_read(config):
        forms["flat landmarks"] = FLAT
    forms = {name: changes for name, changes in forms.items() if changes.get("attention") != config.attention}
    found = parts.one("timing", lambda: measure(subject, settings, forms))
    note = (
        f"{machine(subject)}, {torch.get_num_threads()} threads, {settings.precision}, {settings.sequences} at a time"
    )
    return summarize([Measured(**item) for item in found], own, note, settings)


def measure(subject: Subject, settings: EfficiencySettings, forms: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A :class:`Measured` for each length, kind of work and form, as plain values."""
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    # A copy: changing the dtype of a module changes its parameters.
    model = subject.model if dtype == torch.float32 else copy.deepcopy(subject.model).to(dtype)
    twins = {name: with_attention(model, changes) for name, changes in forms.items()}
    kinds = [FORWARD, *([BACKWARD] if settings.backward else []), *([DECODE] if settings.decode_tokens else [])]
    found: list[dict[str, Any]] = []
    with Progress(len(settings.lengths) * len(kinds), "efficiency", "measurement") as bar:
        for length in settings.lengths:
            for kind in kinds:
                found += _measure(kind, length, twins, settings, subject.device, dtype)
                bar.update()
    return found


def _measure(
    kind: str,
    length: int,
    twins: dict[str, NystromformerLM],
    settings: EfficiencySettings,
    device: torch.device,
    dtype: torch.dtype,
) -> list[dict[str, Any]]:
    cases: dict[str, Callable[[], object]] = {}
    memory: dict[str, int | None] = {}
    for name, model in twins.items():
        inputs, labels = tokens(model, settings.sequences, length, settings.seed)
        try:
            if kind == DECODE:
                # The texts end at ``length`` with the last round, so that its positions are all that is needed.
                prompt = inputs[:, : length - settings.decode_tokens * (settings.rounds + 1)]
                cases[name] = Decoding(model, prompt, settings.decode_tokens, length)
                memory[name] = cache_bytes(model.config, settings.sequences, length, dtype)
            else:
                work = forward(model, inputs) if kind == FORWARD else backward(model, inputs, labels)
                memory[name] = peak_memory(work, device, [inputs, labels, *model.parameters()])
                cases[name] = work
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            memory[name] = None
    cases = warm(cases)
    times = interleave(cases, device, settings.rounds, settings.seed)
    return [
        {
            "kind": kind,
            "length": length,
            "form": name,
            "tokens": settings.sequences * (settings.decode_tokens if kind == DECODE else length),
            "seconds": times.get(name, []),
            "bytes": memory[name] if name in times else None,
        }
        for name in twins
    ]
