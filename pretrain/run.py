"""One start of a run, from a configuration to an exit status."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.files import write_atomic
from pretrain.checkpoint import commit
from pretrain.checkpoint.commit import Manifest, TrainState
from pretrain.checkpoint.lock import RunLock
from pretrain.checkpoint.resume import (
    changes_training,
    check_resume,
    describe_change,
    extension,
    identity,
    rate_jump,
    refuse_extension,
    with_start_of,
)
from pretrain.checks import check_inputs
from pretrain.config import RunConfig, parse_config
from pretrain.curriculum.plan import validation_tokens
from pretrain.distributed import watchdog
from pretrain.distributed.immediate_exit import ImmediateExit
from pretrain.distributed.signals import (
    EXIT_DONE,
    EXIT_PREEMPTED,
    EXIT_STALLED,
    LAUNCHER_PID,
    StopFlag,
)
from pretrain.distributed.world import Rank
from pretrain.finish import LAUNCH_ID, STATES, export_weights, is_finished, report_preempted, write_status
from pretrain.initialize import check_place, read_source
from pretrain.machine import software
from pretrain.sources import Inputs
from pretrain.telemetry.folder import LOGS

RESUME = ("auto", "extend", "never")


def train(config: RunConfig, rank: Rank, *, resume: str = "auto", verbose: bool = False) -> int:
    """Start or continue the run that ``config`` describes, as process ``rank``; returns an exit status.

    ``resume``: ``auto`` resumes from the newest whole checkpoint, ``extend`` also that of a finished run, ``never``
    moves an existing run folder aside and starts over. Raises :class:`UserError` for what the user can mend; nearly all
    of it before torch and DeepSpeed are imported.
    """
    if resume not in RESUME:
        raise UserError(f"--resume {resume}: choose {', '.join(RESUME)}")
    inputs = check_inputs(config, rank.world_size)
    config = inputs.config
    # The source of a new run's weights is read before anything is written; a resume does not need it.
    is_new = config.init_from is not None and (resume == "never" or not commit.had_any(config.run_dir / "checkpoints"))
    if is_new:
        check_place(config, resume == "never")
    if resume != "never":
        # Read only, and by every process alike: nobody writes before all have met in the process group below.
        found = commit.newest(config.run_dir / "checkpoints")
        if found is not None:
            _check(found[1], inputs, rank.world_size)
            if is_finished(config.run_dir, found[1], inputs.plan.total_tokens):
                if rank.is_first:
                    print(
                        f"run {config.run_dir} is finished ({found[1].state.tokens:,} tokens); nothing to do",
                        flush=True,
                    )
                    write_status(config.run_dir, EXIT_DONE, found[1].state)
                return EXIT_DONE
            if resume != "extend":
                refuse_extension(found[1], config, inputs.plan)

    stop = StopFlag(launched=rank.world_size > 1 or LAUNCHER_PID in os.environ)
    from pretrain.distributed.agreement import flat
    from pretrain.distributed.rendezvous import ProcessesMissing, StoppedWhileWaiting
    from pretrain.distributed.world import World

    facts = flat(
        {**config.model_dump(mode="json"), "training text": inputs.fingerprint, "--resume": resume, **software()}
    )
    lock = RunLock(config.run_dir)
    with ImmediateExit(stop) as immediate_exit:
        try:
            world = World(rank, config.stall_seconds, stop, facts=facts)
        except StoppedWhileWaiting:
            return EXIT_PREEMPTED
        except ProcessesMissing as error:
            if str(error):
                print(error, file=sys.stderr, flush=True)
            return EXIT_STALLED
        try:
            return _train_together(inputs, world, stop, immediate_exit, lock, resume, verbose, is_new)
        finally:
            lock.release()
            world.close()


def _train_together(
    inputs: Inputs,
    world: Any,
    stop: StopFlag,
    immediate_exit: ImmediateExit,
    lock: RunLock,
    resume: str,
    verbose: bool,
    is_new: bool,
) -> int:
    from pretrain.callbacks import Callbacks, Ended, Started
    from pretrain.checkpoint.store import Checkpoints
    from pretrain.describe import describe
    from pretrain.distributed.world import run_on_first
    from pretrain.engine.probe import run_probe
    from pretrain.engine.training import TrainingEngine
    from pretrain.precision import resolve_precision
    from pretrain.telemetry.folder import write_readme, write_start
    from pretrain.telemetry.telemetry import METRICS, Telemetry, truncate_metrics
    from pretrain.trainer import Trainer

    run_dir = inputs.config.run_dir
    callbacks = Callbacks(inputs.config, world)
    immediate_exit.before_exit = lock.release
    watchdog.at("reading the weights to start with")
    source = read_source(inputs, world) if world.broadcast(is_new) else None
    run_on_first(world, lambda: _prepare_folder(inputs, resume, lock))
    state = TrainState()

    def report_stalled(state: TrainState) -> None:
        write_status(run_dir, EXIT_STALLED, state)
        lock.release()

    def report_stopped_at_start(state: TrainState) -> None:
        report_preempted(run_dir, state, "starting; nothing was trained")
        lock.release()

    world.watchdog.on_stall = lambda: report_stalled(state)
    watchdog.at("reading checkpoints")
    keep = inputs.config.checkpoint
    checkpoints = Checkpoints(run_dir / "checkpoints", world, keep.keep_last, keep.keep_every_tokens)
    found, passed_over = checkpoints.find()
    changed: dict[str, Any] = {}
    if found is not None:
        changed, state = _check(found[1], inputs, world.world_size), found[1].state
        if state.suspect_in_row and changes_training(changed):
            back = checkpoints.go_back(state)
            if back is not None:
                found, passed_over = back[0], passed_over + back[1]
                changed, state = _check(found[1], inputs, world.world_size), found[1].state
            # What came of the steps before says nothing about those to come.
            state = dataclasses.replace(state, bad_in_row=0)
    began = None if found is None else found[1].identity["config"]
    origin: dict[str, Any] | None = None
    if found is not None:
        origin = found[1].identity.get("init_from")
        source = None  # another start has trained meanwhile
        old = parse_config(found[1].identity["config"], where=str(found[0]))
        inputs = dataclasses.replace(inputs, config=with_start_of(inputs.config, old))
    elif inputs.config.init_from is not None:
        source = source or read_source(inputs, world)
        origin = source.identity()
        inputs = dataclasses.replace(inputs, config=source.config)
    precision = resolve_precision(inputs.config, world, began and began["precision"])
    # From here on, in the folder's config.yaml and in every checkpoint, nothing is left open.
    config = precision.config
    if config.validation.tokens is None:
        config = config.with_validation_tokens(
            validation_tokens(config, inputs.plan) if began is None else began["validation"]["tokens"]
        )
    inputs = dataclasses.replace(inputs, config=config)
    if world.is_first:
        immediate_exit.before_exit = lambda: report_stopped_at_start(state)

    watchdog.at("building the model", state.step)
    engine = TrainingEngine(config, world, verbose)
    watchdog.at("loading a checkpoint")
    if source is not None:
        engine.set_weights(source.value_of(world))
    loaded = checkpoints.load(engine, *found) if found is not None else []

    def describe_folder() -> None:
        try:
            write_atomic(run_dir / "config.yaml", config.to_yaml().encode())
            write_atomic(run_dir / "deepspeed.json", _json(engine.deepspeed_config))
            write_start(run_dir, world, state)
            write_readme(run_dir)
            if source is not None:
                source.write(run_dir)
            truncate_metrics(run_dir / METRICS, state.step)
        except OSError as error:
            raise UserError(f"run folder {run_dir} cannot be written: {error}") from None

    run_on_first(world, describe_folder)
    world.barrier()  # all are ready: from here on they stop together, at the edge of a step
    immediate_exit.end()
    if world.is_first:
        write_status(run_dir, None, state)
    plan = inputs.plan
    telemetry = Telemetry(
        run_dir, config, plan.total_tokens, state.tokens, world.is_first, state.step, plan.num_batches
    )
    trainer = Trainer(
        inputs,
        engine,
        world,
        checkpoints,
        telemetry,
        identity(
            config,
            inputs.fingerprint,
            world.world_size,
            _valid_fingerprint(inputs),
            origin,
        ),
        state,
        stop,
        callbacks,
    )
    world.watchdog.on_stall = lambda: report_stalled(trainer.state)
    callbacks.say = telemetry.say
    try:
        for line in passed_over:
            telemetry.say(line)
        telemetry.say(describe(config, inputs.plan, inputs.train, engine.num_parameters, world, precision.text))
        telemetry.say(precision.note)
        telemetry.say(None if source is None else source.in_words())
        telemetry.say(config.checkpoint.describe())
        telemetry.say(None if inputs.valid is None else config.validation.describe())
        telemetry.say(
            f"Process {os.getpid()} on {socket.gethostname()}. To save and stop: nystrom launch stop {run_dir}"
        )
        event: dict[str, Any] = {"event": "start"}
        if found is not None:
            event = {"event": "resume", "changed": changed, "passed_over": passed_over}
            telemetry.say(f"Resumes from {found[0]}: step {state.step}, {state.tokens:,} tokens.")
            for key, (old, new) in changed.items():
                for line in describe_change(key, old, new):
                    telemetry.say(f"  changed since: {line}")
            longer = extension(found[1], plan)
            if longer is not None:
                telemetry.say(f"  {longer}")
            jump = rate_jump(found[1], config, inputs.plan)
            for line in loaded if jump is None else [jump, *loaded]:
                telemetry.say(f"  {line}")
        telemetry.write(
            "event", step=state.step, tokens=state.tokens, seconds=state.seconds, world_size=world.world_size, **event
        )
        watchdog.at("trying the longest rows")
        telemetry.say(run_probe(engine, config, inputs.plan, world, state.tokens).sentence())
        total, processes = inputs.plan.total_tokens, world.world_size
        callbacks.call(
            "on_start", lambda: Started(config, run_dir, state.step, state.tokens, total, world.rank, processes)
        )
        try:
            code = trainer.run()
            if code == EXIT_DONE:
                code = export_weights(checkpoints.root, run_dir, world, telemetry, stop, trainer.state, lock.release)
        except RuntimeError:
            # All were asked to stop while there was nothing to save, and another process has left already.
            if trainer.has_unsaved_steps or not stop():
                raise
            immediate_exit.before_exit()
            return EXIT_PREEMPTED
        last = trainer.state
        callbacks.call("on_end", lambda: Ended(STATES[code], code, last.step, last.tokens, run_dir))
    except Exception:
        if world.is_first and not world.watchdog.is_ending:  # else this is what follows a stall, which has been told
            write_status(run_dir, None, trainer.state, "crashed")
        raise
    finally:
        telemetry.close()
    if world.is_first:
        write_status(run_dir, code, trainer.state)
    world.barrier()  # nobody leaves before all is written: a launcher ends the others when the first one exits non-zero
    return code


def _check(manifest: Manifest, inputs: Inputs, world_size: int) -> dict[str, Any]:
    return check_resume(
        manifest, inputs.config, inputs.plan, inputs.fingerprint, world_size, _valid_fingerprint(inputs)
    )


def _valid_fingerprint(inputs: Inputs) -> str | None:
    return None if inputs.valid is None else inputs.valid.fingerprint


def _prepare_folder(inputs: Inputs, resume: str, lock: RunLock) -> None:
    """Take the run folder, before anything in it is written, and move one aside that is not to be resumed."""
    run_dir = inputs.config.run_dir
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock.take()
        logs = Path(LOGS, os.environ.get(LAUNCH_ID, "none"))  # which the launcher has made already
        if resume == "never" and _holds_a_run(run_dir, {lock.path, run_dir / logs}):
            number = 1
            while (aside := run_dir.with_name(f"{run_dir.name}.old-{number}")).exists():
                number += 1
            lock.release()  # with the folder it would be moved
            run_dir.rename(aside)
            run_dir.mkdir(exist_ok=True)
            if (aside / logs).is_dir():
                (run_dir / LOGS).mkdir(exist_ok=True)
                (aside / logs).rename(run_dir / logs)
            lock.take()
            print(f"--resume never: the run that was there is now {aside}", flush=True)
        tokenizer = run_dir / "tokenizer"
        tokenizer.mkdir(exist_ok=True)
        inputs.train.shards.tokenizer().save(tokenizer)
    except OSError as error:
        raise UserError(f"run folder {run_dir} cannot be written: {error}") from None


def _holds_a_run(run_dir: Path, ours: set[Path]) -> bool:
    """Whether there is a file in the folder besides what this start has made; ends at the first."""
    files = (path for path in run_dir.rglob("*") if path.is_file())
    return any(ours.isdisjoint([path, *path.parents]) for path in files)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, default=str) + "\n").encode()
