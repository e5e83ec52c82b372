"""Training from Python: a run of its own process, and the folder that it leaves."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from data_pipeline.bars import progress_bar
from data_pipeline.console import INNER
from data_pipeline.errors import UserError
from data_pipeline.html import html_facts
from data_pipeline.processes import child_command
from launch import shadowing
from launch.restarts import last_line
from launch.watch import read_status
from pretrain.checks import check_inputs
from pretrain.config import RunConfig, load_config, parse_config
from pretrain.config.load import apply_override, read_yaml
from pretrain.distributed.signals import EXIT_DONE, EXIT_PREEMPTED

if TYPE_CHECKING:
    from eval.model import Model

POLL_SECONDS = 0.5
TAIL_LINES = 40
"""Last lines of output that an error message is looked for in."""
STOP_SECONDS = 120.0
"""How long a run may take to save after an interrupt, before it is killed."""


@dataclass(frozen=True, init=False)
class Run:
    """A run folder. Everything is read from its files when it is asked for, so a run may still be training.

    ``Run("runs/first")`` reads the run of another program too; its functions raise nothing while files are missing.
    """

    folder: Path

    def __init__(self, folder: str | Path) -> None:
        """``folder``: ``output_dir`` and ``name`` of the configuration."""
        object.__setattr__(self, "folder", Path(folder))

    @property
    def state(self) -> str:
        """How the last start ended: "done", "preempted" (saved, and stopped), ..., or that it is "running"."""
        return str(read_status(self.folder).get("state", "unknown"))

    @property
    def config(self) -> RunConfig:
        """The configuration with nothing left open; raises :class:`UserError` for a folder without one."""
        return load_config(self.folder / "config.yaml")

    def metrics(self, kind: Literal["train", "valid", "event"] = "train") -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl`` of this kind, in order: ``pandas.DataFrame(run.metrics())`` is a table.

        A line of training has ``step``, ``tokens`` (so far), ``loss`` (nats a token that is predicted), ``lr``,
        ``grad_norm``, ``seconds`` (of training) and more; a "valid" one has the held-out ``loss``.
        """
        try:
            lines = (self.folder / "metrics.jsonl").read_bytes().splitlines()
        except OSError:
            return []
        found = []
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:  # the last one, which is being written
                continue
            if row.get("kind") == kind:
                found.append(row)
        return found

    @property
    def loss(self) -> float | None:
        """The last held-out loss in nats, of a run without held-out shards the last of training; None before both."""
        rows = [row for kind in ("valid", "train") for row in self.metrics(kind)[-1:] if row.get("loss") is not None]
        return float(rows[0]["loss"]) if rows else None

    @property
    def export(self) -> Path | None:
        """The folder with the final weights; None of a run that is not done."""
        folder = self.folder / "export"
        return folder if (folder / "export.json").is_file() else None

    def load(self, device: str = "auto") -> Model:
        """Its newest weights; raises :class:`UserError` where there are none yet."""
        from eval.model import Model

        return Model.open(self.folder, device)

    def _repr_html_(self) -> str:
        newest = (self.metrics() or [{}])[-1]
        facts = [("folder", self.folder), ("state", self.state), ("step", newest.get("step"))]
        facts += [("tokens", newest.get("tokens")), ("loss", None if self.loss is None else f"{self.loss:.4f}")]
        return html_facts(f"Run {self.folder.name}", [*facts, ("weights", self.export)])


