"""Where a run's numbers go besides metrics.jsonl: Weights & Biases, TensorBoard. No failure of theirs ends a run."""

from __future__ import annotations

import contextlib
import html
import importlib.util
import json
import logging
import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from data_pipeline.errors import UserError
from data_pipeline.files import write_atomic
from pretrain.config import RunConfig, TelemetryConfig
from pretrain.telemetry.lines import print_line

TENSORBOARD = "tensorboard"
"""The package, the extra that brings it, and the folder below the run."""
WANDB_MODE = "WANDB_MODE"
"""Environment variable of Weights & Biases, which may allow less than ``telemetry.wandb`` but not more."""
WAIT_SECONDS = 30
"""For a server, and for a key from a terminal: `online` continues offline after it."""
_MODES = ("disabled", "offline", "online")
_OLD_MODES = {"dryrun": "offline", "run": "online"}


def check_trackers(config: TelemetryConfig) -> None:
    """Raise :class:`UserError` for a tracker that was asked for by name and is not installed."""
    if config.tensorboard and importlib.util.find_spec(TENSORBOARD) is None:
        raise UserError(
            "telemetry.tensorboard needs the package tensorboard, which is not installed: "
            "pip install 'nystrom-pretrain[tensorboard]', or set telemetry.tensorboard to false"
        )


