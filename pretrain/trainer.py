"""The training loop."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import torch

from data_pipeline.batches.loader import Batch, TrainLoader
from pretrain.checkpoint.commit import TrainState
from pretrain.checkpoint.store import Checkpoints
from pretrain.checks import Inputs
from pretrain.curriculum.plan import micro_batches
from pretrain.distributed import watchdog
from pretrain.distributed.signals import EXIT_BAD_STEPS, EXIT_DONE, EXIT_PREEMPTED
from pretrain.distributed.world import World, memory_gib
from pretrain.engine.training import StepResult, TrainingEngine
from pretrain.optim.schedule import learning_rate
from pretrain.telemetry.telemetry import Telemetry, model_flops_utilization, peak_flops
from pretrain.validation import IGNORE, perplexity, validate, write_samples

SAMPLE_IDS_SHOWN = 8


class Trainer:
    """Runs the plan from ``state`` to its end, or until asked to stop.

    Each step: this process's rows, split into micro-batches; the loss is the SUM over targets divided by the number of
    targets of the whole optimizer step, over micro-batches and processes, so that neither their number nor an uneven
    spread of masked targets changes the mathematics.

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
    ) -> None:
        self.inputs, self.engine, self.world = inputs, engine, world
        self.config, self.plan = inputs.config, inputs.plan
        self.checkpoints, self.telemetry = checkpoints, telemetry
        self.identity, self.state, self.stop = identity, state, stop
        self._saved_step = state.step if state.step else -1
        self._started = time.monotonic() - state.seconds
        self._window = _Window()
        gpu = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else None
        self._peak_flops = peak_flops(self.config.telemetry, gpu)

    def run(self) -> int:
        """Train; returns an exit status: done, preempted (a checkpoint is saved), or too many bad steps."""
        loader = TrainLoader(
            self.inputs.train,
            self.plan,
            objective=self.config.model.objective,
            seed=self.config.seed,
            masking=self.config.data.masking.build(),
            rank=self.world.rank,
            world_size=self.world.world_size,
            tokens_consumed=self.state.tokens,
        )
        self.engine.train()
        try:
            if self._validation_due() and not self._validate():  # cut short by the signal that ended the last start
                return self._preempt()
            batches = iter(loader)
            while self.state.tokens < self.plan.total_tokens:
                began = time.monotonic()
                watchdog.at("reading data", self.state.step + 1)
                batch = next(batches)
                waited = time.monotonic() - began
                watchdog.at("training")
                # The one collective of the control plane in a step: targets to divide by, and whether anybody must
                # stop.
                targets, stopping = self.world.sum([float((batch.labels != IGNORE).sum()), float(self.stop())])
                if stopping:
                    return self._preempt()
                self._train_step(batch, targets, began, waited)
                if self.state.bad_in_row >= self.config.max_bad_steps:
                    return EXIT_BAD_STEPS
                if self._validation_due() and not self._validate():
                    return self._preempt()
                if self._checkpoint_due(batch):
                    self.save()
            self.save()
            self._event("done")
            return EXIT_DONE
        finally:
            loader.close()

    def _train_step(self, batch: Batch, targets: float, began: float, waited: float) -> None:
        stage = self.plan.stages[batch.stage]
        if batch.tokens_before == stage.start_tokens:
            # Belongs to the step to come, so that a resume from this edge cuts it off and writes it once.
            self._event("stage", step=self.state.step + 1, stage=batch.stage, seq_len=batch.seq_len)
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

        step = self.state.step + 1
        last = tokens >= self.plan.total_tokens
        loss = math.nan
        if not result.applied or last or step % self.config.telemetry.log_every_steps == 0:
            loss = self.world.sum([float(loss_sum)])[0] / max(targets, 1.0)
        bad = not result.applied and not self._is_scale_search(loss, result)
        self.state = dataclasses.replace(
            self.state,
            step=step,
            tokens=tokens,
            bad_steps=self.state.bad_steps + bad,
            bad_in_row=self.state.bad_in_row + 1 if bad else 0,
            seconds=time.monotonic() - self._started,
        )
        self._window.add(batch.tokens, time.monotonic() - began, waited)
        self.telemetry.advance(tokens)
        if bad:
            self._report_bad_step(batch, loss, float(loss_sum))
        elif not math.isnan(loss):
            self._log(batch, loss, lr, result)

    def _is_scale_search(self, loss: float, result: StepResult) -> bool:
        """Whether fp16's dynamic loss scale merely overflowed on its way down: the loss is fine and there is room."""
        return self.config.precision == "fp16" and math.isfinite(loss) and result.loss_scale > 1.0

    def _log(self, batch: Batch, loss: float, lr: float, result: StepResult) -> None:
        tokens_per_second, data_wait = self._window.take()
        forward = self.engine.model.flops_per_token(batch.seq_len)
        values = {
            "step": self.state.step,
            "tokens": self.state.tokens,
            "loss": loss,
            "perplexity": perplexity(loss),
            "lr": lr,
            "grad_norm": result.grad_norm,
            "tokens_per_second": tokens_per_second,
            "mfu": model_flops_utilization(tokens_per_second, forward, self.world.world_size, self._peak_flops),
            "data_wait": data_wait,
            "memory_gib": memory_gib(self.world.device),
            "stage": batch.stage,
            "seq_len": batch.seq_len,
            "seconds": self.state.seconds,
            **self._epochs(),
        }
        self.telemetry.write("train", **values)
        self.telemetry.progress(self.state.tokens, values)

    def _epochs(self) -> dict[str, float]:
        """How often each source was gone through so far: ``epoch``, or ``epoch/NAME`` for several."""
        epochs = self.inputs.train.epochs(self.state.tokens // self.plan.block_length)
        return {"epoch" if len(epochs) == 1 else f"epoch/{name}": value for name, value in epochs.items()}

    def _report_bad_step(self, batch: Batch, loss: float, own_loss_sum: float) -> None:
        rows = self.world.gather((math.isfinite(own_loss_sum), batch.sample_ids.tolist()))
        # The rows of the processes whose own loss went wrong; if it was the gradient alone, all are suspect.
        suspects = [ids for finite, ids in rows if not finite] or [ids for _, ids in rows]
        samples = [sample for ids in suspects for sample in ids]
        what = "gradient" if math.isfinite(loss) else "loss"
        self._event("bad_step", what=what, samples=samples, bad_in_row=self.state.bad_in_row)
        shown = ", ".join(map(str, samples[:SAMPLE_IDS_SHOWN])) + (", ..." if len(samples) > SAMPLE_IDS_SHOWN else "")
        self.telemetry.say(
            f"step {self.state.step}: the {what} is not finite; step skipped on all processes ({self.state.bad_in_row} "
            f"of at most {self.config.max_bad_steps} in a row). Samples: {shown}"
        )
        if self.state.bad_in_row >= self.config.max_bad_steps:
            self.telemetry.say(
                f"stopped: {self.state.bad_in_row} such steps in a row. Lower optimizer.lr, or look at those samples; "
                "the last checkpoint is from before if checkpoint.every_tokens is set."
            )

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
        took = time.monotonic() - began
        self.telemetry.write("valid", step=state.step, tokens=state.tokens, stage=index, took=took, **result)
        accuracy = f", masked accuracy {result['accuracy']:.1%}" if "accuracy" in result else ""
        self.telemetry.say(
            f"step {state.step}, {state.tokens:,} tokens: held-out loss {result['loss']:.4f}, perplexity "
            f"{result['perplexity']:.2f}{accuracy} (length {stage.seq_len}, {result['targets']:,} targets, "
            f"{took:.1f} s)"
        )
        if self.config.model.objective == "clm" and self.config.validation.samples:
            watchdog.at("writing samples")
            texts = write_samples(
                self.engine, self.inputs.valid, self.config, self.world, self.config.run_dir / "samples", state.step
            )
            for text in texts[:1]:
                self.telemetry.say(f"  it writes: {' '.join(text.split())}")
        self.state = dataclasses.replace(state, validated_tokens=state.tokens)
        return True

    def _checkpoint_due(self, batch: Batch) -> bool:
        every = self.config.checkpoint.every_tokens
        return every is not None and self.state.tokens // every > batch.tokens_before // every

    def save(self) -> None:
        """Commit a checkpoint of this step, unless there is one."""
        if self._saved_step == self.state.step:
            return
        began = time.monotonic()
        watchdog.at("saving a checkpoint", self.state.step)
        self.state = dataclasses.replace(self.state, seconds=began - self._started)
        self.checkpoints.save(self.engine, self.state, self.identity)
        self._saved_step = self.state.step
        self._event("checkpoint", took=time.monotonic() - began)

    def _preempt(self) -> int:
        self.save()
        self._event("preempted")
        self.telemetry.say(f"stopped at step {self.state.step} with a checkpoint; the same command goes on from there")
        return EXIT_PREEMPTED

    def _event(self, name: str, **values: Any) -> None:
        where = {"step": self.state.step, "tokens": self.state.tokens, "seconds": self.state.seconds}
        self.telemetry.write("event", event=name, **{**where, **values})


class _Window:
    """Tokens and time since the last logged step; validation and saving do not count."""

    def __init__(self) -> None:
        self._tokens, self._seconds, self._waited = 0, 0.0, 0.0

    def add(self, tokens: int, seconds: float, waited: float) -> None:
        self._tokens += tokens
        self._seconds += seconds
        self._waited += waited

    def take(self) -> tuple[float, float]:
        """(tokens per second, share of the time spent waiting for data), and start anew."""
        seconds = max(self._seconds, 1e-9)
        result = self._tokens / seconds, self._waited / seconds
        self._tokens, self._seconds, self._waited = 0, 0.0, 0.0
        return result
