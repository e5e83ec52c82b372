"""Published numbers and settings of Long Range Arena.

Accuracies: Xiong et al. 2021 (arXiv 2102.03902), the table of individual LRA tasks, also in the README of
mlpen/Nystromformer (img/LRA.png). Settings: LRA/code/lra_config.py and run_tasks.py there.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """A dataset as published, its training, and the accuracies by model.

    ``learned``: examples of train and dev together; ``dev``: those of dev, where the files have one of their own.
    """

    classes: int
    learned: int
    dev: int | None
    test: int
    max_length: int
    steps: int
    warmup: int
    validate_every: int
    batch_size: int
    accuracy: dict[str, float]


SOURCE = "Xiong et al. 2021, arXiv 2102.03902"
_MODELS = ("softmax", "Nyströmformer", "Linformer", "Reformer", "Performer")


def _row(*accuracies: float) -> dict[str, float]:
    return dict(zip(_MODELS, (round(value / 100, 4) for value in accuracies), strict=True))


PUBLISHED = {
    "listops": Published(10, 98_000, 2000, 2000, 2000, 5000, 1000, 50, 32, _row(37.10, 37.15, 37.25, 19.05, 18.80)),
    "text": Published(2, 25_000, None, 25_000, 4000, 20_000, 8000, 500, 32, _row(65.02, 65.52, 55.91, 64.88, 63.81)),
    "retrieval": Published(
        2, 165_176, 18_090, 17_437, 4000, 30_000, 800, 300, 32, _row(79.35, 79.56, 79.37, 78.64, 78.62)
    ),
    "image": Published(10, 50_000, None, 10_000, 1024, 35_000, 175, 175, 256, _row(38.20, 41.58, 37.84, 43.29, 37.07)),
    "pathfinder": Published(
        2, 180_000, None, 20_000, 1024, 62_400, 312, 312, 256, _row(74.16, 70.94, 67.60, 69.36, 69.87)
    ),
}
NETWORK = {
    "hidden_size": 64,
    "layers": 2,
    "heads": 2,
    "ffn_size": 128,
    "hidden_dropout": 0.1,
    "conv_kernel": 35,
    "lr": 1e-4,
    "weight_decay": 0.0,
}
"""What all five share; see :data:`LANDMARKS`."""
LANDMARKS = (32, 64, 128, 256)
"""The repository has all of these, and the paper does not say which are meant."""
DEV_SHARES = {"image": 0.1, "pathfinder": 0.1}
"""Of the datasets whose dev split is carved. That of text is published as its test split."""
_ALWAYS = (
    "no dropout on attention weights or inside the feed-forward",
    "normalised embeddings",
    "GELU in its tanh form",
)
_OF_LENGTHS = ("batches of like lengths", "mean over real tokens, not the padded length")
_OF_PIXELS = ("black pixels not masked",)
DIFFERENCES = {
    "listops": _ALWAYS + _OF_LENGTHS,
    "text": (*_ALWAYS, *_OF_LENGTHS, "weights not chosen on the test split"),
    "retrieval": _ALWAYS + _OF_LENGTHS,
    "image": _ALWAYS + _OF_PIXELS,
    "pathfinder": _ALWAYS + _OF_PIXELS,
}
"""In what the network and its training are never as published."""
PATHFINDER_FOLDER = "curv_contour_length_14"
"""The hard one; how many of its images are no empty files is not known here, so they are not counted."""
LISTOPS = {"min_symbols": 500, "max_symbols": 2000, "max_depth": 10, "max_args": 10}
LISTOPS_SIZES = {"test": 2000, "dev": 2000, "train": 96_000}