def train(
    config: str | Path | Mapping[str, Any] | RunConfig,
    *,
    resume: Literal["auto", "extend", "never"] = "auto",
    nproc: int = 1,
    **overrides: Any,
) -> Run:
    """Train the run that a YAML file, a dictionary or a :class:`RunConfig` describes, to its end; returns its folder.

    Called again it resumes from the newest checkpoint, and a run that is done is not trained again. ``resume``: as in
    ``nystrom train``. ``nproc``: processes of this machine. ``overrides``: keys of the configuration with ``__`` for
    the dot, as in ``optimizer__lr=1e-3``, or ``**{"curriculum.0.seq_len": 256}``.

    Training runs in processes of its own, whose output is printed here. So it can be done again, in any thread, and
    leaves no signal handler and no process group behind. ``KeyboardInterrupt`` has it save a checkpoint, and is raised
    then; it also saves and ends when this process does. A run that was stopped from elsewhere (``nystrom launch
    stop``) is returned, with the state "preempted".

    Raises :class:`UserError` for mistakes in configuration and data, and where training ended with an error that its
    user can mend; ``RuntimeError`` with the last lines of output where it crashed.
    """
    if resume not in ("auto", "extend", "never"):
        raise UserError(f"resume {resume!r}: choose auto, extend or never")
    if nproc < 1:
        raise UserError(f"nproc {nproc}: at least one process is needed")
    hidden = shadowing.message(["launch"])
    if hidden is not None:
        raise UserError(hidden)
    raw, where = _plain(config)
    for key, value in overrides.items():
        apply_override(raw, f"{key.replace('__', '.')}={json.dumps(value, default=str)}")
    parsed = parse_config(raw, where)
    total = check_inputs(parsed, nproc).plan.total_tokens
    with tempfile.TemporaryDirectory(prefix="nystrom-") as folder:
        file = Path(folder) / f"{parsed.name}.yaml"
        file.write_text(yaml.safe_dump(raw, sort_keys=False, allow_unicode=True), encoding="utf-8")
        words = ["--config", str(file), "--resume", resume]
        # SIGTERM when this process is gone: the run saves and ends.
        start = ("pretrain",) if nproc == 1 else ("launch", "local", "--nproc", str(nproc))
        code, tail = _watch(child_command(*start, *words, number=signal.SIGTERM), parsed, total, resume == "never")
    if code in (EXIT_DONE, EXIT_PREEMPTED):
        return Run(parsed.run_dir)
    output = "".join(tail)
    if code == 2:
        raise UserError(output.rpartition("error: ")[2].strip() or "training refused its configuration")
    if code in (74, 76, 77):
        raise UserError(f"training ended with exit status {code}:\n{output.strip()}")
    raise RuntimeError(f"training ended with exit status {code}; its last lines:\n{output.strip()}")


def _plain(config: str | Path | Mapping[str, Any] | RunConfig) -> tuple[dict[str, Any], str]:
    """The configuration as plain values that may be changed, and its name for messages."""
    if isinstance(config, RunConfig):
        # Without defaults: whether a key was left out can matter to a resume.
        return config.model_dump(mode="json", exclude_unset=True), "configuration"
    if isinstance(config, Mapping):
        try:
            return json.loads(json.dumps(copy.copy(dict(config)), default=_path)), "configuration"
        except TypeError as error:
            raise UserError(f"configuration: {error}; plain values and paths only") from None
    return read_yaml(config), str(config)


def _path(value: Any) -> str:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a {type(value).__name__} cannot be written as YAML")


def _watch(command: list[str], config: RunConfig, total: int, anew: bool) -> tuple[int, deque[str]]:
    """Run a training command to its end, its output printed; returns its exit status and the last lines."""
    env = dict(os.environ)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [env.get("PYTHONPATH"), str(shadowing.HOME)]))
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)])
    env["PYTHONUNBUFFERED"] = env[INNER] = "1"
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    # From where it resumes: the speed and the time left are of this start.
    before = 0 if anew else last_line(config.run_dir).get("tokens", 0)
    bar = progress_bar(total=total, initial=before, unit="tok", unit_scale=True, desc=config.name)
    # A session of its own: Ctrl-C at a terminal, and a notebook's interrupt, are for this process, which passes it on.
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=env,
        start_new_session=True,
        encoding="utf-8",
        errors="replace",
    )

    def copy_lines() -> None:
        assert child.stdout is not None
        for line in child.stdout:
            tail.append(line)
            if bar.disable:
                print(line, end="", flush=True)
            elif not line.startswith("step "):  # the bar shows those
                bar.write(line, file=sys.stdout, end="")

    reader = threading.Thread(target=copy_lines, name="output of training", daemon=True)
    reader.start()
    try:
        while not _ended(child):
            row = last_line(config.run_dir)
            if row and row["tokens"] != bar.n and not bar.disable:  # a line twice would be drawn, and stored, twice
                loss = row.get("loss")
                shown = "" if loss is None else f", loss {loss:.4f}"
                bar.set_postfix_str(f"step {row['step']}{shown}", refresh=False)
                bar.update(row["tokens"] - bar.n)
        if child.returncode == EXIT_DONE and not bar.disable:
            bar.update(total - bar.n)
    except BaseException:  # KeyboardInterrupt above all
        child.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        while not _ended(child) and time.monotonic() < deadline:
            pass
        raise
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
        reader.join(timeout=5.0)
        bar.close()
    return (code if (code := child.returncode) >= 0 else 128 - code), tail


def _ended(child: subprocess.Popen[str]) -> bool:
    """Whether the child has ended, after :data:`POLL_SECONDS` at the latest."""
    try:
        child.wait(POLL_SECONDS)
    except subprocess.TimeoutExpired:
        return False
    return True
