"""What an evaluation task is, and how one becomes known.

A task is code; a suite (``eval.suites.load``) is a task with settings under a name. Each task is a class in a module
or folder of ``eval/tasks/`` that registers itself, and no list names it:

    @register
    class LanguageModeling(Task):
        name = "lm"
        summary = "held-out loss"
        ...

The command line, the runner, the comparison and the report read what they need of a task from its class. All modules
of ``eval/tasks/`` are imported when a command starts, so none of them imports torch at its top. A task in one file
imports what is heavy within its functions; a task in a folder names the module that has them (:class:`ModuleTask`).
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from data_pipeline.registry import RegistrationError, Registry

if TYPE_CHECKING:
    from eval.results.parts import Parts
    from eval.results.schema import Outcome, Result
    from eval.subject import Subject

PARTS = {
    "summary": "one line for `nystrom eval list`",
    "settings": "the class of its settings",
    "version": "a number, raised when the results change",
    "data": "what will be read, with a hash",
    "run": "the numbers",
}
"""What a task must have: one that lacks some of it is refused where it registers."""
LAST = 1000
LENGTHS = ("length", "lengths", "max_length", "contexts")
"""Fields of settings that say how long the rows are that the model is given, in tokens."""


def quotes_field() -> Any:
    """The field ``quotes`` of tasks that read files. It is in no key: what was read is in the hash of the data."""
    return Field(
        "auto",
        exclude=True,
        description="double quotes in CSV and TSV: csv, they enclose fields; none, they are text; auto: csv for CSV, "
        "none for TSV",
    )


class Settings(BaseModel):
    """Base of a task's settings: typed, ranges checked, unknown keys refused, values frozen.

    One class serves a suite's YAML, the command line's options (each field is one, with its description as help) and
    Python. Fields are plain: numbers, text, truth values, choices (``Literal``), tuples of numbers or text, or None.
    A field of several tasks means the same in all of them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for the key and the result."""
        return self.model_dump(mode="json")

    @property
    def own_text(self) -> str:
        """The option that names text to read in place of the held-out shards; "" where none does."""
        return ""


@dataclass(frozen=True)
class Row:
    """A row of the report's summary. ``ranked``: whether the best of several runs is marked.

    ``reference``: the metric that it must be better than to show anything; the report says where it is not.
    """

    metric: str
    label: str
    ranked: bool = True
    reference: str = ""


@dataclass(frozen=True)
class Bars:
    """A table of the results that the report draws as bars.

    Its first column names a predictor, the second is the ``value``, the third its standard deviation or None. The rows
    ``model`` and ``control`` are drawn for each run, under these labels. All other rows are drawn once, but for those
    ``left_out``, which depend on the run too.
    """

    table: str
    value: str
    model: str
    model_label: str
    control: str
    control_label: str
    left_out: tuple[str, ...] = ()


class Task:
    """Base of all tasks. A subclass gives ``summary``, ``settings``, ``version``, ``data`` and ``run``.

    ``subject`` is None in its functions for a task that needs no checkpoint. Each raises :class:`UserError` for what
    the user can mend.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    """One line for ``nystrom eval list``."""
    settings: ClassVar[type[Settings]]
    version: int
    """Raised when the numbers change: stored results of another version are computed again."""

    needs_checkpoint: ClassVar[bool] = True
    gated: ClassVar[bool] = True
    """Whether the validity gate must have passed."""
    held_out: ClassVar[bool] = True
    """Whether it may read the subject's held-out shards."""
    is_gate: ClassVar[bool] = False
    """Whether it is the validity gate itself: it runs first, and its result stands at the head of the report."""

    any_objective: ClassVar[bool] = False
    """Whether its figures mean the same for masked and causal models. A masked model's loss is not a causal one's: it
    sees both sides of the word."""
    timings: ClassVar[bool] = False
    """Whether it measures time, so that the setting ``precision`` changes what is measured. It else changes only how a
    score is computed."""
    immaterial: ClassVar[frozenset[str]] = frozenset()
    """Further settings in which two results may differ and be compared all the same."""

    order: ClassVar[int] = LAST
    """Place in lists and in the report's summary; tasks of the same place stand by name."""
    section: ClassVar[int | None] = None
    """Place of its section in the report, if another than ``order``."""
    heading: ClassVar[str] = ""
    """Of its section; left out: its name."""
    lead: ClassVar[str] = ""
    """A sentence under the heading; left out: the summary."""
    rows: ClassVar[tuple[Row, ...]] = ()
    """What the report's summary shows of it; left out: the first metric of each suite."""
    variants: ClassVar[bool] = True
    """Whether suites of other names are variants of the plain one, which the summary leaves out beside it. False where
    each suite has data of its own."""
    bars: ClassVar[Bars | None] = None

    if TYPE_CHECKING:  # no bodies to inherit: a task without them is refused

        def data(self, subject: Subject | None, settings: Any) -> dict[str, Any]:
            """What will be read, with a ``hash`` of its content. Cheap, or as cheap as reading it is."""

        def run(self, subject: Subject | None, settings: Any, parts: Parts) -> Outcome:
            """The numbers. Work that takes minutes is divided into ``parts``."""

    def resolve(self, subject: Subject | None, settings: Any) -> Any:
        """The settings with what was left open (length, precision) filled in from the model, and checked."""
        return settings

    def lines(self, result: Result, records: Path) -> list[str]:
        """What the terminal shows of a result below its metrics; left out: nothing more. ``records``: the file of its
        single items."""
        return []

    def longest(self, settings: Any) -> int:
        """Tokens of the longest row that the model is given under resolved ``settings``.

        The validity gate looks as far as that. Read from the usual fields: a task that has others overrides it.
        """
        if self.timings:
            return 0  # what it writes down is no score
        fields = (getattr(settings, name, None) for name in LENGTHS)
        return max([0, *(n for f in fields for n in (f if isinstance(f, tuple) else (f,)) if isinstance(n, int))])


