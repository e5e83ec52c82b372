"""The commands that come after a run, with its paths filled in: words behind ``nystrom``, for ``say_next``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data_pipeline.console import say_next
from data_pipeline.errors import UserError
from pretrain.config import load_config
from pretrain.distributed.signals import EXIT_DONE, EXIT_PREEMPTED


def say_after_training(code: int, words: Sequence[str], config: str, overrides: Sequence[str]) -> None:
    """Name what comes after a run that ended with this status: its evaluation, or ``words`` again to resume it."""
    if code == EXIT_PREEMPTED:
        say_next(resuming(words))
    elif code == EXIT_DONE:
        try:
            run = load_config(config, overrides)
        except UserError:  # the file has changed meanwhile
            return
        if run.data.valid is None:
            say_next(with_text(run.run_dir, run.model.objective))
        else:
            say_next(["eval", "validity", "lm", "--checkpoint", run.run_dir])


def resuming(words: Sequence[str]) -> list[str]:
    """The same command, which resumes: ``--resume never`` would move what there is aside once more."""
    found = [word.replace("--resume=never", "--resume=auto") for word in words]
    for place in range(1, len(found)):
        if found[place - 1] == "--resume" and found[place] == "never":
            found[place] = "auto"
    return found


def with_text(checkpoint: str | Path, objective: str) -> list[str]:
    """A look at what the model writes, or fills in."""
    if objective == "clm":
        return ["generate", "--checkpoint", str(checkpoint), "--prompt", "The"]
    return ["fill", "--checkpoint", str(checkpoint), "--text", "The [MASK] of the book"]


def converting(checkpoint: str | Path) -> list[str]:
    """The checkpoint as a folder for transformers, named as the run; empty if there is such a folder."""
    place = Path(checkpoint).resolve()
    name = place.parent.name if place.name in ("export", "export-ema") else place.name
    out = Path("hf") / name
    return [] if out.exists() else ["convert", "to-hf", str(checkpoint), str(out)]