class Tracker(Protocol):
    """What collects numbers by step. Any method may raise: :class:`Trackers` then continues without it."""

    def numbers(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Take numbers of a kind (``train``, ``valid``)."""

    def texts(self, step: int, texts: Sequence[str]) -> None:
        """Take the samples a model wrote."""

    def close(self) -> None:
        """Finish the files."""


class Trackers:
    """All trackers of a run, each of which is left out as soon as it fails."""

    def __init__(
        self, run_dir: Path, config: RunConfig, step: int = 0, say: Callable[[str], None] = print_line
    ) -> None:
        """Open what ``config`` asks for; ``step`` is the one that the run resumes from. ``say`` prints a line."""
        self._trackers: dict[str, Tracker] = {}
        self._say = say
        telemetry = config.telemetry
        mode, note = wandb_mode(telemetry.wandb, os.environ.get(WANDB_MODE))
        if note is not None:
            say(note)
        if mode == "online" and not self._open("wandb online", lambda: Wandb(run_dir, config, "online", step)):
            self._open("wandb offline", lambda: Wandb(run_dir, config, "offline", step))
        if mode == "offline":
            self._open("wandb", lambda: Wandb(run_dir, config, "offline", step))
        if telemetry.tensorboard:
            self._open(TENSORBOARD, lambda: TensorBoard(_summary_writer(run_dir / TENSORBOARD, step)))

    def line(self, line: dict[str, Any]) -> None:
        """Pass on the numbers of one line of metrics.jsonl; events have none."""
        if line["kind"] == "event" or not self._trackers:
            return
        values = {
            key: value for key, value in line.items() if isinstance(value, int | float) and key not in ("step", "time")
        }
        self._each(lambda tracker: tracker.numbers(line["kind"], line["step"], values))

    def texts(self, step: int, texts: Sequence[str]) -> None:
        """Pass on what a model wrote."""
        if texts:
            self._each(lambda tracker: tracker.texts(step, texts))

    def close(self) -> None:
        """Finish all files."""
        self._each(lambda tracker: tracker.close())

    def _open(self, name: str, build: Callable[[], Tracker]) -> bool:
        try:
            self._trackers[name] = build()
        except Exception as error:  # a tracker that fails in whatever way must not end a training run
            self._left_out(name, error)
        return name in self._trackers

    def _each(self, work: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                work(tracker)
            except Exception as error:
                del self._trackers[name]
                self._left_out(name, error)
                if name.startswith("wandb") and isinstance(error, ConnectionError):
                    forget_wandb()

    def _left_out(self, name: str, error: Exception) -> None:
        first_line = (str(error).splitlines() or [""])[0]
        self._say(f"{name} is left out: {type(error).__name__}: {first_line} (metrics.jsonl has everything)")


def wandb_mode(
    configured: str, environment: str | None, *, key: str = "telemetry.wandb", ask: str = "--set telemetry.wandb="
) -> tuple[str, str | None]:
    """Where Weights & Biases writes: the more private of both; and a line for the user if that is not ``configured``.

    ``configured``: what ``key`` says, for which ``ask`` is the option; ``environment``: the variable WANDB_MODE, None
    or empty if unset. The variable does not put a run online by itself: a configuration says offline unless somebody
    asked for more.
    """
    asked = _OLD_MODES.get(environment or "", environment or configured)
    if asked == configured or configured == "disabled":
        return configured, None
    if asked not in _MODES:
        return configured, f"{WANDB_MODE}={environment} is none of {', '.join(_MODES)}: {key} decides"
    if _MODES.index(asked) < _MODES.index(configured):
        return asked, f"wandb is {asked}, for the environment has {WANDB_MODE}={environment}"
    return configured, (
        f"wandb stays {configured} though the environment has {WANDB_MODE}={environment}: ask for more with "
        f"{ask}{asked}"
    )


def init_wandb(**options: Any) -> Any:
    """``wandb.init`` without output of its own; after an error another mode can be tried.

    Raises whatever wandb does.
    """
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    # With a terminal but without a key, online asks for one: not for longer than that.
    settings = wandb.Settings(console="off", silent=True, init_timeout=WAIT_SECONDS, login_timeout=WAIT_SECONDS)
    try:
        run = wandb.init(resume="allow", settings=settings, **options)
    except Exception:
        # Its service would keep the id as one in use, and refuse the offline run that is to follow.
        with contextlib.suppress(Exception):
            wandb.teardown()
        raise
    # Its threads log too. What they can't write is no news: the program says that its disk is full.
    for handler in logging.getLogger("wandb").handlers:
        handler.handleError = lambda record: None  # type: ignore[method-assign]
    return run


def forget_wandb() -> None:
    """Let go of a service of wandb's that is gone.

    Slurm's preemption signals it with all other processes of a step. At exit wandb would say goodbye to it, which is
    a traceback of 30 lines in the job's log.
    """
    import wandb

    with contextlib.suppress(Exception):
        wandb.teardown()


class Wandb:
    """Weights & Biases, in its own folder below the run, offline unless asked.

    One id for the life of the run folder: a resumed run writes a file of its own, which ``wandb sync`` appends to the
    run, in the order of their starts (wandb 0.31). Steps that an interrupted start had sent already are not sent again;
    without changes to the configuration their numbers are the same to the bit.
    """

    def __init__(self, run_dir: Path, config: RunConfig, mode: str, step: int) -> None:
        """``step``: the one that the run resumes from. Raises whatever wandb does."""
        folder = run_dir / "wandb"
        folder.mkdir(exist_ok=True)
        id_file = folder / "run_id"
        if not id_file.exists():
            write_atomic(id_file, uuid.uuid4().hex[:12].encode())
        self._sent_file = folder / "last_steps.json"
        self._before, self._unknown = _read_sent(self._sent_file, step)
        self._sent = dict(self._before)  # the last step of each kind
        self._run = init_wandb(
            project=config.telemetry.wandb_project,
            name=config.name,
            id=id_file.read_text().strip(),
            dir=str(run_dir),
            mode=mode,
            config=config.model_dump(mode="json"),
        )

    def numbers(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Numbers of one step are one record there, which those of the next finish."""
        if step > self._before.get(kind, self._unknown):
            self._log(kind, step, {f"{kind}/{name}": value for name, value in values.items()})

    def texts(self, step: int, texts: Sequence[str]) -> None:
        """As a page that the project shows beside the curves."""
        if step > self._before.get("samples", self._unknown):
            import wandb

            page = "".join(f"<pre>{html.escape(text)}</pre>" for text in texts)
            self._log("samples", step, {"samples": wandb.Html(page)})

    def close(self) -> None:
        self._run.finish()

    def _log(self, kind: str, step: int, values: dict[str, Any]) -> None:
        self._run.log(values, step=step)
        self._sent[kind] = step
        write_atomic(self._sent_file, json.dumps(self._sent).encode())


def _read_sent(file: Path, step: int) -> tuple[dict[str, int], int]:
    """The last step of each kind that earlier starts have sent, and what holds for kinds that are not in it.

    Where the file is damaged, all that an earlier start wrote up to the resume is taken for sent, and what it wrote
    beyond ``step`` may come twice.
    """
    try:
        sent = json.loads(file.read_text())
        return {str(kind): int(last) for kind, last in sent.items()}, -1
    except FileNotFoundError:
        return {}, -1
    except (ValueError, AttributeError, TypeError):
        return {}, step - 1


class TensorBoard:
    """Event files for TensorBoard, through a ``torch.utils.tensorboard.SummaryWriter``."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def numbers(self, kind: str, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{kind}/{name}", value, step)

    def texts(self, step: int, texts: Sequence[str]) -> None:
        for number, text in enumerate(texts):
            self._writer.add_text(f"samples/{number}", text, step)

    def close(self) -> None:
        self._writer.close()


def _summary_writer(folder: Path, step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    # What an interrupted start wrote beyond the checkpoint is not shown: it comes again.
    return SummaryWriter(log_dir=str(folder), purge_step=step + 1 if step else None)