class ModuleTask(Task):
    """A task whose functions ``resolve``, ``data``, ``run`` and whose ``VERSION`` are in a module, imported on use.

    The module may have ``lines`` too.
    """

    module: ClassVar[str]

    @property
    def version(self) -> int:  # type: ignore[override]
        """The module's ``VERSION``."""
        return self.load().VERSION

    def resolve(self, subject: Subject | None, settings: Any) -> Any:
        """See :class:`Task`."""
        return self.load().resolve(subject, settings)

    def data(self, subject: Subject | None, settings: Any) -> dict[str, Any]:
        """See :class:`Task`."""
        return self.load().data(subject, settings)

    def run(self, subject: Subject | None, settings: Any, parts: Parts) -> Outcome:
        """See :class:`Task`."""
        return self.load().run(subject, settings, parts)

    def lines(self, result: Result, records: Path) -> list[str]:
        """See :class:`Task`; of a module without ``lines`` none."""
        show = getattr(self.load(), "lines", None)
        return [] if show is None else show(result, records)

    def load(self) -> Any:
        """The module; raises :class:`RegistrationError` where it lacks a part."""
        module = importlib.import_module(self.module)
        lacking = [part for part in ("VERSION", "resolve", "data", "run") if not hasattr(module, part)]
        if lacking:
            raise RegistrationError(f"task '{self.name}': module {self.module} lacks {', '.join(lacking)}")
        return module


class _Unknown(Task):
    """What is assumed of a task that results name and this version does not have."""

    summary = ""


TASKS: Registry[Task] = Registry("task", "eval.tasks", Task, PARTS)
_INSTANCES: dict[type[Task], Task] = {}
TaskClass = TypeVar("TaskClass", bound=type[Task])


def register(task: TaskClass) -> TaskClass:
    """Class decorator: add a task. Raises :class:`RegistrationError` for one that lacks a part, or a name taken."""
    if issubclass(task, ModuleTask) and not hasattr(task, "module"):
        raise RegistrationError(f"task '{getattr(task, 'name', task.__name__)}' ({task.__module__}) lacks module")
    return TASKS.register(task)


def task_of(name: str) -> Task:
    """The task of that name. Raises ``ValueError`` that names those there are, and the nearest one."""
    member = TASKS.get(name)
    return _INSTANCES.setdefault(member, member())


def tasks() -> dict[str, Task]:
    """All tasks by name, in their order."""
    found = map(task_of, TASKS.names())
    return {task.name: task for task in sorted(found, key=lambda task: (task.order, task.name))}


def described(name: str) -> Task:
    """What is known of the task that a result names; of one that this version does not have, what is usual."""
    return task_of(name) if name in TASKS.names() else _unknown(name)


def gate() -> Task:
    """The validity gate."""
    return next(task for task in tasks().values() if task.is_gate)


def _unknown(name: str) -> Task:
    task = _Unknown()
    task.name = name  # type: ignore[misc]
    return task
