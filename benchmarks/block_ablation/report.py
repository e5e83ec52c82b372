"""The results as one Markdown table for each objective."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.attention_ablation.forms import Variant
from benchmarks.attention_ablation.report import NOTHING, Runs, compared, overall
from benchmarks.attention_ablation.study import Record
from benchmarks.block_ablation.blocks import BASELINE
from benchmarks.common import markdown


def table(
    variants: Sequence[Variant], by_tokens: Runs, by_time: Runs, timing: Record | None, steps: Mapping[str, int]
) -> str:
    """Held-out losses at equal tokens and at equal time. ``steps``: of each block at equal time."""
    head = ["block", "changes", "weights", "memory, MiB", "loss, equal tokens", f"against {BASELINE}"]
    if timing:
        head += ["ms a step", f"time / {BASELINE}", "steps, equal time", "loss, equal time", f"against {BASELINE}"]
    lines = []
    for variant in variants:
        own = by_tokens.get(variant.name, {})
        some = next(iter((own or by_time.get(variant.name, {})).values()), None)
        cells = [variant.name, variant.describe()]
        cells += [f"{some['parameters']:,}", f"{some['memory']['bytes'] / 2**20:.1f}"] if some else [NOTHING] * 2
        cells += _cells(variant.name, by_tokens)
        if timing:
            step = timing["forms"][variant.name]
            cells += [f"{1000 * step['seconds']:.1f}", f"{step['ratio']:.2f}", str(steps[variant.name])]
            cells += _cells(variant.name, by_time)
        lines.append(cells)
    return markdown(head, lines)


def _cells(name: str, runs: Runs) -> list[str]:
    return compared(runs.get(name, {}), runs.get(BASELINE, {}), "loss", overall("loss"))


def explain(seeds: Sequence[int], timing: Record | None, seconds: float | None, share: float = 1.0) -> str:
    """What the figures mean. ``share``: of the seconds, for all blocks but the baseline."""
    lines = [f"Held-out cross entropy in nats, without z-loss. 'against {BASELINE}' is relative, seed by seed."]
    if len(seeds) > 1:
        lines.append(f"Means over seeds {', '.join(map(str, seeds))}, in brackets largest minus smallest.")
    if timing and seconds is not None:
        lines.append(
            f"Times: medians of {timing['rounds']} interleaved rounds of one training step each. At equal time each "
            f"block gets the steps that fit into {seconds:.1f} s by them, and its learning rate falls to 0 there."
            + (f" All but {BASELINE} have {share:g} of that time." if share != 1 else "")
        )
    return " ".join(lines)
