"""Settings of the validity gate."""

from __future__ import annotations

from pydantic import Field

from eval.suites.settings import Settings


class ValiditySettings(Settings):
    """Where the checks look."""

    positions: int = Field(32, ge=1, description="positions of perturbation and prefix likelihood, segment edges first")
    seed: int = Field(0, ge=0, description="of random choices")
