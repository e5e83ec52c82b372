"""A trace of a few steps by torch's profiler, on the first process, when ``telemetry.profile_step`` asks for one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pretrain.config import TelemetryConfig

FOLDER = "profile"
OPERATORS_SHOWN = 40


class StepProfiler:
    """Writes, below ``profile/`` of the run, a trace for Perfetto or chrome://tracing and a table of the operators.

    A profiled step takes longer (twice as long is not unusual), and so do the other processes, which wait for it. The
    numbers of the training do not change. A run that is resumed beyond ``profile_step`` has no trace to write.
    """

    def __init__(self, run_dir: Path, config: TelemetryConfig, active: bool) -> None:
        self._folder = run_dir / FOLDER
        self._first = config.profile_step if active else None
        self._steps = config.profile_steps
        self._profiler: Any = None
        self._last = 0

    def begin(self, step: int) -> None:
        """To be called before each step, with its number."""
        if step != self._first:
            return
        from torch.profiler import profile, supported_activities

        self._profiler = profile(activities=supported_activities(), record_shapes=True)
        self._profiler.start()

    def end(self, step: int) -> str | None:
        """To be called after each step; a line that says where the trace is, when it was the last to be traced."""
        self._last = step
        if self._profiler is None or self._first is None or step < self._first + self._steps - 1:
            return None
        return self.close()

    def close(self) -> str | None:
        """Write the trace of a run that ends before all the steps were taken, if there is one open."""
        if self._profiler is None or self._first is None:
            return None
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        if self._last < self._first:  # not even one step was taken
            return None
        name = f"steps{self._first:09d}-{self._last:09d}"
        trace = self._folder / f"{name}.trace.json.gz"
        try:
            self._folder.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(trace))
            (self._folder / f"{name}.txt").write_text(_table(profiler), encoding="utf-8")
        except (OSError, RuntimeError) as error:  # a trace is not worth a run
            return f"the trace of steps {self._first} to {self._last} could not be written: {error}"
        return f"traced steps {self._first} to {self._last}: {trace} (open it in Perfetto), with a table beside it"


def _table(profiler: Any) -> str:
    import torch

    averages = profiler.key_averages()
    by = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    return str(averages.table(sort_by=by, row_limit=OPERATORS_SHOWN)) + "\n"
