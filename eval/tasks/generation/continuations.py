"""Continuations by a causal model in several ways of decoding, measured beside real text.

Every measure stands beside those of three other texts: the real continuations, as much other real text, and the real
continuations with their tokens shuffled. The first two differ by chance alone, the third is what no model should be.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from data_pipeline.shards.shardset import ShardSet
from eval.results.parts import Job, Parts
from eval.results.schema import Outcome
from eval.results.statistics import bootstrap
from eval.shared.scoring import run_parts
from eval.subject import Subject
from eval.tasks.generation import GenerateSettings, likeness, measures, tables
from eval.tasks.generation.decodings import Decoding
from eval.tasks.generation.judges import Judges, Pair
from eval.tasks.generation.prompts import Passage, content_hash, material
from eval.tasks.generation.scoring import ESTIMATORS, TextSet, in_chunks, score

REAL, OTHER, SHUFFLED = "real continuation (control)", "other real text (control)", "shuffled tokens (control)"
# Texts of a set that self-BLEU compares, each with all others: the cost is their square, a second or so for a set.
BLEU_TEXTS = 64
SHOWN = 8
SHOWN_BESIDE = 4


def run_continuations(subject: Subject, settings: GenerateSettings, parts: Parts) -> Outcome:
    """Write, read, measure."""
    judges = Judges.of(subject, settings)
    copies = None if settings.copies is None else ShardSet.open(settings.copies)
    found = material(subject, settings)
    subject.check_length(
        max(len(p.prompt) for p in found.prompts) + settings.max_new_tokens, "prompt and --max-new-tokens together,"
    )
    ways = settings.ways()
    written = _write(subject, found.prompts, ways, settings, parts)
    sets = [*written, *_controls(found.real, found.other, settings.seed)]
    score(sets, judges, parts, copies)
    measured = _measure(sets, settings, parts)
    main = written[0]
    records = [_record(subject, settings, ways, written, place, p) for place, p in enumerate(found.prompts)]
    there = {key: item for key, item in ESTIMATORS.items() if item.numerator in main.records[0]}
    return Outcome(
        tables.metrics(main, measured[main.name], there, measured.get(SHUFFLED)),
        tables.tables(sets, measured, there, judges, settings),
        tables.charts(sets),
        samples=_samples(subject, written, found.prompts),
        records=records,
        estimators={tables.METRICS[key]: item for key, item in there.items() if key in tables.METRICS},
    )


def _write(
    subject: Subject, prompts: list[Passage], ways: list[Decoding], settings: GenerateSettings, parts: Parts
) -> list[TextSet]:
    def job(way: Decoding) -> list[Job]:
        def write(start: int, chunk: Any) -> list[list[int]]:
            # A seed for each prompt, whatever chunk it is in; the same for all ways of decoding, which pairs them.
            seeds = [settings.seed + start + i for i in range(len(chunk))]
            return way.write(subject, [p.prompt for p in chunk], seeds, settings.max_new_tokens)

        return in_chunks(f"write, {way.name}", prompts, write)

    jobs = [job(way) for way in ways]
    done = iter(run_parts(parts, [item for several in jobs for item in several], "generate: writing"))
    sets = []
    for way, several in zip(ways, jobs, strict=True):
        texts = [text for _ in several for text in next(done)]
        pairs: list[Pair] = [(p.prompt, text) for p, text in zip(prompts, texts, strict=True)]
        sets.append(TextSet(way.name, pairs))
    return sets


def _controls(real: list[Passage], other: list[Passage], seed: int) -> list[TextSet]:
    def shuffled(place: int, tokens: list[int]) -> list[int]:
        return np.random.default_rng([seed, place]).permutation(tokens).tolist()

    sets = [
        TextSet(REAL, [(p.prompt, p.real) for p in real], control=True),
        TextSet(OTHER, [(p.prompt, p.real) for p in other], control=True),
        TextSet(SHUFFLED, [(p.prompt, shuffled(i, p.real)) for i, p in enumerate(real)], control=True),
    ]
    return [item for item in sets if item.pairs]


def _measure(sets: list[TextSet], settings: GenerateSettings, parts: Parts) -> dict[str, tables.Measured]:
    """What is measured on each set as a whole."""
    # A way of decoding that soon ends its texts would leave too little of all others.
    largest = max(item.tokens for item in sets)
    tokens = min(item.tokens for item in sets if 2 * item.tokens >= largest)
    number = min(len(item.pairs) for item in sets)
    chosen = np.sort(np.random.default_rng(settings.seed).permutation(number)[:BLEU_TEXTS])
    other = next((item for item in sets if item.name == OTHER), None)
    problem = likeness.mauve_problem(number)

    def self_bleu(item: TextSet) -> float:
        return measures.self_bleu([item.records[i]["text"] for i in chosen])

    def mauve(item: TextSet) -> tuple[float, float]:
        assert other is not None
        return likeness.mauve(item.states, other.states, settings.seed)

    compared = [item for item in sets if other is not None and item is not other and problem is None]
    jobs: list[Job] = [(f"self-BLEU, {item.name}", lambda item=item: self_bleu(item)) for item in sets]  # type: ignore[misc]
    jobs += [(f"MAUVE, {item.name}", lambda item=item: mauve(item)) for item in compared]  # type: ignore[misc]
    values = run_parts(parts, jobs, "generate: measuring")
    mauves = dict(zip((item.name for item in compared), values[len(sets) :], strict=True))
    measured = {}
    for item, bleu in zip(sets, values, strict=False):
        texts = measures.cut_to(item.texts, tokens) if item.tokens >= tokens else []
        measured[item.name] = tables.Measured(
            tokens=tokens,
            distinct=[measures.distinct(texts, n) for n in (1, 2, 3)],
            zipf=measures.zipf_exponent(measures.rank_frequencies(texts)),
            self_bleu=bleu,
            bleu_texts=len(chosen),
            mauve=mauves.get(item.name),
            intervals={
                key: bootstrap(item.records, estimator)
                for key, estimator in ESTIMATORS.items()
                if estimator.numerator in item.records[0]
            },
        )
    return measured


def _record(
    subject: Subject,
    settings: GenerateSettings,
    ways: list[Decoding],
    written: list[TextSet],
    place: int,
    passage: Passage,
) -> dict[str, Any]:
    """A prompt with its continuations: the numbers of the main way of decoding plainly, those of others under its
    name. One record for a prompt, for the prompts are the sample that intervals are about."""
    decode = subject.loaded.tokenizer.decode
    prompt, real = decode(passage.prompt), decode(passage.real)
    identity = content_hash(prompt, real, place if not real else None, ways[0].name, settings.max_new_tokens)
    record: dict[str, Any] = {"id": identity, "prompt": prompt, "prompt_ids": passage.prompt, "real": real or None}
    record |= written[0].records[place]
    for item in written[1:]:
        record |= {f"{item.name}: {key}": value for key, value in item.records[place].items()}
    return record


def _samples(subject: Subject, written: list[TextSet], prompts: list[Passage]) -> list[dict[str, Any]]:
    decode = subject.loaded.tokenizer.decode
    shown = sorted({int(i) for i in np.linspace(0, len(prompts) - 1, min(SHOWN, len(prompts)))})
    samples: list[dict[str, Any]] = []
    for place in shown:
        record = written[0].records[place]
        sample = {
            "kind": "continuation",
            "prompt": decode(prompts[place].prompt),
            "text": record["text"],
            "real": decode(prompts[place].real) or None,
        }
        if record["tokens"]:
            sample["perplexity"] = float(np.exp(record["nats"] / record["tokens"]))
        samples.append(sample)
    if len(written) > 1:
        for place in shown[:: max(1, len(shown) // SHOWN_BESIDE)][:SHOWN_BESIDE]:
            texts = {item.name: item.records[place]["text"] for item in written}
            real = decode(prompts[place].real) or None
            samples.append(
                {"kind": "side_by_side", "prompt": decode(prompts[place].prompt), "real": real, "texts": texts}
            )
    return samples
