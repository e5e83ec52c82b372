"""Settings of generation."""

from __future__ import annotations

from pydantic import Field

from eval.suites.settings import Settings


class GenerateSettings(Settings):
    """Prompts and sampling."""

    prompt: tuple[str, ...] = Field((), description="own prompts; left out: held-out text")
    num_samples: int = Field(8, ge=1, description="samples from held-out text")
    prompt_tokens: int = Field(32, ge=1, description="tokens of held-out text before a continuation")
    max_new_tokens: int = Field(64, ge=1, description="longest continuation")
    temperature: float = Field(0.8, ge=0, description="0 takes the likeliest token")
    top_k: int = Field(50, ge=1, description="draw among so many likeliest tokens")
    top_p: float = Field(1.0, gt=0, le=1, description="draw among the likeliest tokens that reach this probability")
    repetition_penalty: float = Field(1.0, gt=0, description="above 1: what was written gets less likely")
    seed: int = Field(0, description="of random choices")
    masks: int = Field(3, ge=1, description="tokens hidden in each passage (masked models)")
