"""What the differences between the rows say, in words."""

from __future__ import annotations

from eval.results.schema import Metric

_OTHERS = {
    "gain_over_tfidf": "TF-IDF",
    "gain_over_random": "the same network with random weights",
    "gain_over_scratch": "the same network from scratch",
    "gain_of_centring": "the same vectors as they are",
}
_MODEL = {"gain_of_centring": "the model's centred vectors"}


def verdict(gains: dict[str, Metric], measure: str) -> str:
    """Which is better, as far as the intervals tell; of a gain without an interval nothing."""
    lines = []
    for name, gain in gains.items():
        if gain.low is None or gain.high is None or not gain.low <= gain.high:
            continue
        other, model = _OTHERS[name], _MODEL.get(name, "the model")
        size = f"{gain.value:+.3f} {measure}, 95% interval {gain.low:+.3f} to {gain.high:+.3f}"
        if gain.low <= 0 <= gain.high:
            lines.append(f"{model} and {other} cannot be told apart ({size}).")
            continue
        better, worse = (model, other) if gain.low > 0 else (other, model)
        lines.append(f"{better} {'are' if 'vectors' in better else 'is'} better than {worse} ({size}).")
    return " ".join(line[0].upper() + line[1:] for line in lines)
