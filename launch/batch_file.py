"""What all batch files for Slurm have in common: the ``#SBATCH`` lines and the values that may stand in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import UserError


@dataclass(frozen=True)
class Resources:
    """What each job asks Slurm for; None leaves it to the cluster's default."""

    time: str | None = None
    cpus: int | None = None
    mem: str | None = None
    partition: str | None = None
    account: str | None = None
    options: tuple[str, ...] = ()  # further options of sbatch, as they stand: "--qos=long"

    def as_options(self) -> list[str]:
        """The same as options of sbatch."""
        named = {
            "--time": self.time,
            "--cpus-per-task": self.cpus,
            "--mem": self.mem,
            "--partition": self.partition,
            "--account": self.account,
        }
        return [f"{name}={value}" for name, value in named.items() if value is not None] + list(self.options)


def batch_file(options: Iterable[str], lines: Sequence[str]) -> str:
    """The text of a batch file; raises :class:`UserError` for an option that cannot stand in one."""
    header = []
    for option in options:
        # sbatch reads its comments by itself, not through the shell: a quote would be part of the value.
        if not option.startswith("-") or any(not c.isprintable() or c in " \"'\\" for c in option):
            raise UserError(f"{option!r} cannot stand in an sbatch file: it must be --NAME=VALUE without white space")
        header.append(f"#SBATCH {option}")
    return "\n".join(["#!/bin/bash", *header, "", *lines]) + "\n"


def job_name(name: str) -> str:
    """``name`` without the characters that Slurm or its file names would not take."""
    return re.sub(r"[^\w.-]+", "-", name)


def change_directory(directory: Path) -> str:
    """The line that goes there."""
    return f"cd {shlex.quote(str(directory))}"


_DAYS = re.compile(r"(\d+)-(\d+)(?::(\d+))?(?::(\d+))?")
_MINUTES = re.compile(r"(\d+)(?::(\d+))?")
_HOURS = re.compile(r"(\d+):(\d+):(\d+)")


def seconds_of(time: str) -> int | None:
    """The seconds of a time limit as sbatch reads it; None for no limit (UNLIMITED, 0).

    Forms: minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes and
    days-hours:minutes:seconds. Raises :class:`UserError` for any other.
    """
    if time.lower() in ("unlimited", "infinite"):
        return None
    if found := _DAYS.fullmatch(time):
        days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    elif found := _HOURS.fullmatch(time):
        days, (hours, minutes, seconds) = 0, (int(part) for part in found.groups())
    elif found := _MINUTES.fullmatch(time):
        days, hours, (minutes, seconds) = 0, 0, (int(part or 0) for part in found.groups())
    else:
        raise UserError(f"--time {time}: write it as hours:minutes:seconds or days-hours, for example 24:00:00")
    return (((days * 24 + hours) * 60 + minutes) * 60 + seconds) or None
