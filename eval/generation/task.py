"""A look at what the model writes: continuations of prompts (causal) or filled-in masks (masked).

The statistics of the generated text stand beside those of the real continuations of the same prompts: a repetition
rate or a perplexity means something only against that of real text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from data_pipeline.errors import UserError
from eval.generation.settings import GenerateSettings
from eval.language_modeling.task import perplexity
from eval.results.parts import Parts
from eval.results.schema import Metric, Outcome, Table
from eval.subject import Subject
from pretrain.model.generation import generate

VERSION = 3
TABLE = "generated text"
FILL_TABLE = "filled masks"


def resolve(subject: Subject, settings: GenerateSettings) -> GenerateSettings:
    """The settings as they are; lengths are checked where the prompts are known."""
    return settings


def data(subject: Subject, settings: GenerateSettings) -> dict[str, Any]:
    """Where the prompts come from."""
    if settings.prompt:
        return {"prompts": len(settings.prompt), "hash": hashlib.sha256(repr(settings.prompt).encode()).hexdigest()}
    shards = subject.held_out()
    return {"path": str(shards.path), "hash": shards.fingerprint}


def run(subject: Subject, settings: GenerateSettings, parts: Parts) -> Outcome:
    """Samples and their statistics; raises :class:`UserError` for impossible settings or too little held-out text."""
    return _continue(subject, settings) if subject.causal else _fill(subject, settings)


def distinct(sequences: Sequence[Sequence[int]], n: int) -> float:
    """Different n-grams as a share of all n-grams, over all sequences (Li et al. 2016); 0 where there are none."""
    grams = [tuple(s[i : i + n]) for s in sequences for i in range(len(s) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition(sequences: Sequence[Sequence[int]], n: int = 4) -> float:
    """Share of n-grams that occurred before in their own sequence (rep-n, Welleck et al. 2020); 0 without any."""
    repeated = total = 0
    for s in sequences:
        grams = [tuple(s[i : i + n]) for i in range(len(s) - n + 1)]
        total += len(grams)
        repeated += len(grams) - len(set(grams))
    return repeated / total if total else 0.0


def continuation_nats(subject: Subject, prompt: Sequence[int], continuation: Sequence[int]) -> float:
    """Sum of -log p of the continuation's tokens after the prompt, in nats. The prompt must not be empty."""
    ids = torch.tensor([[*prompt, *continuation]])
    logits = subject.logits(ids[:, :-1])[0, len(prompt) - 1 :]
    goal = torch.tensor(continuation, device=logits.device)
    return float(torch.nn.functional.cross_entropy(logits, goal, reduction="sum"))


def _continue(subject: Subject, settings: GenerateSettings) -> Outcome:
    tokenizer = subject.loaded.tokenizer
    pairs = _own_prompts(subject, settings) or _held_out_prompts(subject, settings)
    subject.check_length(
        max(len(p) for p, _ in pairs) + settings.max_new_tokens, "prompt and --max-new-tokens together,"
    )
    written: list[list[int]] = []
    real: list[list[int]] = []
    nats = {"model": 0.0, "real": 0.0}
    samples: list[dict[str, Any]] = []
    continuations = generate(
        subject.model,
        [prompt for prompt, _ in pairs],
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        repetition_penalty=settings.repetition_penalty,
        seed=settings.seed,
        stop_id=tokenizer.eos_id,
    )
    for (prompt, truth), out in zip(pairs, continuations, strict=True):
        sample: dict[str, Any] = {
            "kind": "continuation",
            "prompt": tokenizer.decode(prompt),
            "text": tokenizer.decode(out),
            "real": tokenizer.decode(truth) if truth else None,
        }
        if out:
            own = continuation_nats(subject, prompt, out)
            sample["perplexity"] = perplexity(own / len(out))
            nats["model"] += own
            written.append(out)
        if truth:
            nats["real"] += continuation_nats(subject, prompt, truth)
            real.append(truth)
        samples.append(sample)
    rows = [_statistics("model", written, nats["model"])]
    if real:
        rows.append(_statistics("real continuation (control)", real, nats["real"]))
    columns = ["text", "distinct-1", "distinct-2", "repetition of 4-grams", "perplexity under the model", "tokens"]
    values = rows[0]
    metrics = {
        "distinct_1": Metric(values[1], None, n=len(written)),
        "distinct_2": Metric(values[2], None, n=len(written)),
        "repetition_4": Metric(values[3], None, n=len(written)),
        "own_perplexity": Metric(values[4], None, n=len(written)),
    }
    return Outcome(metrics, [Table(TABLE, columns, rows)], samples=samples)


