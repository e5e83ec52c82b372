"""What is told about each training step: its numbers, a loss out of line, a step whose numbers are not finite."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from data_pipeline.batches.loader import Batch
from pretrain.checkpoint.commit import TrainState
from pretrain.distributed.world import World, peak_memory_gib
from pretrain.engine.training import StepResult, TrainingEngine
from pretrain.machine import peak_flops
from pretrain.sources import Inputs
from pretrain.telemetry.bad_batches import BAD_STEPS, SPIKES, SavedBatch, save_batch
from pretrain.telemetry.spikes import SpikeDetector
from pretrain.telemetry.telemetry import Telemetry

if TYPE_CHECKING:
    from pathlib import Path

SAMPLE_IDS_SHOWN = 8


class Event(Protocol):
    """Writes an event; ``values`` override the position in the run that it belongs to."""

    def __call__(self, name: str, **values: Any) -> None: ...


@dataclass(frozen=True)
class StepRecord:
    """An optimizer step that was taken, or skipped, as one process knows it."""

    number: int
    tokens: int  # of the run, this step's included
    batch: Batch
    targets: float  # of the global batch
    lr: float
    loss_sum: torch.Tensor  # over this process's targets
    result: StepResult
    added_sums: Mapping[str, torch.Tensor] = field(default_factory=dict)  # over them, of what the run adds to the loss


class Loss(NamedTuple):
    """A loss summed over processes, and the seconds each of them spent on its own in a step since the last report."""

    mean: float
    own_seconds: list[float]  # by rank
    added: Mapping[str, float] = MappingProxyType({})  # means of what the run adds to the loss, by its key


class StepReports:
    """Tells a run's story step by step.

    The loss of every step is watched, but summed over processes at once only in steps that are logged or went wrong.
    That of the others goes along with the one sum that the next step makes anyway: :attr:`unsummed` is this process's
    part, :meth:`settle` takes the sum. All processes watch alike, so that they save their rows of a spike together.
    """

    def __init__(
        self,
        inputs: Inputs,
        engine: TrainingEngine,
        world: World,
        telemetry: Telemetry,
        event: Event,
        losses: Iterable[float],
        suspect_in_row: int = 0,
    ) -> None:
        """``losses``, ``suspect_in_row``: what the state of a checkpoint remembers; see :attr:`losses`."""
        self._inputs, self._config, self._model = inputs, inputs.config, engine.model
        self._world, self._telemetry, self._event = world, telemetry, event
        self._detector = SpikeDetector(self._config.telemetry.spike_window, losses)
        self._unsettled: StepRecord | None = None
        self.suspect_in_row = suspect_in_row
        """Last steps that were skipped because a number was not finite, or whose loss was out of its band."""
        self.good_step = 0
        """The last step of this start that went well: what came before it is sound."""
        self.last_loss = math.nan
        """The newest loss known: of the last step if that was logged, else of the one before."""
        self.clock = StepClock(world.device)
        self.clock.watch(engine.on_forward)
        gpu = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else None
        self._peak_flops = peak_flops(self._config.telemetry, gpu)

    @property
    def losses(self) -> tuple[float, ...]:
        """What a resumed run needs to judge its first losses as this one would have."""
        return self._detector.losses

    @property
    def unsummed(self) -> float:
        """This process's loss sum of the step before, if that was not summed over processes yet, else 0."""
        return 0.0 if self._unsettled is None else float(self._unsettled.loss_sum)

    def settle(self, loss_sum: float) -> None:
        """Take the sum of :attr:`unsummed` over all processes."""
        step, self._unsettled = self._unsettled, None
        if step is not None:
            self._watch(step, _mean(step, loss_sum))

    def settle_now(self) -> None:
        """Sum what is left, where no step follows: before a checkpoint. All processes must call it."""
        if self._unsettled is not None:
            self.settle(self._world.sum([self.unsummed])[0])

    def stage(self) -> None:
        """A stage of the curriculum begins: its losses are not to be compared with those before."""
        self._detector.clear()

    def loss(self, step: StepRecord, last: bool) -> Loss | None:
        """The loss of a step that is to be logged or went wrong, or None: then the next step will bring it."""
        if step.result.applied and not last and step.number % self._config.telemetry.log_every_steps:
            self._unsettled = step
            return None
        # Everybody's seconds ride along: a vector with one place for each process costs less than a second collective.
        own = [0.0] * self._world.world_size
        own[self._world.rank] = self.clock.own_seconds()
        added = [float(value) for value in step.added_sums.values()]
        loss_sum, *rest = self._world.sum([float(step.loss_sum), *added, *own])
        means = {name: _mean(step, value) for name, value in zip(step.added_sums, rest, strict=False)}
        return Loss(_mean(step, loss_sum), rest[len(added) :], means)

    def log(self, step: StepRecord, loss: Loss, state: TrainState) -> None:
        """Write the numbers of a step; under fp16 also of one skipped only to find the loss scale."""
        self._watch(step, loss.mean)
        rates, own = self.clock.take(), loss.own_seconds
        forward = self._model.flops_per_token(step.batch.seq_len)
        devices = self._world.world_size
        values = {
            "step": step.number,
            "tokens": step.tokens,
            "loss": loss.mean,
            "perplexity": perplexity(loss.mean),
            "lr": step.lr,
            "grad_norm": step.result.grad_norm,
            "tokens_per_second": rates.tokens_per_second,
            "mfu": model_flops_utilization(rates.tokens_per_second, forward, devices, self._peak_flops),
            "data_wait": rates.data_wait,
            "step_seconds": rates.step_seconds,
            "own_seconds_min": min(own),
            "own_seconds_mean": sum(own) / len(own),
            "own_seconds_max": max(own),
            "slowest_rank": own.index(max(own)),
            "memory_gib": peak_memory_gib(self._world.device),
            "stage": step.batch.stage,
            "seq_len": step.batch.seq_len,
            "bad_steps": state.bad_steps,
            "seconds": state.seconds,
            **self._epochs(step.tokens),
        }
        values |= {name: mean * getattr(self._config, name) for name, mean in loss.added.items()}
        if self._config.precision == "fp16":
            values["loss_scale"] = step.result.loss_scale
        self._telemetry.write("train", **values)
        self._telemetry.set_speed(rates.tokens_per_second)

    def bad_step(self, step: StepRecord, loss: Loss, state: TrainState) -> None:
        """Save and name the rows of a step that was skipped because its loss or gradient is not finite.

        Suspect are the rows of the processes whose own loss went wrong; if it was the gradient alone, all.
        """
        what = "gradient" if math.isfinite(loss.mean) else "loss"
        self.suspect_in_row += 1
        saved = self._save(BAD_STEPS, step, what, loss.mean, not math.isfinite(float(step.loss_sum)))
        samples, most = saved.samples, self._config.max_bad_steps
        self._event("bad_step", what=what, samples=samples, bad_in_row=state.bad_in_row, **_saved(saved))
        shown = ", ".join(map(str, samples[:SAMPLE_IDS_SHOWN])) + (", ..." if len(samples) > SAMPLE_IDS_SHOWN else "")
        self._telemetry.say(
            f"step {step.number}: the {what} is not finite; step skipped on all processes ({state.bad_in_row} "
            f"of at most {most} in a row). Samples: {shown}. {_look(saved)}"
        )
        if state.bad_in_row >= most:
            self._telemetry.say(
                f"stopped: {state.bad_in_row} such steps in a row. Lower optimizer.lr, or look at those samples."
            )

    def _watch(self, step: StepRecord, loss: float) -> None:
        if not step.targets:
            self._event("no_targets", step=step.number, tokens=step.tokens)
            self._telemetry.say(
                f"step {step.number}: no token of its batch is a target, so it has no loss; only weight decay and "
                "momentum moved the weights. Larger batches or a higher masking rate avoid that."
            )
            return
        self.last_loss = loss
        spike = self._detector.add(loss) if math.isfinite(loss) else None
        if not math.isfinite(loss) or self._detector.stands_out:
            self.suspect_in_row += 1
        else:
            self.suspect_in_row, self.good_step = 0, step.number
        if spike is None:
            return
        saved = self._save(SPIKES, step, "spike", loss, False)
        values = {"loss": loss, "expected": spike.expected, "limit": spike.limit, **_saved(saved)}
        self._event("spike", step=step.number, tokens=step.tokens, **values)
        self._telemetry.say(
            f"step {step.number}: the loss jumped to {loss:.4f}; {spike.expected:.4f} was usual, up to "
            f"{spike.limit:.4f} would have been. {_look(saved)}"
        )

    def _save(self, kind: str, step: StepRecord, what: str, loss: float, suspect: bool) -> SavedBatch:
        facts = {
            "step": step.number,
            "what": what,
            "loss": loss if math.isfinite(loss) else str(loss),
            "targets": int(step.targets),
            "tokens": step.tokens,
            "tokens_before": step.batch.tokens_before,
            "stage": step.batch.stage,
            "seq_len": step.batch.seq_len,
            "lr": step.lr,
            "loss_scale": step.result.loss_scale,
            "precision": self._config.precision,
        }
        return save_batch(self._config.run_dir / kind, self._world, step.batch, suspect, facts)

    def _epochs(self, tokens: int) -> dict[str, float]:
        """How often each source was gone through so far: ``epoch``, or ``epoch/NAME`` for several."""
        epochs = self._inputs.train.epochs(tokens // self._inputs.plan.block_length)
        return {"epoch" if len(epochs) == 1 else f"epoch/{name}": value for name, value in epochs.items()}


def _mean(step: StepRecord, loss_sum: float) -> float:
    """The loss over the step's targets; NaN, which is null in JSON, if it has none: 0 would look like a perfect one."""
    return loss_sum / step.targets if step.targets else math.nan


def _saved(saved: SavedBatch) -> dict[str, Any]:
    folder: Path | None = saved.folder
    return {"saved": None if folder is None else f"{folder.parent.name}/{folder.name}"}


def _look(saved: SavedBatch) -> str:
    if saved.folder is None:
        return f"Its rows could not be saved: {saved.problem}"
    return f"Look at its rows: nystrom replay {saved.folder}"


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def model_flops_utilization(
    tokens_per_second: float, forward_flops: float, devices: int, peak: float | None
) -> float | None:
    """MFU (Chowdhery et al. 2022, appendix B): tokens/s x 3 x forward FLOPs per token / (devices x peak).

    The backward pass counts twice the forward; recomputation does not count. None without a known peak.
    """
    return None if peak is None else tokens_per_second * 3.0 * forward_flops / (devices * peak)


class Rates(NamedTuple):
    """Of the steps since the last logged one, on this process."""

    tokens_per_second: float  # of all processes
    data_wait: float  # share of the time
    step_seconds: float  # mean of a step


class StepClock:
    """Adds up the steps since the last logged one; validation and saving do not count.

    Every step ends with all processes, for they wait for each other's gradients: by the clock on the wall a slow
    process cannot be told from those that wait for it. So each also adds up what it does before it meets the others:
    waiting for data, and the forward passes (on a GPU between two events, which costs no waiting). That is
    :meth:`own_seconds`. Under ZeRO-3 the layers of a forward pass gather their weights from all processes and so wait
    for the slowest too: there only slow data is told apart.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[Any] = []
        self._start()

    def watch(self, on_forward: Callable[[Callable[[], None], Callable[[], None]], None]) -> None:
        """Have the engine call when a forward pass begins and when it has ended."""
        on_forward(self._mark, self._mark)

    def add(self, tokens: int, began: float, waited: float) -> None:
        """Count a step of the global batch that began at this ``time.monotonic()`` and waited so long for data."""
        self._steps += 1
        self._tokens += tokens
        self._seconds += time.monotonic() - began
        self._waited += waited

    def own_seconds(self) -> float:
        """Mean seconds a step that this process spent before it met the others."""
        pairs = list(zip(self._marks[::2], self._marks[1::2], strict=True))
        if self._on_gpu:
            if pairs:
                pairs[-1][1].synchronize()
            forward = sum(begin.elapsed_time(end) for begin, end in pairs) / 1000
        else:
            forward = sum(end - begin for begin, end in pairs)
        return (self._waited + forward) / max(1, self._steps)

    def take(self) -> Rates:
        """The rates of the steps counted, and start anew."""
        seconds = max(self._seconds, 1e-9)
        rates = Rates(self._tokens / seconds, self._waited / seconds, self._seconds / max(1, self._steps))
        self._start()
        return rates

    def _start(self) -> None:
        self._steps, self._tokens, self._seconds, self._waited = 0, 0, 0.0, 0.0
        self._marks.clear()

    def _mark(self) -> None:
        if not self._on_gpu:
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)
