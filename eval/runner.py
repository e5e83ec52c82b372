"""Running a suite: the gate, the key, the result. What the command line does, for Python."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.errors import UserError
from eval.results.schema import ModelInfo, Result, read_result_or_none
from eval.results.store import obtain
from eval.subject import Subject, choose_device
from eval.suites.load import Suite
from eval.task import Settings
from eval.tasks.validity import ValiditySettings
from eval.tasks.validity.gate import Verdict, check
from eval.team import Team


@dataclass
class Runner:
    """Runs suites on one subject (None: suites that need no checkpoint only) and keeps their results in ``folder``.

    The validity gate is asked once, before the first suite that scores the model; its failure raises
    :class:`UserError` unless ``force``. With several processes (``team``) each has a runner and runs the same suites.
    """

    subject: Subject | None
    folder: Path
    force: bool = False
    rerun: bool = False
    verdict: Verdict | None = None
    longest: int = 0
    team: Team = field(default_factory=Team)

    def run(self, suite: Suite, name: str | None = None) -> tuple[Result, bool]:
        """The suite's result, and whether it was computed now. ``name``: of its file, if not the suite's own.

        Raises the :class:`UserError` of any process on all of them; the next suite can be run all the same.
        """
        with self.team.alike():
            return self._run(suite, name)

    def _run(self, suite: Suite, name: str | None) -> tuple[Result, bool]:
        task = suite.task
        subject = self.subject if task.needs_checkpoint else None
        if task.needs_checkpoint and subject is None:
            raise UserError(f"suite {suite.name} evaluates a model: say which with --checkpoint RUN")
        if task.is_gate:
            assert subject is not None
            assert isinstance(suite.settings, ValiditySettings)
            self.verdict = check(
                subject,
                self.folder,
                asked=True,
                rerun=self.rerun,
                settings=suite.settings,
                length=self.longest,
                team=self.team,
            )
            return self.verdict.result, self.verdict.fresh
        settings = task.resolve(subject, suite.settings)
        data = task.data(subject, settings)  # a wrong file is told at once, and not after a minute of the gate
        gate = self._gate(task.longest(settings)) if task.gated and subject is not None else "none"
        return obtain(
            self.folder,
            name or suite.name,
            task=task.name,
            version=task.version,
            model=subject.info() if subject is not None else _no_model(settings),
            settings=settings.as_dict(),
            data=data,
            gate=gate,
            compute=lambda parts: task.run(subject, settings, parts),
            rerun=self.rerun,
            team=self.team,
        )

    def expect(self, suites: Iterable[Suite]) -> None:
        """Have the gate look once at the longest text of these suites, and not again for each longer one."""
        for suite in suites:
            if suite.task.needs_checkpoint and suite.task.gated and self.subject is not None:
                with contextlib.suppress(UserError):  # said when the suite is run
                    settings = suite.task.resolve(self.subject, suite.settings)
                    self.longest = max(self.longest, suite.task.longest(settings))

    def _gate(self, length: int) -> str:
        assert self.subject is not None
        length = max(length, self.longest)
        # A pass over fewer positions or shorter texts, asked for by name, does not count: read from its file it would
        # not either.
        if self.verdict is None or not self.verdict.covers(length):
            self.verdict = check(self.subject, self.folder, length=length, team=self.team)
        if self.verdict.passed:
            return "passed"
        if not self.force:
            raise UserError(
                "the validity gate failed, so no score is computed:\n  "
                + "\n  ".join(self.verdict.failures)
                + "\n--force scores the model all the same (in Python: force=True)"
            )
        return "forced"


def outdated(folder: Path, model: ModelInfo, done: Collection[str]) -> list[str]:
    """A line for each other state of the weights that results in ``folder`` are of; ``done``: those of this command."""
    others: dict[tuple[int, str], list[str]] = {}
    for path in sorted(folder.glob("*.json")):
        result = None if path.stem in done else read_result_or_none(path)
        if result is not None and result.model.weights_hash not in ("", model.weights_hash):
            others.setdefault((result.model.tokens, result.model.weights_hash), []).append(path.stem)
    return [
        f"{', '.join(names)}: still of other weights ({weights[:12]}, {tokens:,} tokens seen; these are "
        f"{model.weights_hash[:12]}, {model.tokens:,}): evaluate again"
        for (tokens, weights), names in sorted(others.items())
    ]


def _no_model(settings: Settings) -> ModelInfo:
    """Of a task that trains its own models: the kind of device that its settings name."""
    return ModelInfo(device=choose_device(getattr(settings, "device", "auto")).type)
