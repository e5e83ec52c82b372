"""The validity gate as the other suites see it: run it if no result stands for these weights, and say what failed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from eval import validity
from eval.results import Result, Table, read_result, run_task
from eval.subject import Subject


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
    def failures(self) -> list[str]:
        """The failed checks as text."""
        return validity.failures(self.result.table(validity.CHECKS_TABLE) or Table("", [], []))


def check(subject: Subject, path: Path, *, asked: bool = False, rerun: bool = False) -> Verdict:
    """The verdict on the subject's weights.

    A result at ``path`` that passed for these weights stands, whatever text it was measured on, unless the suite was
    ``asked`` for by name: then it must have been measured on this text too.
    """
    info = subject.info()
    if not asked and not rerun and validity.stands(path, info):
        return Verdict(read_result(path), False)
    settings = validity.ValiditySettings()
    shards = subject.shards
    data = {"path": str(shards.path), "hash": shards.fingerprint} if shards else {"path": None, "hash": "random tokens"}
    print("validity: checking causality, decoding, batch and padding, saving and loading", flush=True)
    result, fresh = run_task(
        path,
        task=validity.TASK,
        version=validity.VERSION,
        model=info,
        settings=validity.settings_dict(settings),
        data=data,
        compute=lambda: validity.run(subject, settings),
        rerun=rerun,
    )
    return Verdict(result, fresh)
