"""What tests of fine-tuning elsewhere share: sentences of two topics, and loading a folder in transformers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

TOPICS = {
    "sea": ["ship", "wave", "sail", "harbour", "tide", "anchor"],
    "farm": ["cow", "hay", "barn", "field", "plough", "seed"],
}
FILLERS = ["the", "old", "a", "under", "small", "and", "near", "his", "grey", "over"]
HEADS = {"mlm": "AutoModelForMaskedLM", "clm": "AutoModelForCausalLM"}
CLASSIFIER = "AutoModelForSequenceClassification"


def sentences(count: int, *, seed: int = 0, words: tuple[int, int] = (4, 14)) -> list[tuple[str, int]]:
    """Texts of unequal lengths with the number of their topic: the first word and one in three of the others is of
    it."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        topic = draw.randrange(len(TOPICS))
        own = list(TOPICS.values())[topic]
        length = draw.randint(*words)
        text = " ".join(draw.choice(own if draw.random() < 0.33 or i == 0 else FILLERS) for i in range(length))
        found.append((text, topic))
    return found


def load(folder: Path, kind: str, **changes: Any) -> Any:
    """A model of the folder in one of transformers' Auto classes."""
    import transformers

    return getattr(transformers, kind).from_pretrained(folder, trust_remote_code=True, **changes)


def tokenizer_of(folder: Path, **changes: Any) -> Any:
    """The folder's tokenizer; it pads on the right, as for training, unless told otherwise."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=True, **{"padding_side": "right", **changes})
