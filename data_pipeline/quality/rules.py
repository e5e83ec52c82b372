"""The filters by name: what each one drops, its published threshold, and where that stands.

Sources. Gopher: Rae et al. 2021, arXiv 2112.11446, appendix A.1.1, thresholds of repetition in its Table A1. C4: Raffel
et al. 2020, JMLR 21(140), section 2.2. FineWeb: Penedo et al. 2024, arXiv 2406.17557, section 3.6.

Differences from the papers and from datatrove's filters of the same names:

- Words are runs without white space, punctuation included (datatrove: a tokenizer's words; its counts and mean
  lengths leave punctuation out). Text without spaces, such as Chinese, is all one word: use the counts of characters.
- Lines are stripped and blank ones not counted. A bullet is one of • ‣ ▶ ◀ ◦ ■ □ ▪ ▫ – or Markdown's - and *.
- Stop words are found in either case and next to punctuation.
- Shares of repeated characters are of the words (lines, paragraphs) alone, without the white space between, and every
  word inside a repeated n-gram counts once. The library datatrove divides by all characters and skips past each repeat
  it finds, so that its shares are smaller.
- The most frequent n-gram has to come twice to count at all. In datatrove a single one counts, which drops short text.
- C4 cleans lines before it judges a page. Here no text is changed: `c4-min-sentences` counts the sentences of the lines
  C4 would keep, and drops the documents C4 would drop. Curly brackets and lorem ipsum count anywhere in the document,
  as the paper has it; in datatrove only on kept lines. C4's list of bad words and langdetect are left out.
- A value equal to its threshold stays; FineWeb's three rules drop it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from data_pipeline.quality.statistics import Statistics
from data_pipeline.quality.values import Count, Flag, Kind, Range, Rate, Scripts, Share, Value

_GOPHER = "Gopher, A.1.1"
_TABLE = "Gopher, Table A1"
_C4 = "C4, 2.2"
_FINEWEB = "FineWeb, 3.6"
_SHORT_LINE = 30  # characters; FineWeb, 3.6


@dataclass(frozen=True)
class Rule:
    """One named filter. ``default`` is the published threshold; None means that the user must give a value."""

    name: str
    kind: Kind
    default: Value
    summary: str  # reads on from "drops documents ..."
    source: str
    drops: Callable[[Statistics, Any], bool]


def _top(n: int, threshold: float) -> Rule:
    summary = f"with a larger share of characters in the most frequent {n}-gram of words"
    return Rule(f"top-{n}-gram", _SHARE, threshold, summary, _TABLE, lambda s, v: s.grams.top(n) > v)


def _repeated(n: int, threshold: float) -> Rule:
    summary = f"with a larger share of characters in repeated {n}-grams of words"
    return Rule(f"duplicate-{n}-grams", _SHARE, threshold, summary, _TABLE, lambda s, v: s.grams.repeated(n) > v)


_COUNT, _SHARE, _FLAG = Count(), Share(), Flag()

_ALL = (
    Rule("min-chars", _COUNT, None, "of fewer characters", "", lambda s, v: len(s.text) < v),
    Rule("max-chars", _COUNT, None, "of more characters", "", lambda s, v: len(s.text) > v),
    Rule("min-words", _COUNT, 50, "of fewer words", _GOPHER, lambda s, v: s.num_words < v),
    Rule("max-words", _COUNT, 100_000, "of more words", _GOPHER, lambda s, v: s.num_words > v),
    Rule(
        "mean-word-length",
        Range(),
        (3.0, 10.0),
        "whose mean word length lies outside this range of characters",
        _GOPHER,
        lambda s, v: not v[0] <= s.mean_word_length <= v[1],
    ),
    Rule(
        "symbols",
        Rate(),
        0.1,
        "with more hash signs, or more ellipses, a word",
        _GOPHER,
        lambda s, v: s.symbols > v,
    ),
    Rule(
        "bullets",
        _SHARE,
        0.9,
        "with a larger share of lines that begin with a bullet",
        _GOPHER,
        lambda s, v: s.bullet_lines > v,
    ),
    Rule(
        "ellipsis-lines",
        _SHARE,
        0.3,
        "with a larger share of lines that end in an ellipsis",
        _GOPHER,
        lambda s, v: s.ellipsis_lines > v,
    ),
    Rule(
        "alphabetic",
        _SHARE,
        0.8,
        "with a smaller share of words that hold a letter",
        _GOPHER,
        lambda s, v: s.alphabetic_words < v,
    ),
    Rule(
        "stop-words",
        _COUNT,
        2,
        "with fewer of the words the, be, to, of, and, that, have, with (English)",
        _GOPHER,
        lambda s, v: not s.has_stop_words(v),
    ),
    Rule(
        "duplicate-lines",
        _SHARE,
        0.3,
        "with a larger share of lines that repeat an earlier one",
        _TABLE,
        lambda s, v: s.repeated_lines.items > v,
    ),
    Rule(
        "duplicate-paragraphs",
        _SHARE,
        0.3,
        "with a larger share of paragraphs that repeat an earlier one",
        _TABLE,
        lambda s, v: s.repeated_paragraphs.items > v,
    ),
    Rule(
        "duplicate-line-chars",
        _SHARE,
        0.2,
        "with a larger share of characters in repeated lines",
        _TABLE,
        lambda s, v: s.repeated_lines.chars > v,
    ),
    Rule(
        "duplicate-paragraph-chars",
        _SHARE,
        0.2,
        "with a larger share of characters in repeated paragraphs",
        _TABLE,
        lambda s, v: s.repeated_paragraphs.chars > v,
    ),
    *(_top(n, threshold) for n, threshold in ((2, 0.20), (3, 0.18), (4, 0.16))),
    *(_repeated(n, threshold) for n, threshold in ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))),
    Rule("c4-lorem-ipsum", _FLAG, None, "with 'lorem ipsum'", _C4, lambda s, v: "lorem ipsum" in s.lower),
    Rule("c4-curly", _FLAG, None, "with a curly bracket {", _C4, lambda s, v: "{" in s.text),
    Rule(
        "c4-min-sentences",
        _COUNT,
        3,
        "with fewer sentences on lines of at least 5 words that end in a terminal mark",
        _C4,
        lambda s, v: s.c4_sentences < v,
    ),
    Rule(
        "terminal-punctuation",
        _SHARE,
        0.12,
        "with a smaller share of lines that end in a terminal mark",
        _FINEWEB,
        lambda s, v: s.terminal_lines < v,
    ),
    Rule(
        "short-lines",
        _SHARE,
        0.67,
        f"with a larger share of lines of fewer than {_SHORT_LINE} characters",
        _FINEWEB,
        lambda s, v: s.short_lines(_SHORT_LINE) > v,
    ),
    Rule(
        "script",
        Scripts(),
        None,
        "with a smaller share of letters of these Unicode scripts",
        "",
        lambda s, v: s.script_share(v[0]) < v[1],
    ),
)

RULES: dict[str, Rule] = {rule.name: rule for rule in _ALL}

# What a bundle's name stands for, in this order, at the published thresholds.
BUNDLES: dict[str, tuple[str, ...]] = {
    "gopher-quality": (
        "min-words",
        "max-words",
        "mean-word-length",
        "symbols",
        "bullets",
        "ellipsis-lines",
        "alphabetic",
        "stop-words",
    ),
    "gopher-repetition": (
        "duplicate-lines",
        "duplicate-line-chars",
        "duplicate-paragraphs",
        "duplicate-paragraph-chars",
        *(f"top-{n}-gram" for n in (2, 3, 4)),
        *(f"duplicate-{n}-grams" for n in range(5, 11)),
    ),
    "c4": ("c4-lorem-ipsum", "c4-curly", "c4-min-sentences"),
    # MassiveText's threshold of duplicate-line-chars, halved (FineWeb, 3.6)
    "fineweb": ("terminal-punctuation", "duplicate-line-chars=0.1", "short-lines"),
}
