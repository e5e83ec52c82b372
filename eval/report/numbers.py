"""Numbers, names and tokens as the page writes them."""

from __future__ import annotations

import math
import re
from typing import Any

from eval.results.caution import short

# Words of metrics' names that are not written in small letters.
CAPITALS = {
    "tfidf": "TF-IDF",
    "f1": "F1",
    "mcc": "MCC",
    "ece": "ECE",
    "mauve": "MAUVE",
    "bleu": "BLEU",
    "auc": "AUC",
    "ndcg@10": "nDCG@10",
    "mrr@10": "MRR@10",
    "spearman": "Spearman",
    "pearson": "Pearson",
    "gpu": "GPU",
}

# From here on a number is abbreviated: 12,345,678 as 12.3M.
MOST_WHOLE = 1e7


def number(value: Any) -> str:
    """A cell as text: three to four significant digits, large numbers abbreviated, pass or FAIL for truth values."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "pass" if value else "FAIL"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) < MOST_WHOLE else compact(value)
    if not isinstance(value, float):
        return str(value)
    size = abs(value)
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    if size < 1e-4:
        return f"{value:.1e}"
    if size < 0.01:
        return f"{value:.3g}"
    if size < 10:
        return f"{value:.3f}"
    if size < 100:
        return f"{value:.2f}"
    if size < 1000:
        return f"{value:.1f}"
    return f"{value:,.0f}" if size < MOST_WHOLE else compact(value)


def measure(text: Any) -> str:
    """Text with its numbers as :func:`number` writes them: "<= 0.0020589" as "<= 0.00206"."""
    return re.sub(r"-?\d+\.\d+(?:e[-+]?\d+)?|-?\d+e[-+]?\d+", lambda found: number(float(found[0])), str(text))


def cell(value: Any) -> str:
    """A cell of a suite's table: as :func:`number`, with yes and no, and nested values in one line."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(cell, value))
    if isinstance(value, dict):
        return ", ".join(f"{key}: {cell(item)}" for key, item in value.items())
    return number(value)


def plain(value: Any) -> str:
    """A setting, as it would be typed."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "–" if value is None else str(value)


def compact(value: float, _: Any = None) -> str:
    """1500000 as 1.5M; the second argument is what matplotlib gives to a formatter."""
    return short(value)


def percent(value: float, _: Any = None) -> str:
    """0.015 as 1.5%."""
    return f"{100 * value:.3g}%"


def words(name: str) -> str:
    """The name of a metric, task or suite in words: "macro_f1" as "macro F1"."""
    return " ".join(CAPITALS.get(word, word) for word in name.split("_"))


def title(name: str) -> str:
    """:func:`words` with a capital first letter."""
    text = words(name)
    return text[:1].upper() + text[1:]


def visible(text: str) -> str:
    """A token with its white space made visible; the space that begins most words is left out."""
    text = text[1:] if text.startswith(" ") and text.strip() else text
    text = re.sub(" {4,}", lambda run: f"␣×{len(run[0])}", text)
    return text.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣") or "∅"
