"""One length in one precision: prepare the forms, warm up, count memory, time them together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor

from benchmarks.attention.forms import CAUSAL, FULL, PACKED, Built, Form, UnavailableError
from benchmarks.attention.measure import Case, Memory, Times, interleave, memory
from benchmarks.attention.published import PUBLISHED
from benchmarks.attention.report import Against, Row, Stage
from benchmarks.attention.setting import Setting
from benchmarks.attention.stages import stages
from eval.tasks.efficiency.measure import Spread

FORMS = {form.name: form for form in [*FULL, *PUBLISHED, *PACKED, *CAUSAL]}


@dataclass(frozen=True)
class Effort:
    """How long to measure and how much memory to take."""

    rounds: int | None
    seconds: float
    max_gib: float | None
    profile: bool = False


def with_references(names: Sequence[str]) -> list[Form]:
    """The forms named and the exact ones that they are ratios to, in the list's order."""
    wanted = {reference for name in names for reference in FORMS[name].references} | set(names)
    return [form for name, form in FORMS.items() if name in wanted]


def available_gib(device: torch.device) -> float:
    """Free memory of the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 2**30
    return psutil.virtual_memory().available / 2**30


def measure(forms: Sequence[Form], setting: Setting, effort: Effort, peak: float) -> tuple[list[Row], list[Stage]]:
    """A row for each form, and the stages of ours if asked for. peak: FLOP/s in this precision."""
    cap = effort.max_gib if effort.max_gib is not None else available_gib(setting.device) / 2
    # One q, k, v and one gradient of the output for all: a form's own copies would cost more than what it computes.
    inputs = setting.inputs()
    gradient = torch.randn(inputs[0].shape, device=setting.device).to(setting.dtype)
    cases: dict[str, Case] = {}
    kept: dict[str, Memory] = {}
    reasons: dict[str, str] = {}
    parts: dict[str, list[Case]] = {}
    for form in forms:
        try:
            built = _build(form, setting, cap)
            case = Case(form.name, built.forward, inputs, built.weights, built.constants, built.context, (gradient,))
            kept[form.name] = memory(case, setting.device)
            cases[form.name] = case
            if effort.profile:
                parts[form.name] = _warm(form.name, setting, inputs, built)
        except UnavailableError as error:
            reasons[form.name] = str(error)
        except (RuntimeError, ValueError, TypeError, ImportError) as error:
            if not _may_fail(form, error):
                raise
            reasons[form.name] = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
        if reasons.get(form.name):
            for left in (cases, kept, parts):
                left.pop(form.name, None)
            if setting.device.type == "cuda":
                torch.cuda.empty_cache()

    together = [*cases.values(), *(part for found in parts.values() for part in found)]
    times = interleave(together, setting.device, rounds=effort.rounds, seconds=effort.seconds)
    rows = [
        _row(form, setting, times, kept, peak)
        if form.name in cases
        else Row(form.name, form.title, _name(setting), setting.length, reasons[form.name])
        for form in forms
    ]
    return rows, [_stage(name, part, setting, times) for name, found in parts.items() for part in found]


def _build(form: Form, setting: Setting, cap: float) -> Built:
    needed = form.gibibytes(setting)
    if needed > cap:
        raise UnavailableError(f"may need {needed:.1f} GiB, and {cap:.1f} are allowed (--max-gib)")
    return form.build(setting)


def _warm(name: str, setting: Setting, inputs: Sequence[Tensor], built: Built) -> list[Case]:
    found = stages(name, setting, inputs, built)
    for part in found:
        part.name = f"{name}/{part.name}"
        part.backward(part.outputs())
    return found


def _may_fail(form: Form, error: Exception) -> bool:
    """Out of memory, whoever asked for it; and whatever a published implementation of another version breaks on."""
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return True
    return form in PUBLISHED


def _name(setting: Setting) -> str:
    return str(setting.dtype).removeprefix("torch.")


def _row(form: Form, setting: Setting, times: dict[str, Times], kept: dict[str, Memory], peak: float) -> Row:
    own, flops = times[form.name], form.flops(setting)
    total = Spread.of(own.total)
    against = {}
    for name in form.references:
        other = times.get(name)
        against[name] = Against(
            ratio=Spread.of_ratios(own.total, other.total) if other else None,
            forward_ratio=Spread.of_ratios(own.forward, other.forward) if other else None,
            flop_ratio=flops / FORMS[name].flops(setting),
        )
    return Row(
        form=form.name,
        title=form.title,
        dtype=_name(setting),
        length=setting.length,
        skipped=None,
        rounds=len(own.total),
        total_seconds=total,
        forward_seconds=Spread.of(own.forward),
        forward_flops=flops,
        peak_share=3 * flops / total.median / peak,
        kept_bytes=kept[form.name].kept,
        peak_bytes=kept[form.name].peak,
        against=against,
    )


def _stage(form: str, part: Case, setting: Setting, times: dict[str, Times]) -> Stage:
    own = Spread.of(times[part.name].total)
    return Stage(
        form=form,
        stage=part.name.removeprefix(f"{form}/"),
        dtype=_name(setting),
        length=setting.length,
        rounds=len(times[part.name].total),
        seconds=own,
        share=own.median / Spread.of(times[form].total).median,
    )
