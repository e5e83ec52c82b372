"""Samples of several runs, sorted so that what answers the same question stands side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from eval.report.compare import Member
from eval.report.numbers import cell, number, words

# Shown at once; the others are folded, and of more than this the rest is left to the file.
OPEN, MOST = 6, 60
CONTINUATION, FILL_MASK = "continuation", "fill_mask"


@dataclass
class Continued:
    """A prompt with every run's continuations: (member, text, what else is known of it as (name, value)).

    ``excerpt``: whether it is cut out of a text, and so may begin within a sentence or a word.
    """

    prompt: str
    real: str | None
    answers: list[tuple[Member, str, list[tuple[str, str]]]] = field(default_factory=list)
    excerpt: bool = False
    kind: str = CONTINUATION


@dataclass
class Filled:
    """A text with hidden words: its parts, the words, and every run's guesses for each of them."""

    parts: list[str]
    right: list[str]
    answers: list[tuple[Member, list[dict[str, Any]]]] = field(default_factory=list)
    excerpt: bool = False
    kind: str = FILL_MASK

    def hit(self, place: int) -> bool:
        """Whether the only run there is guessed this word at once; nothing is said of several."""
        return len(self.answers) == 1 and self.answers[0][1][place]["rank_in_top_5"] == 1


@dataclass
class Other:
    """A sample of a kind the page knows nothing about. ``choices``: its ``choices``, if it has some: the text, what is
    said of it, and whether it is right."""

    member: Member
    name: str
    items: list[tuple[str, str]]
    choices: list[tuple[str, str, bool]] = field(default_factory=list)
    kind: str = "other"


Sample = Continued | Filled | Other


def samples_of(members: Sequence[Member]) -> list[Sample]:
    """All samples of a group of results, in their order; the answers of several runs under one prompt."""
    continued: dict[str, Continued] = {}
    filled: dict[str, Filled] = {}
    found: list[Sample] = []
    for member in members:
        for raw in member.result.samples:
            if _is_continuation(raw):
                if raw["prompt"] not in continued:
                    continued[raw["prompt"]] = Continued(raw["prompt"], raw.get("real"), excerpt=_is_excerpt(member))
                    found.append(continued[raw["prompt"]])
                known = [
                    (words(key), cell(value))
                    for key, value in raw.items()
                    if key not in ("kind", "prompt", "text", "real", "id") and value is not None
                ]
                continued[raw["prompt"]].answers.append((member, raw["text"], known))
            elif _is_fill_mask(raw):
                right = [answer["right"] for answer in raw["answers"]]
                key = repr((raw["parts"], right))
                if key not in filled:
                    filled[key] = Filled(raw["parts"], right, excerpt=_is_excerpt(member))
                    found.append(filled[key])
                filled[key].answers.append((member, raw["answers"]))
            else:
                found.append(Other(member, words(str(raw.get("kind", ""))), _items(raw), _choices(raw)))
    return found


def kinds_of(samples: Sequence[Sample]) -> set[str]:
    """The kinds among them, which the legend explains."""
    return {sample.kind for sample in samples}


def _is_excerpt(member: Member) -> bool:
    """Whether the prompts were cut out of held-out text, and are not the user's own."""
    return not any(member.result.settings.get(key) for key in ("prompt", "prompts"))


def _choices(raw: dict[str, Any]) -> list[tuple[str, str, bool]]:
    """Each choice with what is said of it ("log p -4.31, right, chosen")."""
    found = raw.get("choices")
    if not isinstance(found, dict):
        return []
    return [(str(text), cell(said), "right" in str(said).split(", ")) for text, said in found.items()]


def _items(raw: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and values as text; what is nested one level deep gets rows of its own."""
    items: list[tuple[str, str]] = []
    for key, value in raw.items():
        if key == "choices" and isinstance(value, dict):
            continue  # drawn by themselves
        if key == "responses" and (likelihoods := _likelihoods(value)):
            items.append(("log p of the choices", likelihoods))
        elif isinstance(value, dict):
            items += [(words(str(name)), cell(item)) for name, item in value.items()]
        elif key != "kind":
            items.append((words(str(key)), cell(value)))
    return items


def _likelihoods(value: Any) -> str:
    """Of responses as earlier versions kept them: pairs of a likelihood and a truth value; "" of others."""
    if not isinstance(value, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], float) for pair in value
    ):
        return ""
    return ", ".join(number(pair[0]) for pair in value)


def _is_continuation(raw: dict[str, Any]) -> bool:
    texts = (raw.get("prompt"), raw.get("text"))
    real = raw.get("real")
    return (
        raw.get("kind") == CONTINUATION
        and all(isinstance(text, str) for text in texts)
        and (real is None or isinstance(real, str))
    )


def _is_fill_mask(raw: dict[str, Any]) -> bool:
    """Whether it has everything that is drawn, with one part more than there are hidden words."""
    if raw.get("kind") != FILL_MASK:
        return False
    try:
        for answer in raw["answers"]:
            answer["rank_in_top_5"]
            if not isinstance(answer["right"], str) or not all(
                isinstance(text, str) and isinstance(p, int | float) for text, p in answer["top"]
            ):
                return False
        return len(raw["parts"]) == len(raw["answers"]) + 1 and all(isinstance(part, str) for part in raw["parts"])
    except (KeyError, TypeError, ValueError):
        return False
