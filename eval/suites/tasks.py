"""The kinds of evaluation there are. A task is code; a suite (``eval.suites.load``) is a task with settings.

A task is a module with three functions and a number, imported only when it is run:

    VERSION: int
        Raised when the numbers it computes change; stored results of another version are computed again.
    def resolve(subject, settings) -> settings
        The settings with what was left open (the length, the precision) filled in from the model, and checked:
        raises UserError for what does not fit.
    def data(subject, settings) -> dict
        What will be read, with a ``hash`` of its content. Cheap, or as cheap as reading it is.
    def run(subject, settings, parts) -> Outcome
        The numbers. Work that takes minutes is divided into ``parts``.

``subject`` is None for a task that needs no checkpoint.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from eval.suites.settings import Settings


@dataclass(frozen=True)
class Task:
    """``module`` as above; ``settings``: "module:Class", a module that imports neither torch nor the task itself.

    ``held_out``: whether it may read the subject's held-out shards.
    """

    name: str
    module: str
    settings: str
    summary: str
    needs_checkpoint: bool = True
    gated: bool = True
    held_out: bool = True

    def settings_class(self) -> type[Settings]:
        """The class of its settings."""
        module, name = self.settings.split(":")
        return getattr(importlib.import_module(module), name)

    def load(self) -> Any:
        """Its module."""
        return importlib.import_module(self.module)


_ALL = [
    Task(
        "validity",
        "eval.validity.checks",
        "eval.validity.settings:ValiditySettings",
        "does the model see the future, its batch mates, its padding? runs before any other suite",
        gated=False,
    ),
    Task(
        "lm",
        "eval.language_modeling.task",
        "eval.language_modeling.settings:LMSettings",
        "held-out loss: perplexity, bits per byte, by position; masked accuracy",
    ),
    Task(
        "context",
        "eval.language_modeling.context",
        "eval.language_modeling.settings:ContextSettings",
        "does more context help? the same held-out tokens under contexts of different lengths",
    ),
    Task(
        "pppl",
        "eval.language_modeling.pseudo",
        "eval.language_modeling.settings:PseudoSettings",
        "pseudo-perplexity of a masked model: held-out tokens masked one at a time",
    ),
    Task(
        "classify",
        "eval.classification.task",
        "eval.classification.settings:ClassifySettings",
        "fine-tuning on labelled text, beside the same network from scratch, TF-IDF and the majority",
        held_out=False,
    ),
    Task(
        "generate",
        "eval.generation.task",
        "eval.generation.settings:GenerateSettings",
        "what the model writes: samples, and their statistics beside those of real text",
    ),
    Task(
        "lra",
        "eval.long_range.lra.task",
        "eval.long_range.lra.settings:LRASettings",
        "Long Range Arena: softmax and Nystrom attention trained from nothing on long sequences",
        needs_checkpoint=False,
        held_out=False,
    ),
    Task(
        "harness",
        "eval.harness.task",
        "eval.harness.settings:HarnessSettings",
        "tasks of EleutherAI's lm-eval on a causal model (extra 'harness')",
        held_out=False,
    ),
    Task(
        "approximation",
        "eval.approximation.task",
        "eval.approximation.settings:ApproximationSettings",
        "landmarks against exact attention on the same weights: error by layer and head, loss with either",
    ),
    Task(
        "efficiency",
        "eval.efficiency.task",
        "eval.efficiency.settings:EfficiencySettings",
        "tokens per second and memory by length, beside exact attention in the same model",
        held_out=False,
    ),
    Task(
        "needle",
        "eval.long_range.recall.task",
        "eval.long_range.recall.settings:NeedleSettings",
        "a word or passkey in a long row, by depth and length, as the model is and trained on it",
    ),
    Task(
        "mqar",
        "eval.long_range.recall.task",
        "eval.long_range.recall.settings:MQARSettings",
        "multi-query associative recall: key-value pairs, asked for later, by number and length",
    ),
    Task(
        "induction",
        "eval.long_range.recall.task",
        "eval.long_range.recall.settings:InductionSettings",
        "a passage that comes again, random or real text: what its first occurrence is worth, by distance",
    ),
]
TASKS: dict[str, Task] = {task.name: task for task in _ALL}
