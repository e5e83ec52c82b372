"""What a tokenizer loses of a text: it is encoded, decoded, and compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from data_pipeline.tokenization.tokenizer import Tokenizer

_SHOWN = 5  # characters that are named
_AROUND = 20  # characters on each side of the first difference


@dataclass(frozen=True)
class Loss:
    """What did not come back of some texts. Characters are counted without regard to their places."""

    characters: int  # of the texts
    lost: dict[str, int]  # character -> how many of it are missing afterwards, the commonest first
    added: int  # characters that were not in the texts
    before: str  # the first difference, in the text
    after: str  # and in what came back

    def __str__(self) -> str:
        count = sum(self.lost.values())
        named = ", ".join(f"{character!r} {number:,}" for character, number in list(self.lost.items())[:_SHOWN])
        more = f", and {len(self.lost) - _SHOWN:,} others" if len(self.lost) > _SHOWN else ""
        what = f" ({named}{more})" if count else ""
        return (
            f"the tokenizer does not give text back as it was: of a sample of {self.characters:,} characters {count:,} "
            f"({count / max(self.characters, 1):.2%}) are lost{what} and {self.added:,} are new; "
            f"{self.before!r} comes back as {self.after!r}"
        )


def loss(tokenizer: Tokenizer, texts: Sequence[str]) -> Loss | None:
    """What ``tokenizer`` loses of ``texts``; None if each comes back, white space at its ends put aside."""
    lost: Counter[str] = Counter()
    added = 0
    example: tuple[str, str] | None = None
    for text, back in zip(texts, tokenizer.decode_batch(tokenizer.encode_batch(texts)), strict=True):
        if back.strip() == text.strip():  # also the space that a model puts before each text
            continue
        before, after = Counter(text), Counter(back)
        lost += before - after
        added += (after - before).total()
        example = example or _first_difference(text, back)
    if example is None:
        return None
    return Loss(sum(map(len, texts)), dict(lost.most_common()), added, *example)


def _first_difference(text: str, back: str) -> tuple[str, str]:
    at = next(i for i, (a, b) in enumerate(zip_longest(text, back)) if a != b)
    part = slice(max(0, at - _AROUND), at + _AROUND)
    return text[part], back[part]
