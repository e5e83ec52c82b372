"""The search: learning rates and batch sizes tried on records held out of the training text, never on the test text.

Each network, the pretrained one and the one from scratch, gets the same trials on the same records. Where there are
more than ``search_keep`` of them, all are first trained for a third of the steps, with a schedule of that length, and
the best ``search_keep`` again to the end: one round of successive halving (Jamieson and Talwalkar 2016). Figures that
are at most a standard error below the highest count as equal (Breiman et al. 1984, section 3.4.3); of these the lowest
loss wins. On 167 of 500 film reviews 1e-3 had an accuracy of 0.862 and 1e-4 of 0.838, with losses of 0.407 and 0.364;
1e-3 then overfitted.

What a trial is judged on: the one held-out split of seed 0 where that has 150 records or more. Fewer say too little,
so the records are then cut into 3 folds, by class, and as many of them are judged as make 150 records. From 450 records
on that is one fold, and below 300 all three, so that every record counts once. Each is predicted by a network that was
trained on the other two. The place of the curve is chosen by the mean over the folds.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.results.parts import Job, Parts
from eval.results.schema import Table
from eval.shared.progress import Progress, about
from eval.tasks.classification import MODEL_ROW, SCRATCH_ROW, FineTuneSettings
from eval.tasks.classification.finetune import fit
from eval.tasks.classification.recipe import Recipe

if TYPE_CHECKING:
    from eval.tasks.classification.jobs import Fits

TABLE = "search"
FEWEST = 150
"""Held-out records from which one split is enough: the standard error of an accuracy of 0.75 is then 0.035."""
FOLDS = 3
FEWEST_STEPS = 2
"""Of an epoch, for a batch size to be tried."""
FIRST_SHARE = 1 / 3
RATES = (0.02, 0.06, 0.2)
"""Times 1 / width: 1e-4, 3.1e-4 and 1e-3 at 192, 2.6e-5, 7.8e-5 and 2.6e-4 at 768."""


@dataclass(frozen=True)
class Trial:
    """A setting that is tried."""

    lr: float
    batch_size: int

    @property
    def name(self) -> str:
        """For messages and names of parts."""
        return f"lr {self.lr:g}, batch {self.batch_size}"

    def applied(self, recipe: Recipe) -> Recipe:
        """``recipe`` with this setting."""
        return replace(recipe, lr=self.lr, batch_size=self.batch_size)


@dataclass(frozen=True)
class Judged:
    """What a trial of a row reached after ``share`` of the steps.

    ``figure`` and ``loss`` are of the held-out records, ``texts`` the training texts that it cost, forward and
    backward.
    """

    row: str
    trial: Trial
    share: float
    figure: float
    loss: float
    epoch: float
    texts: int
    seconds: float


@dataclass(frozen=True)
class Found:
    """All trials of the rows on ``records`` training records, and what was chosen for each row.

    ``judged_on``: held-out records, in ``folds`` parts.
    """

    records: int
    trials: list[Judged]
    chosen: dict[str, Judged]
    judged_on: int
    folds: int


def grid(settings: FineTuneSettings, hidden_size: int, texts: int) -> list[Trial]:
    """The settings to try. Batches with fewer than two steps in an epoch are left out, but never all."""
    rates = settings.search_lrs or tuple(float(f"{rate / hidden_size:.2g}") for rate in RATES)
    sizes = [size for size in settings.search_batches if FEWEST_STEPS * size <= texts] or [min(settings.search_batches)]
    return [Trial(*pair) for pair in product(sorted(set(rates)), sorted(set(sizes)))]


def search(fits: Sequence[Fits], parts: Parts) -> list[Found]:
    """Search for each of several sets of training records, all trials of a round divided over the processes."""
    settings = fits[0].settings
    rows = (MODEL_ROW, SCRATCH_ROW) if fits[0].scratch_seeds else (MODEL_ROW,)
    asked = []
    for number, one in enumerate(fits):
        trials = grid(settings, one.hidden_size, len(one.data.train))
        asked += [(number, row, trial) for row in rows for trial in trials]
    done: list[tuple[int, Judged]] = []
    if len(asked) > settings.search_keep * len(fits) * len(rows):
        done = _round(fits, asked, FIRST_SHARE, parts)
        asked = []
        for number, row in product(range(len(fits)), rows):
            mine = [judged for n, judged in done if n == number and judged.row == row]
            asked += [(number, row, judged.trial) for judged in _best(mine, fits[number])[: settings.search_keep]]
    last = _round(fits, asked, 1.0, parts)
    found = []
    for number, one in enumerate(fits):
        _, folds = one.folds()
        chosen = {row: _best([j for n, j in last if n == number and j.row == row], one)[0] for row in rows}
        trials_of = [judged for n, judged in [*done, *last] if n == number]
        found.append(Found(len(one.data.train), trials_of, chosen, sum(len(dev) for _, dev in folds), len(folds)))
    return found


def _best(judged: Sequence[Judged], fits: Fits) -> list[Judged]:
    """Best first; of equal ones in the order of the grid."""
    return [judged[place] for place in best_first([(j.figure, j.loss) for j in judged], fits)]


def best_first(found: Sequence[tuple[float, float]], fits: Fits) -> list[int]:
    """The places of (figure, loss) in ``found``, judged on what ``fits`` holds out.

    Those at most a standard error below the highest figure come first, by loss, then the others by figure. A loss that
    is not a number is the highest.
    """
    highest = max(figure for figure, _ in found)
    enough = highest - fits.goal.error(highest, sum(len(dev) for _, dev in fits.folds()[1]))
    losses = [loss if np.isfinite(loss) else np.inf for _, loss in found]
    near = sorted((at for at, (figure, _) in enumerate(found) if figure >= enough), key=lambda at: losses[at])
    far = [at for at, (figure, _) in enumerate(found) if figure < enough]
    return near + sorted(far, key=lambda at: (-found[at][0], losses[at]))


def _round(
    fits: Sequence[Fits], asked: Sequence[tuple[int, str, Trial]], share: float, parts: Parts
) -> list[tuple[int, Judged]]:
    jobs: list[Job] = [
        (_name(fits[number], row, trial, share), partial(_try, fits[number], row, trial, share))
        for number, row, trial in asked
    ]
    mine = parts.share(jobs)
    for one in fits:
        one.share = mine
    values = parts.map(jobs)
    return [
        (number, Judged(row, trial, share, **value)) for (number, row, trial), value in zip(asked, values, strict=True)
    ]


def _name(fits: Fits, row: str, trial: Trial, share: float) -> str:
    much = "" if share == 1 else ", a third of the steps"
    return f"search on {len(fits.data.train)} records, {row}, {trial.name}{much}"


def _try(fits: Fits, row: str, trial: Trial, share: float) -> dict[str, Any]:
    """Train with the setting, on each fold anew, and say what is reached on what is held out."""
    began = time.monotonic()
    examples, folds = fits.folds()
    recipe = replace(trial.applied(fits.recipe_of(row)), share=share)
    if len(folds) > 1:
        recipe = replace(recipe, patience=None)  # places of the folds' curves are to be the same
    name = _name(fits, row, trial, share)
    total = sum(recipe.texts(len(train)) for train, _ in folds)
    curves = []
    with Progress(total, name, "text") as progress:
        for train, dev in folds:
            how: dict[str, Any] = {"device": fits.subject.device, "precision": fits.settings.precision}
            fitted = fit(
                fits.fresh(row, 0),
                examples,
                train,
                dev,
                recipe,
                seed=0,
                goal=fits.goal,
                on_batch=progress.update,
                **how,
            )
            curves.append(fitted.curve)
        sizes = [len(dev) for _, dev in folds]
        means = [
            # Rounded: float32 means of equal shares differ in their last digits, and equal ones are told by the loss.
            (round(_mean([p.figure for p in place], sizes), 6), _mean([p.loss for p in place], sizes), place[0].epoch)
            for place in zip(*curves, strict=False)
        ]
        figure, loss, epoch = means[best_first([mean[:2] for mean in means], fits)[0]]
        after = len(fits.share) - fits.share.index(name) - 1 if name in fits.share else 0
        more = f"; {after} more, {about(after * progress.whole())}" if after else ""
        progress.say(f"{fits.goal.figure} {figure:.3f}, loss {loss:.3f}{more}")
    seconds = time.monotonic() - began
    return {"figure": figure, "loss": loss, "epoch": epoch, "texts": progress.done, "seconds": round(seconds, 1)}


def _mean(values: Sequence[float], sizes: Sequence[int]) -> float:
    """The mean over the records of folds of such sizes."""
    return float(np.average(values, weights=sizes))


def search_table(found: Sequence[Found], figure: str) -> Table:
    """Every trial, what it reached and what it cost; ``figure``: the name of what trials are judged by."""
    rows: list[list[Any]] = []
    for one in found:
        for judged in one.trials:
            rows.append([
                judged.row, one.records, judged.trial.lr, judged.trial.batch_size,
                "all" if judged.share == 1 else "a third", judged.epoch, judged.figure, judged.loss, judged.texts,
                judged.seconds, "chosen" if one.chosen[judged.row] is judged else "",
            ])  # fmt: skip
    columns = [
        "predictor", "records", "learning rate", "batch size", "steps", "epoch", f"dev {figure}", "dev loss",
        "texts trained", "seconds", "",
    ]  # fmt: skip
    judged_by = "; ".join(
        f"with {one.records:,} records on {one.judged_on:,} of them"
        + (f", in {one.folds} folds" if one.folds > 1 else ", held out of training")
        for one in found
    )
    everything = [judged for one in found for judged in one.trials]
    cost = f"{sum(j.texts for j in everything):,} texts, {sum(j.seconds for j in everything):,.0f} s in all"
    note = f"Judged {judged_by}; never on the test text. {len(everything)} trials, {cost}."
    return Table(TABLE, columns, rows, note)


def said_of(found: Found) -> str:
    """What was chosen, as a sentence."""
    chosen = "; ".join(f"{row}, {judged.trial.name}" for row, judged in found.chosen.items())
    return f"Chosen by the search on {found.records:,} records: {chosen}."
