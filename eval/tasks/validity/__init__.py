"""The validity gate: its settings and its registration."""

from __future__ import annotations

from pydantic import Field

from eval.task import ModuleTask, Settings, register

CHECKS_TABLE = "checks"


class ValiditySettings(Settings):
    """Where the checks look."""

    length: int | None = Field(
        None,
        ge=2,
        description="tokens up to which models are looked at; left out: the longest length of the run, and of what is "
        "scored",
    )
    positions: int = Field(32, ge=1, description="positions of perturbation and prefix likelihood, segment edges first")
    seed: int = Field(0, ge=0, description="of random choices")


@register
class Validity(ModuleTask):
    """See ``checks``."""

    name = "validity"
    summary = "does the model see the future, its batch mates, its padding? runs before any other suite"
    settings = ValiditySettings
    module = "eval.tasks.validity.checks"
    is_gate, gated = True, False
    order = 0
