"""One start of a run, from a configuration to an exit status."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.files import write_atomic
from pretrain.checkpoint import commit
from pretrain.checkpoint.commit import Manifest, TrainState
from pretrain.checkpoint.export import export, read_info
from pretrain.checkpoint.resume import check_resume, identity
from pretrain.checks import Inputs, check_inputs
from pretrain.config import RunConfig
from pretrain.distributed.signals import EXIT_BAD_STEPS, EXIT_DONE, EXIT_PREEMPTED, StopFlag
from pretrain.distributed.world import Rank

STATUS = "status.json"
LAUNCH_ID = "NYSTROM_LAUNCH_ID"
"""Environment variable by which a launcher recognises the status that its own start left behind."""
STATES = {EXIT_DONE: "done", EXIT_PREEMPTED: "preempted", EXIT_BAD_STEPS: "bad_steps"}


def train(config: RunConfig, rank: Rank, *, resume: str = "auto", verbose: bool = False) -> int:
    """Start or continue the run that ``config`` describes, as process ``rank``; returns an exit status.

    ``resume``: ``auto`` goes on from the newest whole checkpoint, ``never`` moves an existing run folder aside and
    starts over. Raises :class:`UserError` for what the user can mend; nearly all of it before torch and DeepSpeed are
    imported.
    """
    inputs = check_inputs(config, rank.world_size)
    config = inputs.config
    if resume == "auto":
        # Read only, and by every process alike: nobody writes before all have met in the process group below.
        found = commit.newest(config.run_dir / "checkpoints")
        if found is not None:
            _check(found[1], inputs, rank.world_size)
            if _is_finished(found[1], inputs):
                if rank.is_first:
                    print(
                        f"run {config.run_dir} is finished ({found[1].state.tokens:,} tokens); nothing to do",
                        flush=True,
                    )
                    write_status(config.run_dir, EXIT_DONE, found[1].state)
                return EXIT_DONE
    elif resume != "never":
        raise UserError(f"--resume {resume}: choose auto or never")

    stop = StopFlag(launched=rank.world_size > 1)
    from pretrain.distributed.world import World

    world = World(rank)
    try:
        return _train_together(inputs, world, stop, resume, verbose)
    finally:
        world.close()


def _train_together(inputs: Inputs, world: Any, stop: StopFlag, resume: str, verbose: bool) -> int:
    from pretrain.checkpoint.store import Checkpoints
    from pretrain.describe import describe, environment
    from pretrain.distributed.world import first_decides
    from pretrain.engine.probe import run_probe
    from pretrain.engine.training import TrainingEngine
    from pretrain.telemetry.telemetry import METRICS, Telemetry, truncate_metrics
    from pretrain.trainer import Trainer

    config, run_dir = inputs.config, inputs.config.run_dir
    first_decides(world, lambda: _prepare_folder(inputs, resume))
    checkpoints = Checkpoints(run_dir / "checkpoints", world, config.checkpoint.keep_last)
    found, passed_over = checkpoints.find()
    changed: dict[str, Any] = {}
    state = TrainState()
    if found is not None:
        changed, state = _check(found[1], inputs, world.world_size), found[1].state

    engine = TrainingEngine(config, world, verbose)
    if found is not None:
        checkpoints.load(engine, found[0])
    if world.is_first:
        write_atomic(run_dir / "config.yaml", config.to_yaml().encode())
        write_atomic(run_dir / "deepspeed.json", _json(engine.deepspeed_config))
        write_atomic(run_dir / "environment.json", _json(environment(world)))
        truncate_metrics(run_dir / METRICS, state.step)
        write_status(run_dir, None, state)
    telemetry = Telemetry(run_dir, config, inputs.plan.total_tokens, state.tokens, world.is_first)
    trainer = Trainer(
        inputs,
        engine,
        world,
        checkpoints,
        telemetry,
        identity(config, inputs.fingerprint, world.world_size),
        state,
        stop,
    )
    try:
        for line in passed_over:
            telemetry.say(line)
        telemetry.say(describe(config, inputs.plan, inputs.train, engine.num_parameters, world))
        event: dict[str, Any] = {"event": "start"}
        if found is not None:
            event = {"event": "resume", "changed": changed, "passed_over": passed_over}
            telemetry.say(f"Goes on from {found[0]}: step {state.step}, {state.tokens:,} tokens.")
            for key, (old, new) in changed.items():
                telemetry.say(f"  changed since: {key} from {old} to {new}")
        telemetry.write(
            "event", step=state.step, tokens=state.tokens, seconds=state.seconds, world_size=world.world_size, **event
        )
        telemetry.say(run_probe(engine, config, inputs.plan, world, state.tokens).sentence())
        code = trainer.run()
        if code == EXIT_DONE:
            _export(checkpoints.root, run_dir, world, telemetry)
    finally:
        telemetry.close()
    if world.is_first:
        write_status(run_dir, code, trainer.state)
    world.barrier()  # nobody leaves before all is written: a launcher ends the others when the first one exits non-zero
    return code


def write_status(run_dir: Path, code: int | None, state: TrainState) -> None:
    """Write ``status.json``: ``running`` (code None), or how this start ended. The launcher trusts nothing else."""
    body = {
        "state": "running" if code is None else STATES[code],
        "code": code,
        "step": state.step,
        "tokens": state.tokens,
        "launch_id": os.environ.get(LAUNCH_ID),
        "pid": os.getpid(),
        "time": time.time(),
    }
    write_atomic(run_dir / STATUS, _json(body))


def _check(manifest: Manifest, inputs: Inputs, world_size: int) -> dict[str, Any]:
    return check_resume(manifest, inputs.config, inputs.plan, inputs.fingerprint, world_size)


def _is_finished(manifest: Manifest, inputs: Inputs) -> bool:
    info = read_info(inputs.config.run_dir / "export")
    return (
        manifest.state.tokens >= inputs.plan.total_tokens and info is not None and info["step"] == manifest.state.step
    )


def _prepare_folder(inputs: Inputs, resume: str) -> None:
    run_dir = inputs.config.run_dir
    try:
        if resume == "never" and run_dir.is_dir() and any(run_dir.iterdir()):
            number = 1
            while (aside := run_dir.with_name(f"{run_dir.name}.old-{number}")).exists():
                number += 1
            run_dir.rename(aside)
            print(f"--resume never: the run that was there is now {aside}", flush=True)
        run_dir.mkdir(parents=True, exist_ok=True)
        tokenizer = run_dir / "tokenizer"
        tokenizer.mkdir(exist_ok=True)
        inputs.train.shards.tokenizer().save(tokenizer)
    except OSError as error:
        raise UserError(f"run folder {run_dir} cannot be written: {error}") from None


def _export(checkpoints: Path, run_dir: Path, world: Any, telemetry: Any) -> None:
    """Write ``export/`` from the last checkpoint; the first process does, the others wait."""
    if world.is_first:
        found = commit.newest(checkpoints)
        assert found is not None  # the trainer saved it
        digest = export(found[0], run_dir / "export")
        telemetry.say(f"Done. Weights for use: {run_dir / 'export'} (hash {digest[:12]}).")
    world.barrier()


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, default=str) + "\n").encode()
