"""Settings of the held-out loss."""

from __future__ import annotations

from pydantic import Field

from eval.suites.settings import Settings


class LMSettings(Settings):
    """Windows, and the noise of masked models."""

    length: int | None = Field(None, ge=2, description="window in tokens; left out: the longest length of the run")
    max_tokens: int | None = Field(
        None, ge=1, description="evaluate so many held-out tokens, spread evenly; left out: all"
    )
    seed: int = Field(0, description="of random choices")
    mask_rate: float = Field(0.15, gt=0, lt=1, description="share of the tokens that are targets (masked models)")
    mask_share: float = Field(0.8, ge=0, le=1, description="of the targets, share replaced by the mask token")
    random_share: float = Field(0.1, ge=0, le=1, description="of the targets, share replaced by a random token")
