"""Sets of texts, and what is measured on each text: the records that all averages and their intervals follow from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_pipeline.shards.shardset import ShardSet
from eval.results.parts import Job, Parts
from eval.results.schema import Estimator
from eval.shared.scoring import run_parts
from eval.tasks.generation import likeness, measures
from eval.tasks.generation.judges import Judges, Pair, continuation_nats, mean_states

# Prompts in one part of the work.
CHUNK = 16
WINDOW = 32
COPIED_WORDS = 8
LOG_2 = float(np.log(2))

ESTIMATORS = {
    "own_perplexity": Estimator("nats", "tokens", exponential=True),
    "own_bits_per_byte": Estimator("nats", "bytes", scale=1 / LOG_2),
    "reference_bits_per_byte": Estimator("reference_nats", "bytes", scale=1 / LOG_2),
    "repetition_4": Estimator("repeated_4", "grams_4"),
    "repetition_window": Estimator("repeated_window", "window_tokens"),
    "longest_repeat": Estimator("longest_repeat"),
    "prompt_copies": Estimator("from_prompt_4", "grams_4"),
    "coherence": Estimator("cosine", "written"),
    "coherence_other": Estimator("cosine_other", "written"),
    "training_copies": Estimator("copied_grams", "word_grams"),
}


@dataclass
class TextSet:
    """Texts with their prompts, in tokens of the model. ``records``: of each text, what can be averaged."""

    name: str
    pairs: list[Pair]
    control: bool = False
    records: list[dict[str, Any]] = field(default_factory=list)
    states: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    nats: list[list[float]] = field(default_factory=list)
    """Of each token of each text."""

    @property
    def texts(self) -> list[Sequence[int]]:
        """Without their prompts."""
        return [text for _, text in self.pairs]

    @property
    def tokens(self) -> int:
        """Of all texts."""
        return sum(map(len, self.texts))


def in_chunks(name: str, items: Sequence[Any], work: Callable[[int, Sequence[Any]], Any]) -> list[Job]:
    """Jobs over consecutive shares of ``items``; ``work`` gets the place of the first, and the share."""

    def job(start: int) -> Job:
        return f"{name}, from {start}", lambda: work(start, items[start : start + CHUNK])

    return [job(start) for start in range(0, len(items), CHUNK)]


def score(sets: Sequence[TextSet], judges: Judges, parts: Parts, copies: ShardSet | None) -> None:
    """Fill in the records, states and losses of every set."""
    tokenizer = judges.subject.loaded.tokenizer

    def read(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
        nats = continuation_nats(judges.subject, pairs)
        found: list[dict[str, Any]] = [{"nats": row} for row in nats]
        if judges.reference is not None:
            again = continuation_nats(judges.reference, judges.reread(judges.reference, pairs))
            found = [old | {"reference_nats": sum(row)} for old, row in zip(found, again, strict=True)]
        seen = judges.reread(judges.features, pairs)
        states = mean_states(judges.features, [prompt for prompt, _ in seen] + [text for _, text in seen])
        for old, before, after in zip(found, states, states[len(pairs) :], strict=False):
            old |= {"prompt_state": before, "state": after}
        return found

    jobs: list[Job] = []
    for texts in sets:
        jobs += in_chunks(f"read {texts.name}", texts.pairs, lambda _, pairs: read(pairs))
    found = iter(run_parts(parts, jobs, "generate: reading"))
    for texts in sets:
        rows = [row for _ in range(0, len(texts.pairs), CHUNK) for row in next(found)]
        texts.nats = [row["nats"] for row in rows]
        texts.states = np.array([row["state"] for row in rows])
        cosine = likeness.cosines(np.array([row["prompt_state"] for row in rows]), texts.states)
        other = likeness.cosines(
            np.array([row["prompt_state"] for row in rows]), texts.states[likeness.others(len(rows))]
        )
        for place, ((prompt, text), row) in enumerate(zip(texts.pairs, rows, strict=True)):
            # The ids too: text that is encoded again may come in other tokens than those that were written.
            record = counts(prompt, text) | {"text": tokenizer.decode(text), "ids": list(text)}
            record["nats"] = sum(row["nats"])
            record["bytes"] = len(record["text"].encode())
            if judges.reference is not None:
                record["reference_nats"] = row["reference_nats"]
            # An empty text has no direction.
            record |= {"cosine": float(cosine[place]) if text else 0.0}
            # Of a single prompt there is no other one.
            record |= {"cosine_other": None if len(rows) < 2 else float(other[place]) if text else 0.0}
            texts.records.append(record)
    if copies is not None:
        _search_copies(sets, copies, parts)


def counts(prompt: Sequence[int], text: Sequence[int]) -> dict[str, Any]:
    """What can be counted in one text and its prompt."""
    repeats, grams = measures.repeated(text, 4)
    in_window, tokens = measures.repeated_in_window(text, WINDOW)
    return {
        "tokens": len(text),
        "written": int(len(text) > 0),
        "repeated_4": repeats,
        "grams_4": grams,
        "repeated_window": in_window,
        "window_tokens": tokens,
        "longest_repeat": measures.longest_repeat(text),
        "from_prompt_4": measures.copied(prompt, text, 4)[0],
    }


def _search_copies(sets: Sequence[TextSet], shards: ShardSet, parts: Parts) -> None:
    from data_pipeline.quality.contamination import contamination

    texts = [record["text"] for item in sets for record in item.records]

    def search() -> list[list[int]]:
        found = contamination(shards, texts, COPIED_WORDS, examples=0)
        return [found.grams.tolist(), found.found.tolist(), found.longest.tolist()]

    rows = zip(*parts.one("copies of the training text", search), strict=True)
    for item in sets:
        for record, (grams, hits, longest) in zip(item.records, rows, strict=False):
            record |= {"word_grams": grams, "copied_grams": hits, "longest_copy": longest}
