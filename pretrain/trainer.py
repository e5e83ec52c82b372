"""The training loop."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import torch

from data_pipeline.batches import IGNORE
from data_pipeline.batches.loader import Batch, TrainLoader
from pretrain.callbacks import Callbacks, Saved, Stepped, Validated
from pretrain.checkpoint.commit import TrainState, tag_name
from pretrain.checkpoint.store import Checkpoints, SaveFailed
from pretrain.curriculum.plan import micro_batches
from pretrain.curriculum.stages import model_at, stage_maskings, stage_model, stage_settings
from pretrain.distributed import watchdog
from pretrain.distributed.signals import EXIT_BAD_STEPS, EXIT_DONE, EXIT_NOT_SAVED, EXIT_PREEMPTED
from pretrain.distributed.world import World
from pretrain.engine.training import StepResult, TrainingEngine
from pretrain.finish import write_status
from pretrain.optim.schedule import learning_rate
from pretrain.sources import Inputs
from pretrain.telemetry.profile import StepProfiler
from pretrain.telemetry.reports import StepRecord, StepReports
from pretrain.telemetry.telemetry import Telemetry
from pretrain.validation import validate, validate_longest, write_samples

STATUS_SECONDS = 10.0
"""Between two writings of ``status.json``, which is a small file."""


class Trainer:
    """Runs the plan from ``state`` to its end, or until asked to stop.

    Each step takes this process's rows in micro-batches. The loss is the SUM over targets divided by the number of
    targets of the whole optimizer step, over micro-batches and processes. Neither their number nor an uneven spread of
    masked targets then changes the mathematics.

    Tokens, here and in every metric (throughput, MFU, schedules), are slots of the batch: with packed documents the
    padding counts, and FLOPs are those of rows that each hold one sequence.
    """

    def __init__(
        self,
        inputs: Inputs,
        engine: TrainingEngine,
        world: World,
        checkpoints: Checkpoints,
        telemetry: Telemetry,
        identity: dict[str, Any],
        state: TrainState,
        stop: Callable[[], bool],
        callbacks: Callbacks,
    ) -> None:
        self.inputs, self.engine, self.world = inputs, engine, world
        self.config, self.plan = inputs.config, inputs.plan
        self.checkpoints, self.telemetry = checkpoints, telemetry
        self.identity, self.state, self.callbacks = identity, state, callbacks
        self.stop = lambda: callbacks.stop_asked or stop()
        self._saved_step = state.step if state.step else -1
        self._sound_step = state.sound_step
        self._tried_at = self._status_at = time.monotonic()
        self._started = self._tried_at - state.seconds
        self._reports = StepReports(inputs, engine, world, telemetry, self._event, state.losses, state.suspect_in_row)
        self._profiler = StepProfiler(self.config.run_dir, self.config.telemetry, world.is_first)

    def run(self) -> int:
        """Train; returns an exit status: done, preempted (a checkpoint is saved), not saved, or too many bad steps."""
        loader = TrainLoader(
            self.inputs.train,
            self.plan,
            objective=self.config.model.objective,
            seed=self.config.seed,
            masking=stage_maskings(self.config),
            rank=self.world.rank,
            world_size=self.world.world_size,
            tokens_consumed=self.state.tokens,
        )
        self.engine.train()
        self.engine.enter_stage(model_at(self.config, self.state.tokens))
        try:
            if self._validation_due() and not self._validate():  # cut short by the signal that ended the last start
                return self._preempt()
            batches = iter(loader)
            while self.state.tokens < self.plan.total_tokens:
                self._profiler.begin(self.state.step + 1)
                began = time.monotonic()
                watchdog.at("reading data", self.state.step + 1)
                batch = next(batches)
                waited = time.monotonic() - began
                watchdog.at("training")
                # The one collective of the control plane in a step: targets to divide by, whether anybody must stop,
                # the loss of the step before, and whether a checkpoint is due by the first process's clock.
                targets, stopping, loss_sum, is_time = self.world.sum(
                    [
                        float((batch.labels != IGNORE).sum()),
                        float(self.stop()),
                        self._reports.unsummed,
                        float(self.world.is_first and self._is_time_to_save()),
                    ]
                )
                self._reports.settle(loss_sum)
                if stopping:
                    return self._preempt()
                if is_time:
                    self._save_or_train_on()
                    began = time.monotonic() - waited  # a save is not part of the step's time
                self._train_step(batch, targets, began, waited)
                self.telemetry.say(self._profiler.end(self.state.step))
                if self.state.bad_in_row >= self.config.max_bad_steps:
                    return self._stop_for_bad_steps()
                self._confirm()
                if self._validation_due() and not self._validate():
                    return self._preempt()
                if self._checkpoint_due(batch):
                    self._save_or_train_on()
            if not self.save(last=True):
                return self._not_saved()
            self._event("done")
            return EXIT_DONE
        finally:
            self.telemetry.say(self._profiler.close())
            loader.close()

    def _train_step(self, batch: Batch, targets: float, began: float, waited: float) -> None:
        stage = self.plan.stages[batch.stage]
        if batch.tokens_before == stage.start_tokens:
            self._enter_stage(batch)
        input_ids = batch.input_ids.to(self.world.device, non_blocking=True)
        labels = batch.labels.to(self.world.device, non_blocking=True)
        tokens = batch.tokens_before + batch.tokens
        lr = learning_rate(
            tokens, total_tokens=self.plan.total_tokens, peak=self.config.optimizer.lr, schedule=self.config.schedule
        )
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for part in micro_batches(len(input_ids), self.config.curriculum[batch.stage].micro_batch):
            documents = None if batch.document_ids is None else batch.document_ids[part]
            watchdog.at("training")  # each micro-batch is progress
            loss_sum += self.engine.backward(input_ids[part], labels[part], 1.0 / max(targets, 1.0), documents)
        result = self.engine.step(lr)

        self._reports.clock.add(batch.tokens, began, waited)
        added = self.engine.take_added_sums()
        step = StepRecord(self.state.step + 1, tokens, batch, targets, lr, loss_sum, result, added)
        loss = self._reports.loss(step, last=tokens >= self.plan.total_tokens)
        bad = not result.applied and loss is not None and not self._is_scale_search(loss.mean, result)
        self.state = dataclasses.replace(
            self.state,
            step=step.number,
            tokens=tokens,
            bad_steps=self.state.bad_steps + bad,
            bad_in_row=self.state.bad_in_row + 1 if bad else 0,
            seconds=time.monotonic() - self._started,
        )
        if loss is not None:
            (self._reports.bad_step if bad else self._reports.log)(step, loss, self.state)
        self.telemetry.advance(step.number, tokens, loss=self._reports.last_loss, lr=lr, seq_len=batch.seq_len)
        self.callbacks.call(
            "on_step",
            lambda: Stepped(
                step=step.number,
                tokens=tokens,
                stage=batch.stage,
                seq_len=batch.seq_len,
                lr=lr,
                grad_norm=result.grad_norm,
                applied=result.applied,
                loss=loss.mean if loss is not None and targets else None,
                seconds=self.state.seconds,
            ),
        )
        if time.monotonic() - self._status_at >= STATUS_SECONDS:
            self._write_status()

    def _write_status(self) -> None:
        """Say in ``status.json`` how far the run is: the last words of a process that is killed."""
        self._status_at = time.monotonic()
        if self.world.is_first:
            write_status(self.config.run_dir, None, self.state)

    def _enter_stage(self, batch: Batch) -> None:
        before = stage_model(self.config, max(0, batch.stage - 1))
        model = stage_model(self.config, batch.stage)
        # Part of the step to come: a checkpoint of this edge is from before it, and a resume does it again.
        self.engine.enter_stage(model, before.trained_positions)
        settings = stage_settings(self.config, batch.stage)
        self._reports.stage()
        self._event("stage", step=self.state.step + 1, stage=batch.stage, seq_len=batch.seq_len, **settings)

    def _is_scale_search(self, loss: float, result: StepResult) -> bool:
        """Whether fp16's loss scale only overflowed on its way down: the loss is finite and the scale can fall."""
        return self.config.precision == "fp16" and math.isfinite(loss) and result.loss_scale > 1.0

    def _validation_due(self) -> bool:
        """At the end of each stage, and at each multiple of ``validation.every_tokens``, once."""
        if self.inputs.valid is None:
            return False
        last, now = self.state.validated_tokens, self.state.tokens
        every = self.config.validation.every_tokens
        crossed = every is not None and now // every > last // every
        return crossed or any(last < stage.end_tokens <= now for stage in self.plan.stages)

    def _validate(self) -> bool:
        """Measure the held-out loss; False if it was cut short by a request to stop."""
        assert self.inputs.valid is not None
        state = self.state
        index = self.plan.stage_index(max(0, state.tokens - 1))
        stage = self.plan.stages[index]
        began = time.monotonic()
        result = validate(
            self.engine,
            self.inputs.valid,
            self.config,
            self.world,
            seq_len=stage.seq_len,
            micro_batch=self.config.curriculum[index].micro_batch,
            stop=self.stop,
        )
        if result is None:
            return False
        longest = validate_longest(
            self.engine, self.inputs.valid, self.config, self.world, seq_len=stage.seq_len, stop=self.stop
        )
        if longest is None:
            return False
        took = time.monotonic() - began
        self.telemetry.write("valid", step=state.step, tokens=state.tokens, stage=index, took=took, **result, **longest)
        accuracy = f", masked accuracy {result['accuracy']:.1%}" if "accuracy" in result else ""
        documents = f", document loss {result['document_loss']:.4f}" if "document_loss" in result else ""
        beyond = f"; at length {longest['longest_seq_len']}: {longest['longest_loss']:.4f}" if longest else ""
        self.telemetry.say(
            f"step {state.step}, {state.tokens:,} tokens: held-out loss {result['loss']:.4f}, perplexity "
            f"{result['perplexity']:.2f}{accuracy}{documents} (length {stage.seq_len}, {result['targets']:,} targets, "
            f"{took:.1f} s){beyond}"
        )
        texts: list[str] = []
        if self.config.model.objective == "clm" and self.config.validation.samples:
            watchdog.at("writing samples")
            texts = write_samples(
                self.engine, self.inputs.valid, self.config, self.world, self.config.run_dir / "samples", state.step
            )
            self.telemetry.samples(state.step, texts)
            for text in texts[:1]:
                self.telemetry.say(f"  it writes: {' '.join(text.split())}")
        self.state = dataclasses.replace(state, validated_tokens=state.tokens)
        self.callbacks.call(
            "on_validation",
            lambda: Validated(
                step=state.step,
                tokens=state.tokens,
                stage=index,
                seq_len=stage.seq_len,
                loss=result["loss"],
                perplexity=result["perplexity"],
                accuracy=result.get("accuracy"),
                longest_loss=longest.get("longest_loss"),
                texts=tuple(texts),
                seconds=took,
                document_loss=result.get("document_loss"),
            ),
        )
        return True

    def _checkpoint_due(self, batch: Batch) -> bool:
        every = self.config.checkpoint.every_tokens
        if every is None or self.state.tokens >= self.plan.total_tokens:  # the last one is saved in any case
            return False
        return self.state.tokens // every > batch.tokens_before // every

    def _is_time_to_save(self) -> bool:
        """Whether ``checkpoint.every_minutes`` have passed since the last attempt. Only the first process is asked."""
        minutes = self.config.checkpoint.minutes
        return minutes is not None and self.state.step > 0 and time.monotonic() - self._tried_at >= 60 * minutes

    def _save_or_train_on(self) -> None:
        if not self.save():
            self.telemetry.say("Training continues; the next checkpoint is tried when it is due.")

    @property
    def has_unsaved_steps(self) -> bool:
        """Whether anything was trained since the last checkpoint, or since the start."""
        return self.state.step not in (0, self._saved_step)

    def _confirm(self) -> None:
        """Take note of a step that went well after the last checkpoint: that one is sound."""
        if 0 < self._saved_step < self._reports.good_step and self._sound_step != self._saved_step:
            self._sound_step = self._saved_step
            for line in self.checkpoints.confirm(self._saved_step):
                self.telemetry.say(line)

    def save(self, *, last: bool = False) -> bool:
        """Commit a checkpoint of this step, unless there is one; False, on all processes, if that did not work.

        ``last``: no step follows.
        """
        began = self._tried_at = time.monotonic()
        if self._saved_step == self.state.step:
            return True
        watchdog.at("saving a checkpoint", self.state.step)
        self._reports.settle_now()
        self._confirm()
        self.state = dataclasses.replace(
            self.state,
            seconds=began - self._started,
            losses=self._reports.losses,
            suspect_in_row=self._reports.suspect_in_row,
            sound_step=self._sound_step,
        )
        try:
            lines = self.checkpoints.save(self.engine, self.state, self.identity, last)
        except SaveFailed as error:
            self._event("save_failed", reason=str(error), needed=error.needed, free=error.free)
            self.telemetry.say(f"step {self.state.step}: the checkpoint is NOT saved: {error}.")
            return False
        self._saved_step = self.state.step
        took = time.monotonic() - began
        self._write_status()
        self._event("checkpoint", took=took)
        for line in lines:
            self.telemetry.say(line)
        folder = self.checkpoints.root / tag_name(self.state.step)
        self.callbacks.call("on_checkpoint", lambda: Saved(self.state.step, self.state.tokens, folder, took))
        return True

    def _stop_for_bad_steps(self) -> int:
        """The end of a run whose numbers are not finite: the next start must not begin with weights from the streak."""
        self._confirm()
        back = self.checkpoints.go_back(dataclasses.replace(self.state, sound_step=self._sound_step))
        if back is not None:
            (folder, _), lines = back
            for line in lines:
                self.telemetry.say(line)
            self.telemetry.say(
                f"The same command, with the cause mended, resumes from {folder}, from before these steps."
            )
        else:
            self.telemetry.say(
                "No checkpoint is known to be from before these steps: with the cause mended, start over "
                "(--resume never moves this folder aside)."
            )
        return EXIT_BAD_STEPS

    def _preempt(self) -> int:
        if not self.save():
            return self._not_saved()
        self._event("preempted")
        self.telemetry.say(f"stopped at step {self.state.step} with a checkpoint; the same command resumes")
        return EXIT_PREEMPTED

    def _not_saved(self) -> int:
        lost = f"the steps after {self._saved_step}" if self._saved_step > 0 else "all steps so far"
        self._event("not_saved", last_saved=self._saved_step)
        self.telemetry.say(
            f"stopped at step {self.state.step} WITHOUT a checkpoint of it: {lost} are lost. Free space in "
            f"{self.checkpoints.root} (or correct what is said above), then run the same command: it trains them again."
        )
        return EXIT_NOT_SAVED

    def _event(self, name: str, **values: Any) -> None:
        where = {"step": self.state.step, "tokens": self.state.tokens, "seconds": self.state.seconds}
        self.telemetry.write("event", event=name, **{**where, **values})
