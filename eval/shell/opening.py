"""A checkpoint made ready for text: opened, of the right kind, and what the validity gate said about it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from data_pipeline.errors import UserError

if TYPE_CHECKING:
    from eval.results.schema import Result
    from eval.subject import Subject


def open_model(checkpoint: str, objective: Literal["clm", "mlm"], device: str, precision: str) -> Subject:
    """The model of a run, one of its checkpoints or an export on its device, in evaluation mode, without held-out text.

    precision: fp32, bf16 (weights and cache in it), or auto for the faster. Raises :class:`UserError` for what cannot
    be loaded and for a model of the other objective.
    """
    import torch

    from eval.subject import Subject, choose_device, choose_precision
    from pretrain.checkpoint.load import load_model

    if not Path(checkpoint).exists():
        raise UserError(f"checkpoint {checkpoint} does not exist")
    chosen = choose_device(device)
    loaded = load_model(checkpoint)
    found = loaded.model_config.objective
    if found != objective:
        raise UserError(_wrong_kind(checkpoint, found))
    bf16 = choose_precision(precision, chosen) == "bf16"
    loaded.model.to(device=chosen, dtype=torch.bfloat16 if bf16 else torch.float32).eval()
    return Subject(loaded, None, chosen)


def _wrong_kind(checkpoint: str, objective: str) -> str:
    if objective == "mlm":
        return (
            f"{checkpoint} is a masked model (objective: mlm), which does not continue a text but fills in what is "
            f'masked: nystrom fill --checkpoint {checkpoint} --text "The [MASK] of the book"'
        )
    return (
        f"{checkpoint} is a causal model (objective: clm), which does not fill in masks but continues a text: "
        f'nystrom generate --checkpoint {checkpoint} --prompt "The book"'
    )


def gate_note(subject: Subject, checkpoint: str) -> str:
    """A line to be said where the validity gate failed for these weights, or never looked at them; "" if it passed.

    A verdict counts however long the texts and whichever version of the code it was measured with: only scores ask for
    more.
    """
    from eval.tasks.validity import CHECKS_TABLE

    result = last_verdict(subject, checkpoint)
    if result is None:
        return (
            "note: the validity gate has not looked at these weights: "
            f"nystrom eval validity --checkpoint {checkpoint} does"
        )
    if result.metrics["passed"].value == 1.0:
        return ""
    from eval.tasks.validity.checks import failures

    table = result.table(CHECKS_TABLE)
    failed = failures(table) if table else []
    return f"warning: the validity gate FAILED for these weights ({'; '.join(failed) or 'no check is named'})"


def last_verdict(subject: Subject, checkpoint: str) -> Result | None:
    """The newest result of the gate for these weights that the results folder holds, or None."""
    from eval.results.records import FINISHED, RESULT, results_folder
    from eval.results.schema import read_result_or_none
    from eval.tasks.validity.checks import TASK

    info = subject.info()
    run = subject.loaded.run_dir
    folders = {results_folder(Path(checkpoint), run)}
    if run is not None:  # a checkpoint or an export may hold the weights that were looked at as the run's
        folders.add(run / "eval")
    paths = [path for place in folders for path in (place / f"{TASK}.json", *place.glob(f"{FINISHED}/*/{RESULT}"))]
    found = [
        result
        for path in paths
        if (result := read_result_or_none(path)) is not None
        and result.task == TASK
        and result.model.identity == info.identity
    ]
    return max(found, key=lambda result: result.created, default=None)
