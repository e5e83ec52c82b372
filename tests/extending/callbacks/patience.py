"""Ends a run whose held-out loss has stopped falling."""

from __future__ import annotations

from pretrain.callbacks import Callback, StopRun, Validated


class Patience(Callback):
    """``validations``: how many of them in a row may be no better than the best one before."""

    def __init__(self, validations: int) -> None:
        self.validations, self.best, self.waited = validations, float("inf"), 0

    def on_validation(self, event: Validated) -> None:
        """Called on the first process; all processes end at the next step, with a checkpoint."""
        self.waited = 0 if event.loss < self.best else self.waited + 1
        self.best = min(self.best, event.loss)
        if self.waited > self.validations:
            raise StopRun(f"not below {self.best:.3f} for {self.waited} validations")
