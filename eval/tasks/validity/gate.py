"""The validity gate as the other suites see it: run it if no result stands for these weights, and say what failed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from eval.results.schema import Result, Table, read_result
from eval.results.store import obtain
from eval.subject import Subject
from eval.tasks.validity import CHECKS_TABLE, ValiditySettings, checks
from eval.team import Team


@dataclass(frozen=True)
class Verdict:
    """The gate's result; ``fresh`` if it was computed now."""

    result: Result
    fresh: bool

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return self.result.metrics["passed"].value == 1.0

    @property
    def full(self) -> bool:
        """Whether it looked at as many positions as by default."""
        return self.result.settings["positions"] >= ValiditySettings().positions

    @property
    def failures(self) -> list[str]:
        """The failed checks as text."""
        return checks.failures(self.result.table(CHECKS_TABLE) or Table("", [], []))


def check(
    subject: Subject,
    folder: Path,
    *,
    asked: bool = False,
    rerun: bool = False,
    settings: ValiditySettings | None = None,
    team: Team | None = None,
) -> Verdict:
    """The verdict on the subject's weights; ``folder``/validity.json holds it.

    A result there that passed for these weights stands, whatever text it was measured on, unless the suite was
    ``asked`` for by name: then it must have been measured on this text too.
    """
    info = subject.info()
    team = team or Team()
    path = folder / f"{checks.TASK}.json"
    if not asked and not rerun:
        standing = team.first(lambda: read_result(path) if checks.stands(path, info) else None)
        if standing is not None:
            return Verdict(standing, False)
    settings = settings or ValiditySettings()
    result, fresh = obtain(
        folder,
        checks.TASK,
        task=checks.TASK,
        version=checks.VERSION,
        model=info,
        settings=settings.as_dict(),
        data=checks.data(subject, settings),
        gate="none",
        compute=lambda parts: checks.run(subject, settings, parts),
        rerun=rerun,
        team=team,
    )
    return Verdict(result, fresh)
