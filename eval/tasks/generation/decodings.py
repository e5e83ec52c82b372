"""Ways to choose the next token, as they are written on the command line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from data_pipeline.errors import UserError

if TYPE_CHECKING:
    from eval.subject import Subject


@dataclass(frozen=True)
class Decoding:
    """Sampling (``pretrain.model.sampling``), or with ``beams`` a beam search. Plain sampling unless said otherwise.

    Settings that change nothing beside others (top-k under greedy decoding) are set back, so that equal ways of
    decoding are equal.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    beams: int = 0

    def __post_init__(self) -> None:
        if self.temperature == 0 or self.beams:
            object.__setattr__(self, "temperature", 0.0)
            object.__setattr__(self, "top_k", 0)
            object.__setattr__(self, "top_p", 1.0)

    @classmethod
    def parse(cls, text: str) -> Decoding:
        """``greedy``, or ``key=value`` joined by commas: temperature, top_k, top_p, repetition_penalty, beams."""
        values: dict[str, float] = {}
        known = {field.name: field.type for field in fields(cls)}
        for part in text.split(","):
            key, sep, value = part.strip().partition("=")
            key = key.replace("-", "_")  # in the values it is a sign
            if key == "greedy" and not sep:
                values["temperature"] = 0.0
                continue
            if key not in known or not sep:
                raise UserError(
                    f"decoding '{text}': write greedy, or key=value joined by commas, with the keys {', '.join(known)}"
                )
            try:
                values[key] = int(value) if known[key] == "int" else float(value)
            except ValueError:
                kind = "a whole number" if known[key] == "int" else "a number"
                raise UserError(f"decoding '{text}': {key} must be {kind}, got '{value}'") from None
        _check(text, values)
        return cls(**values)  # type: ignore[arg-type]

    @property
    def name(self) -> str:
        """For people."""
        words = []
        if self.beams:
            words.append(f"beam search of {self.beams}")
        elif self.temperature == 0:
            words.append("greedy")
        else:
            words += [f"top-k {self.top_k}"] if self.top_k else []
            words += [f"top-p {self.top_p:g}"] if self.top_p < 1 else []
            words = words or ["sampled"]
            words += [f"temperature {self.temperature:g}"] if self.temperature != 1 else []
        if self.repetition_penalty != 1:
            words.append(f"penalty {self.repetition_penalty:g}")
        return ", ".join(words)

    def write(
        self, subject: Subject, prompts: Sequence[Sequence[int]], seeds: Sequence[int], max_new_tokens: int
    ) -> list[list[int]]:
        """A continuation of each prompt, ending before the end of a document."""
        from pretrain.model.beam import beam_search
        from pretrain.model.generation import generate

        stop = subject.loaded.tokenizer.eos_id
        if self.beams:
            texts, _ = beam_search(
                subject.model, prompts, beams=self.beams, max_new_tokens=max_new_tokens, stop_id=stop
            )
            return texts
        return generate(
            subject.model,
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
            seed=seeds,
            stop_id=stop,
        )


def _check(text: str, values: dict[str, float]) -> None:
    faults = {
        "temperature": lambda x: 0 <= x < math.inf,
        "top_k": lambda x: x >= 0,
        "top_p": lambda x: 0 < x <= 1,
        "repetition_penalty": lambda x: 0 < x < math.inf,
        "beams": lambda x: x >= 1,
    }
    for key, value in values.items():
        if not faults[key](value):
            raise UserError(f"decoding '{text}': {key} {value:g} is out of range")
    if values.get("beams") and set(values) != {"beams"}:
        raise UserError(f"decoding '{text}': a beam search looks for the likeliest text and takes no other setting")
