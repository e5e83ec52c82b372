"""Tasks of EleutherAI's evaluation harness: settings and registration."""

from __future__ import annotations

from pydantic import Field

from eval.task import ModuleTask, Settings, register

TABLE = "harness"


class HarnessSettings(Settings):
    """Which tasks, and how they are put to the model."""

    tasks: tuple[str, ...] = Field((), description="tasks, groups or tags of lm-eval, or of include_path")
    include_path: tuple[str, ...] = Field((), description="folders with task files (YAML) of your own")
    num_fewshot: int | None = Field(None, ge=0, description="solved examples in each prompt; left out: the task's own")
    limit: int | None = Field(None, ge=1, description="documents of each task; left out: all")
    length: int | None = Field(None, ge=2, description="window in tokens; left out: the longest length of the run")
    seed: int = Field(0, ge=0, description="of random choices")


@register
class Harness(ModuleTask):
    """See ``task``."""

    name = "harness"
    summary = "tasks of EleutherAI's lm-eval on a causal model (extra 'harness')"
    settings = HarnessSettings
    module = "eval.tasks.harness.task"
    held_out = False
    order, section = 50, 15
    heading, lead = "lm-eval", "Tasks of EleutherAI's lm-eval harness."
