"""An evaluation task in one file: how often the right next token is among the few that a model finds likeliest."""

from __future__ import annotations

from functools import partial
from typing import Any

from pydantic import Field

from data_pipeline.errors import UserError
from eval.results.parts import Parts
from eval.results.schema import Estimator, Metric, Outcome
from eval.task import Row, Settings, Task, register


class GuessesSettings(Settings):
    """How many guesses, and on how much text."""

    guesses: int = Field(5, ge=1, description="likeliest tokens among which the right one is looked for")
    windows: int = Field(16, ge=2, description="windows of held-out text, spread evenly")
    length: int | None = Field(None, ge=2, description="window in tokens; left out: the longest length of the run")


@register
class Guesses(Task):
    """Top-k accuracy of a causal model on its held-out shards."""

    name = "guesses"
    summary = "how often the right next token is among the few that the model finds likeliest"
    settings = GuessesSettings
    version = 1
    heading, lead = "Guesses", "How often the right next token is among the likeliest ones."
    rows = (Row("hit_rate", "Next token among the likeliest"),)

    def resolve(self, subject: Any, settings: GuessesSettings) -> GuessesSettings:
        """The length filled in, and what does not fit refused."""
        if not subject.causal:
            raise UserError("guesses is for causal models: a masked one predicts no next token")
        length = subject.check_length(settings.length or subject.trained_length, "--length")
        return settings.model_copy(update={"length": length})

    def data(self, subject: Any, settings: GuessesSettings) -> dict[str, Any]:
        """The held-out shards: their hash is in the result's key."""
        shards = subject.held_out()
        return {"path": str(shards.path), "tokens": shards.num_tokens, "hash": shards.fingerprint}

    def run(self, subject: Any, settings: GuessesSettings, parts: Parts) -> Outcome:
        """A part and a record for each window; the interval is over the records."""
        import numpy as np

        from eval.results.statistics import bootstrap

        assert settings.length
        last = subject.held_out().num_tokens - settings.length - 1
        starts = np.unique(np.linspace(0, last, settings.windows).astype(np.int64)).tolist()
        jobs = [(f"window at {start}", partial(window, subject, settings, start)) for start in starts]
        records = parts.map(jobs)
        estimator = Estimator("hits", "tokens")
        found = bootstrap(records, estimator)
        metric = Metric(found.value, True, n=found.n, low=found.low, high=found.high)
        return Outcome({"hit_rate": metric}, records=records, estimators={"hit_rate": estimator})


def window(subject: Any, settings: GuessesSettings, start: int) -> dict[str, Any]:
    """The record of one window. ``id`` is what two models' records are paired by."""
    import numpy as np
    import torch

    tokens = torch.from_numpy(subject.held_out().read(np.array([start]), settings.length + 1).astype(np.int64))
    likeliest = subject.logits(tokens[:, :-1]).topk(settings.guesses, dim=-1).indices.cpu()
    hits = (likeliest == tokens[:, 1:, None]).any(-1)
    return {"id": f"window {start}", "hits": int(hits.sum()), "tokens": hits.numel()}
