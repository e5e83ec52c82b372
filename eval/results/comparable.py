"""Whether two results may be compared: the one rule, of ``nystrom eval compare`` and of the report."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import combinations

from eval.results.schema import Result
from eval.task import described

PER_TOKEN = {"tokens", "tokens_clean", "targets"}
"""Denominators that count tokens: of another tokenizer, something else. Bytes, words and texts are the same for all."""

PLACES = ("path", "test", "text", "dataset")
"""Facts about the data that say where it lies."""


@dataclass(frozen=True)
class Obstacle:
    """Why two results cannot be compared: the condition in which they differ, and a sentence that says how."""

    condition: str
    text: str


def obstacles(a: Result, b: Result, ignore: Collection[str] = ()) -> list[Obstacle]:
    """All conditions in which two results differ and must not, the gravest first; none if they can be compared.

    Paths may differ where the content is the same, and so may the settings ``ignore``.
    """
    found: list[Obstacle] = []
    if a.task != b.task:
        found.append(Obstacle("task", f"other tasks: {a.task} and {b.task}"))
    if a.version != b.version:
        text = f"computed by versions {a.version} and {b.version} of the task: evaluate the older one again"
        found.append(Obstacle("version of the task", text))
    forced = [side for side, result in (("A", a), ("B", b)) if result.gate == "forced"]
    if forced:
        text = f"the validity gate failed for {' and '.join(forced)} and was forced: the numbers are not what they say"
        found.append(Obstacle("validity gate", text))
    if a.model.objective != b.model.objective and not described(a.task).any_objective:
        text = f"other objectives, {a.model.objective} and {b.model.objective}: the figures do not mean the same"
        found.append(Obstacle("objective", text))
    if a.data["hash"] != b.data["hash"]:
        found.append(Obstacle("data", f"other data: {_apart(a, b)}"))
    free = {*ignore, *immaterial(a.task)}
    return found + [
        Obstacle(f"setting {key}", f"{key} {a.settings.get(key)!r} and {b.settings.get(key)!r}")
        for key in sorted(set(a.settings) | set(b.settings))
        if a.settings.get(key) != b.settings.get(key) and key not in free and not _is_place(key, a, b)
    ]


def obstacle(a: Result, b: Result, ignore: Collection[str] = ()) -> str:
    """The gravest obstacle as a sentence (of settings: all that differ), "" where two results can be compared."""
    found = obstacles(a, b, ignore)
    if not found:
        return ""
    if not found[0].condition.startswith("setting "):
        return found[0].text
    return f"other settings: {'; '.join(item.text for item in found)} (--ignore SETTING if that is meant)"


def unequal(results: Sequence[Result]) -> list[str]:
    """The conditions in which any two of the results differ; none if all can be compared."""
    return list(dict.fromkeys(item.condition for a, b in combinations(results, 2) for item in obstacles(a, b)))


def immaterial(task: str) -> frozenset[str]:
    """Settings of a task in which two results may differ and be compared all the same.

    The precision changes how a score is computed and not what it is, but for timings.
    """
    about = described(task)
    return about.immaterial if about.timings else about.immaterial | {"precision"}


def same_unit(metric: str, results: Sequence[Result]) -> bool:
    """Whether a metric counts the same things in all results: not where it is by token and the tokenizers differ."""
    tokenizers = {result.model.tokenizer_hash for result in results} - {""}
    if len(tokenizers) < 2 or described(results[0].task).any_objective:
        return True
    estimators = [result.estimators.get(metric) for result in results]
    return all(found is not None and found.denominator not in PER_TOKEN for found in estimators)


def _is_place(key: str, a: Result, b: Result) -> bool:
    """Whether a setting says where the data lies: what was read is in the hash of the data."""
    return key in a.settings and a.settings[key] == a.data.get(key) and b.settings.get(key) == b.data.get(key)


def _apart(a: Result, b: Result) -> str:
    """How the data of two results differ: where it lies, else what else is known of it, else by its hashes."""
    first, second = _where(a), _where(b)
    shards = a.data.get("held_out")
    if first and second and first != second and (shards is None or shards != b.data.get("held_out")):
        return f"{first} and {second}"
    names = [key for key in sorted({*a.data, *b.data} - {"hash", *PLACES}) if a.data.get(key) != b.data.get(key)]
    hashed = {key.removesuffix("_hash") for key in names if key.endswith("_hash")}
    parts = [f"the content of the {key.replace('_', ' ')} differs" for key in sorted(hashed)]
    parts += [
        f"{key.replace('_', ' ')} {a.data.get(key)} and {b.data.get(key)}"
        for key in names
        if not key.endswith("_hash") and _is_short(a.data.get(key)) and _is_short(b.data.get(key))
    ]
    hashes = " and ".join(f"hash {result.data['hash'][:12]}" for result in (a, b))
    return (f"{first} in both, but " if first == second != "" else "") + ("; ".join(parts) or hashes)


def _is_short(value: object) -> bool:
    """Whether a fact about the data can be told in a line: a number, a name, not a hash."""
    return value is None or len(str(value)) <= 24


def _where(result: Result) -> str:
    found = next((result.data[name] for name in PLACES if result.data.get(name)), None)
    return " ".join(found) if isinstance(found, list) else str(found or "")
