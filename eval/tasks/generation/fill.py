"""A masked model fills in words of held-out text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from eval.results.parts import Parts
from eval.results.schema import Estimator, Metric, Outcome, Table
from eval.results.statistics import bootstrap
from eval.subject import Subject
from eval.tasks.generation import GenerateSettings
from eval.tasks.generation.prompts import content_hash, passages, text_between

TABLE = "filled masks"
ESTIMATORS = {"top_1": Estimator("right", "words"), "top_5": Estimator("in_five", "words")}


def run_fill(subject: Subject, settings: GenerateSettings, parts: Parts) -> Outcome:
    """Hide a few ordinary tokens of each held-out passage and list the five likeliest for each."""
    tokenizer = subject.loaded.tokenizer
    mask_id = tokenizer.mask_id
    assert mask_id is not None  # without one a masked model is not loaded
    subject.check_length(settings.prompt_tokens + settings.max_new_tokens, "passage")
    rng = np.random.default_rng(settings.seed)
    samples: list[dict[str, Any]] = []
    records: list[dict[str, Any]] = []
    for found in passages(subject.held_out(), settings.num_samples, settings):
        passage = [*found.prompt, *found.real]
        places = sorted(rng.permutation(_words(passage, tokenizer.decode))[: settings.masks].tolist())
        hidden = torch.tensor([passage])
        hidden[0, places] = mask_id
        top = subject.logits(hidden)[0, places].softmax(-1).topk(5, dim=-1)
        answers = []
        for place, ids, values in zip(places, top.indices.tolist(), top.values.tolist(), strict=True):
            answers.append(
                {
                    "right": tokenizer.decode([passage[place]]),
                    "rank_in_top_5": ids.index(passage[place]) + 1 if passage[place] in ids else None,
                    "top": [[tokenizer.decode([t]), p] for t, p in zip(ids, values, strict=True)],
                }
            )
        text = text_between(passage, places, tokenizer)
        samples.append({"kind": "fill_mask", "parts": text, "answers": answers})
        ranks = [answer["rank_in_top_5"] for answer in answers]
        record = {"words": len(places), "right": ranks.count(1), "in_five": len(places) - ranks.count(None)}
        records.append({"id": content_hash(text, passage), **record})
    intervals = {name: bootstrap(records, estimator) for name, estimator in ESTIMATORS.items()}
    total = sum(record["words"] for record in records)
    metrics = {}
    for name, x in intervals.items():
        low, high = (x.low, x.high) if x.n > 1 else (None, None)
        metrics[name] = Metric(x.value, True, n=total, low=low, high=high, unit="words")
    columns = ["hidden words", "likeliest is right", "right one in the first five"]
    table = Table(TABLE, columns, [[total, intervals["top_1"].value, intervals["top_5"].value]])
    return Outcome(metrics, [table], samples=samples, records=records, estimators=ESTIMATORS)


def _words(passage: Sequence[int], decode: Any) -> list[int]:
    """Places of tokens that begin a word of letters, else of any letters or digits, else all: a space tells little."""
    texts = [decode([token]) for token in passage]
    words = [i for i, t in enumerate(texts) if t.startswith(" ") and len(t) > 3 and t[1:].isalpha()]
    return words or [i for i, t in enumerate(texts) if t.strip().isalnum()] or list(range(len(passage)))