def _statistics(name: str, sequences: list[list[int]], nats: float) -> list[Any]:
    number = sum(map(len, sequences))
    own = perplexity(nats / number) if number else float("nan")
    return [name, distinct(sequences, 1), distinct(sequences, 2), repetition(sequences), own, number]


def _own_prompts(subject: Subject, settings: GenerateSettings) -> list[tuple[list[int], list[int]]]:
    tokenizer = subject.loaded.tokenizer
    return [(tokenizer.encode(text) or [tokenizer.eos_id], []) for text in settings.prompt]


def _held_out_prompts(subject: Subject, settings: GenerateSettings) -> list[tuple[list[int], list[int]]]:
    """Passages of held-out documents with what really follows."""
    passages = _passages(subject, settings, "lower --max-new-tokens or give --prompt")
    return [(p[: settings.prompt_tokens], p[settings.prompt_tokens :]) for p in passages]


def _passages(subject: Subject, settings: GenerateSettings, advice: str) -> list[list[int]]:
    """The middles of held-out documents (beginnings are often boilerplate), spread over those that are long enough."""
    need = settings.prompt_tokens + settings.max_new_tokens
    documents = [d for d in subject.held_out().documents() if len(d) >= need]
    if not documents:
        raise UserError(f"no document of {subject.held_out().path} has a passage of {need} tokens: {advice}")
    chosen = sorted({int(i) for i in np.linspace(0, len(documents) - 1, settings.num_samples)})
    middles = [(len(documents[i]) - need) // 2 for i in chosen]
    return [documents[i][m : m + need].tolist() for i, m in zip(chosen, middles, strict=True)]


def _fill(subject: Subject, settings: GenerateSettings) -> Outcome:
    """Hide a few ordinary tokens of each held-out passage and list the five likeliest for each."""
    if settings.prompt:
        raise UserError(
            "--prompt is for causal models; a masked model fills in tokens of the held-out text: leave it out"
        )
    tokenizer = subject.loaded.tokenizer
    mask_id = tokenizer.mask_id
    assert mask_id is not None  # without one a masked model is not loaded
    length = settings.prompt_tokens + settings.max_new_tokens
    subject.check_length(length, "passage")
    rng = np.random.default_rng(settings.seed)
    hits = {1: 0, 5: 0}
    total = 0
    samples: list[dict[str, Any]] = []
    for passage in _passages(subject, settings, "lower --max-new-tokens"):
        places = sorted(rng.permutation(_words(passage, tokenizer.decode))[: settings.masks].tolist())
        hidden = torch.tensor([passage])
        hidden[0, places] = mask_id
        probabilities = subject.logits(hidden)[0, places].softmax(-1)
        top = probabilities.topk(5, dim=-1)
        answers = []
        for row, place in enumerate(places):
            ids = top.indices[row].tolist()
            total += 1
            hits[1] += ids[0] == passage[place]
            hits[5] += passage[place] in ids
            answers.append(
                {
                    "right": tokenizer.decode([passage[place]]),
                    "rank_in_top_5": ids.index(passage[place]) + 1 if passage[place] in ids else None,
                    "top": [
                        [tokenizer.decode([t]), float(p)] for t, p in zip(ids, top.values[row].tolist(), strict=True)
                    ],
                }
            )
        samples.append({"kind": "fill_mask", "parts": _parts(passage, places, tokenizer.decode), "answers": answers})
    metrics = {"top_1": Metric(hits[1] / total, True, n=total), "top_5": Metric(hits[5] / total, True, n=total)}
    columns = ["hidden words", "likeliest is right", "right one in the first five"]
    return Outcome(metrics, [Table(FILL_TABLE, columns, [[total, hits[1] / total, hits[5] / total]])], samples=samples)


def _words(passage: list[int], decode: Any) -> list[int]:
    """Places of tokens that begin a word of letters, else of any letters or digits, else all: a space tells little."""
    texts = [decode([token]) for token in passage]
    words = [i for i, t in enumerate(texts) if t.startswith(" ") and len(t) > 3 and t[1:].isalpha()]
    return words or [i for i, t in enumerate(texts) if t.strip().isalnum()] or list(range(len(passage)))


def _parts(passage: list[int], places: list[int], decode: Any) -> list[str]:
    """The text between the masks: one part more than there are masks."""
    edges = [-1, *places, len(passage)]
    return [decode(passage[a + 1 : b]) for a, b in pairwise(edges)]
