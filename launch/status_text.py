"""What ``nystrom launch status`` prints: some lines about one run, a table about several."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pretrain.telemetry.progress import duration

if TYPE_CHECKING:
    from launch.status import RunStatus

ERROR_LINES = 12
"""Of the first error; the log has the rest."""
COLUMNS = ("run", "state", "step", "done", "loss", "tok/s", "left", "checkpoint", "where")


def text(found: RunStatus) -> str:
    """One run, in lines."""
    since = f", since {_clock(found.since)}" if found.since and found.state in ("running", "silent", "starting") else ""
    lines = [f"{found.run}: {found.state}{' ' if found.what[:3] in ('on ', 'in ') else ': '}{found.what}{since}"]
    if found.step is not None:
        lines.append(_position(found))
    lines.append(_checkpoint(found))
    if found.torn:
        lines.append(f"a newer checkpoint is not whole: {found.torn}")
    if found.starts:
        lines.append(f"started {found.starts} time{'s' if found.starts > 1 else ''}")
    if found.logs:
        lines.append(f"logs: {found.logs}/rank-N.log ({found.ranks} file{'' if found.ranks == 1 else 's'})")
    if found.disk_free_gib is not None:
        lines.append(f"disk: {found.disk_free_gib:,.1f} GiB free")
    if found.first_error:
        lines.append(f"first error: rank {found.first_error['rank']} ({found.first_error['file']}):")
        lines += [f"  {line}" for line in found.first_error["lines"][:ERROR_LINES]]
    lines += found.notes
    if found.next:
        lines.append(f"next: {found.next}")
    return "\n".join([lines[0], *(f"  {line}" for line in lines[1:])])


def table(states: Sequence[RunStatus]) -> str:
    """Several runs, a line each."""
    rows = [COLUMNS, *map(_row, states)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _row(found: RunStatus) -> tuple[str, ...]:
    host = found.host if found.state in ("running", "silent", "starting") else None
    return (
        found.run,
        found.state,
        "" if found.step is None else f"{found.step:,}",
        "" if not found.total_tokens or found.tokens is None else f"{found.tokens / found.total_tokens:.1%}",
        "" if found.loss is None else f"{found.loss:.3f}",
        "" if found.tokens_per_second is None else f"{found.tokens_per_second:,.0f}",
        "" if found.seconds_left is None else duration(found.seconds_left),
        "none" if found.checkpoint is None else f"{found.checkpoint['step']:,}",
        host or (f"job {found.slurm_job}" if found.state == "waiting" else ""),
    )


def _position(found: RunStatus) -> str:
    """As a run's own lines of progress."""
    of = f" of {found.steps:,}" if found.steps else ""
    parts = [f"step {found.step:,}{of}"]
    if found.tokens is not None:
        share = f" ({found.tokens / found.total_tokens:.1%})" if found.total_tokens else ""
        parts.append(f"{found.tokens:,} tokens{share}")
    if found.loss is not None:
        parts.append(f"loss {found.loss:.3f}")
    if found.tokens_per_second is not None:
        parts.append(f"{found.tokens_per_second:,.0f} tok/s")
    if found.seconds_left is not None:
        parts.append(f"about {duration(found.seconds_left)} left")
    return "  ".join(parts)


def _checkpoint(found: RunStatus) -> str:
    if found.checkpoint is None:
        return "no checkpoint yet"
    age = duration(found.checkpoint["seconds"])
    return f"checkpoint: step {found.checkpoint['step']:,}, {age} old, whole as far as sizes tell"


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
