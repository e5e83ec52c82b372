"""The validity gate as the other suites see it: run it if no result stands for these weights, and say what failed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from eval.results.schema import Result, Table, read_result
from eval.results.store import obtain
from eval.subject import Subject
from eval.tasks.validity import CHECKS_TABLE, ValiditySettings, checks
from eval.tasks.validity.probe import probed_length
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

    def covers(self, length: int) -> bool:
        """Whether it speaks for scores at ``length`` tokens: a failure always does."""
        return not self.passed or checks.covers(self.result.settings, length)

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
    length: int = 0,
    team: Team | None = None,
) -> Verdict:
    """The verdict on the subject's weights up to ``length`` tokens; ``folder``/validity.json holds it.

    A result there that passed for these weights up to that length stands, whatever text it was measured on, unless the
    suite was ``asked`` for by name: then it must have been measured on this text too.
    """
    info = subject.info()
    team = team or Team()
    length = probed_length(subject, length)
    path = folder / f"{checks.TASK}.json"
    settings = settings or ValiditySettings()
    if not rerun and settings.length is None:
        own = settings.model_copy(update={"length": length}).as_dict() if asked else None
        text = checks.data(subject, settings)["hash"] if asked else None

        def standing() -> Result | None:
            if not checks.stands(path, info, length):
                return None
            result = read_result(path)
            alike = own is None or (result.settings | {"length": length} == own and result.data["hash"] == text)
            return result if alike else None

        found = team.first(standing)
        if found is not None:
            return Verdict(found, False)
    if settings.length is None:
        settings = settings.model_copy(update={"length": length})
    settings = checks.resolve(subject, settings)
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
