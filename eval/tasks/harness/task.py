"""Tasks of EleutherAI's evaluation harness (lm-eval) on a causal checkpoint.

The harness makes the prompts and computes the scores; this adds the model (``model``), records that two
models can be paired by, and intervals over the documents (``outcome``).
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import json
import logging
import random
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import UserError
from eval.results.parts import Parts
from eval.results.schema import Outcome, Result
from eval.shared.progress import bars_on_terminals_only
from eval.subject import Subject
from eval.tasks.harness import TABLE, HarnessSettings

VERSION = 2


def resolve(subject: Subject, settings: HarnessSettings) -> HarnessSettings:
    """The window; raises :class:`UserError` for a masked model, without the harness, and without a task it knows."""
    if not subject.causal:
        raise UserError("harness scores continuations of prompts, which a masked model does not have: it is for clm")
    _require()
    if not settings.tasks:
        raise UserError("harness needs --tasks, names of lm-eval (`lm-eval ls tasks` lists them) or of --include-path")
    length = subject.check_length(settings.length or subject.trained_length, "--length")
    return settings.model_copy(update={"length": length})


def data(subject: Subject, settings: HarnessSettings) -> dict[str, Any]:
    """The tasks, by a hash of their configuration, their documents and those that the examples are drawn from."""
    import lm_eval

    with _quiet():
        tasks = _load(settings)["tasks"]
        digest = hashlib.sha256()
        documents = {}
        for name, task in sorted(tasks.items()):
            facts = [name, task.VERSION, task.dump_config()]
            digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
            docs = list(task.eval_docs)
            documents[name] = len(docs)
            examples = list(task.fewshot_docs() or []) if task.config.num_fewshot else []
            for doc in [*docs, *examples]:
                digest.update(json.dumps(doc, sort_keys=True, default=str).encode())
    version = lm_eval.__version__
    return {
        "lm_eval": version,
        "documents": documents,
        "hash": hashlib.sha256(f"{digest.hexdigest()} {version}".encode()).hexdigest(),
    }


def run(subject: Subject, settings: HarnessSettings, parts: Parts) -> Outcome:
    """Scores of every task and group with intervals over the documents."""
    from lm_eval.evaluator import evaluate

    from eval.tasks.harness.model import SubjectLM
    from eval.tasks.harness.outcome import outcome

    model = SubjectLM(subject, settings.length or 0, parts, settings.seed)
    with _quiet():
        random.seed(settings.seed)
        np.random.seed(settings.seed)  # tasks draw from the global state
        loaded = _load(settings)
        found = evaluate(lm=model, task_dict=loaded, limit=settings.limit, bootstrap_iters=0, log_samples=True)
    assert found is not None  # only processes of another rank get nothing, and the harness knows of one
    return outcome(found, settings)


def lines(result: Result, records: Path) -> list[str]:
    """For the terminal: what the table's note says, and where the single documents are."""
    table = result.table(TABLE)
    note = textwrap.wrap(table.note, 118) if table is not None else []
    return [*note, f"choices, answers and log-likelihoods of all {result.records['count']:,} documents: {records}"]


def _load(settings: HarnessSettings) -> Any:
    """The harness's tasks, with the examples and the seed that the settings ask for."""
    own = _manager(settings.include_path, False) if settings.include_path else None
    manager = own if own is not None and all(own.match_tasks([name]) for name in settings.tasks) else None
    manager = manager or _manager(settings.include_path, True)
    names: list[str] = []
    for asked in settings.tasks:
        matches = manager.match_tasks([asked])
        if not matches:
            close = difflib.get_close_matches(asked, manager.all_tasks, n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else "`lm-eval ls tasks` lists those of lm-eval"
            raise UserError(f"no task '{asked}' of lm-eval or of --include-path: {hint}")
        names += matches
    try:
        loaded = manager.load(list(dict.fromkeys(names)))
    except Exception as error:  # whatever the task's code and the datasets library raise
        raise UserError(f"--tasks {' '.join(settings.tasks)} cannot be loaded: {_line(error)}") from None
    for task in loaded["tasks"].values():
        own = task.config.num_fewshot
        if settings.num_fewshot is not None and own != 0:  # 0 of a task's own means that it allows none
            task.set_config(key="num_fewshot", value=settings.num_fewshot)
        elif own is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=settings.seed)
    return loaded


@functools.lru_cache(maxsize=2)
def _manager(include_path: tuple[str, ...], defaults: bool) -> Any:
    """The index of task files; with the thousands of lm-eval's own it takes seconds to make."""
    from lm_eval.tasks import TaskManager

    for folder in include_path:
        if not Path(folder).is_dir():
            raise UserError(f"--include-path {folder} is not a folder")
    try:
        return TaskManager(include_path=list(include_path) or None, include_defaults=defaults)
    except Exception as error:  # a task file at fault
        raise UserError(f"--include-path {' '.join(include_path)}: {_line(error)}") from None


def _require() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise UserError("harness needs lm-eval: pip install 'nystrom-pretrain[harness]'") from None


def _line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's remarks on every step, and without its bars where there is no terminal."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with bars_on_terminals_only():
            yield
    finally:
        logger.setLevel(level)
