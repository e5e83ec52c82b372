"""What a single document says: the choices with their likelihoods, the answer, and what guessing would get."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Sample = dict[str, Any]
"""A document as lm-eval logs it."""


@dataclass(frozen=True)
class Choices:
    """The choices of a document, their log-likelihoods, and the places of the right ones (None: not known).

    The likeliest is taken, and of several the first, as lm-eval does.
    """

    texts: list[str]
    log_p: list[float]
    right: frozenset[int] | None

    @property
    def chosen(self) -> int:
        """Place of the one that is taken."""
        return self.log_p.index(max(self.log_p))

    @property
    def tied(self) -> bool:
        """Whether several are likeliest."""
        return self.log_p.count(max(self.log_p)) > 1

    @property
    def chance(self) -> float:
        """The accuracy of guessing."""
        return (1 if self.right is None else len(self.right)) / len(self.texts)


def choices_of(sample: Sample) -> Choices | None:
    """The choices of a document, or None where it has none: of a text to write, or of one text's likelihood."""
    answers = sample["filtered_resps"]
    if len(answers) < 2 or not all(_is_likelihood(answer) for answer in answers):
        return None
    arguments = sample["arguments"]
    if "acc_mutual_info" in sample:  # behind the choices come the same without a context
        half = len(answers) // 2
        answers, arguments = answers[:half], arguments[:half]
    texts = [str(argument[1]) for argument in arguments]
    if len(set(texts)) == 1:  # the choice is in the prompt, and what follows it is asked for
        texts = [str(argument[0]) for argument in arguments]
    return Choices(texts, [float(answer[0]) for answer in answers], _right(sample["target"], texts))


def chance(samples: Sequence[Sample], metric: str) -> float | None:
    """The mean of a ``metric`` where each document's choice is guessed; None where it is no accuracy of choices.

    A task may compute anything under the name of an accuracy. What it computed must be all or nothing for each
    document, and under the plain name what the likeliest choice gives.
    """
    found = [choices_of(sample) for sample in samples]
    if not metric.startswith("acc") or not samples or any(choices is None for choices in found):
        return None
    known = [choices for choices in found if choices is not None]
    values = [sample[metric] for sample in samples]
    if any(value not in (0, 1) for value in values):
        return None
    if metric == "acc" and any(
        choices.right is not None and value != (choices.chosen in choices.right)
        for choices, value in zip(known, values, strict=True)
    ):
        return None
    return sum(choices.chance for choices in known) / len(known)


def facts(sample: Sample) -> dict[str, Any]:
    """What the record of a document holds beside the values of its metrics: prediction and log-likelihoods (nats)."""
    choices = choices_of(sample)
    if choices is not None:
        right = None if choices.right is None else sorted(choices.right)
        return {
            "log_likelihoods": choices.log_p,
            "predicted": choices.chosen,
            "right": right,
            "tied": int(choices.tied),
        }
    answer = sample["filtered_resps"][0]
    if _is_likelihood(answer):
        return {"log_likelihood": float(answer[0]), "likeliest": int(answer[1])}
    if isinstance(answer, int | float):
        return {"log_likelihood": float(answer)}
    return {"predicted": str(answer), "right": str(sample["target"])}


def identity(task: str, sample: Sample) -> str:
    """A hash of the document and its prompt, the same for every model."""
    content = [task, sample["doc_hash"], sample["prompt_hash"], sample["target_hash"]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def shown(task: str, samples: Sequence[Sample], count: int = 2) -> Iterator[dict[str, Any]]:
    """The first documents of a task, for people: what the model was asked, what it was scored on, what it took."""
    for sample in samples[:count]:
        argument = sample["arguments"][0]
        answer, choices = sample["filtered_resps"][0], choices_of(sample)
        about: dict[str, Any] = {"prompt": str(argument[0])}
        if choices is not None:
            about["choices"] = dict(_named(choices))
        elif _is_likelihood(answer):
            about |= {"continuation": str(argument[1]), "log p": float(answer[0]), "is the likeliest": bool(answer[1])}
        elif isinstance(answer, int | float):
            about = {"text": str(argument[0]), "log p": float(answer)}
        else:
            about |= {"written": str(answer), "right": str(sample["target"])}
        yield {"kind": "harness", "task": task, **about}


def _named(choices: Choices) -> Iterator[tuple[str, str]]:
    """Each choice with its log-likelihood, and whether it is right and was taken."""
    seen: dict[str, int] = {}
    for place, (text, log_p) in enumerate(zip(choices.texts, choices.log_p, strict=True)):
        name = text.strip() or repr(text)
        seen[name] = seen.get(name, 0) + 1
        words = [f"log p {log_p:.2f}"]
        words += ["right"] if choices.right is not None and place in choices.right else []
        words += ["chosen"] if place == choices.chosen else []
        yield name if seen[name] == 1 else f"{name} (again, {seen[name]})", ", ".join(words)


def _right(target: Any, texts: list[str]) -> frozenset[int] | None:
    if isinstance(target, str):
        stripped = [text.strip() for text in texts]
        return frozenset([stripped.index(target.strip())]) if stripped.count(target.strip()) == 1 else None
    places = target if isinstance(target, list | tuple) else [target]
    if not all(isinstance(place, int) and 0 <= place < len(texts) for place in places) or not places:
        return None
    return frozenset(places)


def _is_likelihood(answer: Any) -> bool:
    return isinstance(answer, tuple | list) and len(answer) == 2 and isinstance(answer[0], int | float)
