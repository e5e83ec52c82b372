"""What the doctor says: findings, each with its level, whom it is about, and what to do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

Level = Literal["problem", "warning"]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or looks wrong. A problem keeps a run from starting; a warning does not."""

    level: Level
    check: str
    """What was looked at: one word, for filters of the JSON file."""
    where: str
    """The host, or several with commas."""
    message: str
    remedy: str

    def as_dict(self) -> dict[str, str]:
        """For the JSON file."""
        return asdict(self)


def problem(check: str, where: str, message: str, remedy: str) -> Finding:
    """A finding that must be mended before a run starts."""
    return Finding("problem", check, where, message, remedy)


def warning(check: str, where: str, message: str, remedy: str) -> Finding:
    """A finding that costs speed or may hurt later."""
    return Finding("warning", check, where, message, remedy)


def merged(findings: Iterable[Finding]) -> list[Finding]:
    """Problems first; what several hosts have alike is one finding that names them all."""
    hosts: dict[tuple[Level, str, str, str], list[str]] = {}
    for each in findings:
        found = hosts.setdefault((each.level, each.check, each.message, each.remedy), [])
        if each.where not in found:
            found.append(each.where)
    out = [Finding(level, check, _names(where), message, do) for (level, check, message, do), where in hosts.items()]
    return sorted(out, key=lambda each: each.level != "problem")


def _names(hosts: Sequence[str], most: int = 6) -> str:
    if len(hosts) <= most:
        return ", ".join(hosts)
    return f"{', '.join(hosts[:most])} and {len(hosts) - most} more"


def verdict(findings: Iterable[Finding]) -> int:
    """The exit status: 1 with a problem, else 0."""
    return int(any(each.level == "problem" for each in findings))
