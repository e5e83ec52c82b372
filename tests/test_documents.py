"""The pages are plain to read, and every link in them leads somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = sorted(
    str(path.relative_to(REPOSITORY))
    for path in (REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *(REPOSITORY / "docs").rglob("*.md"))
)
LONGEST, AVERAGE = 35, 20
"""Words of a sentence."""
ABBREVIATIONS = re.compile(r"\b(et al|e\.g|i\.e|vs|cf|Sec|Fig|Eq|No)\.")


def without_code(text: str) -> str:
    """The page with fenced and indented blocks of code blanked."""
    text = re.sub(r"^(```+).*?^\1[ \t]*$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"(?<=\n\n)(?: {4}.*\n+)+", "\n", text)


def paragraphs(text: str) -> list[str]:
    """The prose: paragraphs and items of lists, without headings, tables, pictures and HTML."""
    text = re.sub(r"<!--.*?-->", "", without_code(text), flags=re.DOTALL)
    lines = [
        "" if re.match(r"\s*(#|\||<)", line) else re.sub(r"^\s*([-*]|\d+\.)\s+", "\n\n", line)
        for line in text.splitlines()
    ]
    found = re.split(r"\n\s*\n", "\n".join(lines))
    return [" ".join(paragraph.split()) for paragraph in found if paragraph.strip()]


def sentences(text: str) -> list[list[str]]:
    """The words of each sentence. Code and formulas within a line are one word; a link is its text."""
    found = []
    for paragraph in paragraphs(text):
        plain = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", paragraph)
        plain = re.sub(r"`+[^`]+`+|\$[^$]+\$", "CODE", plain)
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", plain)
        plain = ABBREVIATIONS.sub(r"\1", plain)
        for sentence in re.split(r"(?<=[.!?])[\"')*_]*\s+", plain):
            words = re.findall(r"[\w'’%./,+-]*\w[\w'’%./,+-]*", sentence)
            if words:
                found.append(words)
    return found


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.*?)\s*$", without_code(text), flags=re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        anchor = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        number = next(n for n in range(100) if (f"{anchor}-{n}" if n else anchor) not in found)
        found.add(f"{anchor}-{number}" if number else anchor)
    return found


def test_sentences_are_found() -> None:
    page = "# A heading of many words\n\nOne `two three` [four](x.md). Xiong et al. 2021 say so:\n\n"
    page += "    code here. More.\n\n| a | table |\n\n- An item\n  that continues.\n- Another\n\n"
    page += "```python\nx = 1\n```\nThe end\n"
    assert [len(words) for words in sentences(page)] == [3, 6, 4, 1, 2]


def test_anchors_are_those_of_github() -> None:
    page = "# Adding a *form*\n## `nystrom plan`, and more\n## Twice\n## Twice\n```\n# not one\n```\n"
    assert anchors(page) == {"adding-a-form", "nystrom-plan-and-more", "twice", "twice-1"}


@pytest.mark.parametrize("page", PAGES)
def test_sentences_are_short(page: str) -> None:
    found = sentences((REPOSITORY / page).read_text(encoding="utf-8"))
    long = [f"{len(words)} words: {' '.join(words)}" for words in found if len(words) > LONGEST]
    assert not long, "\n".join(long)
    average = sum(map(len, found)) / max(1, len(found))
    assert average <= AVERAGE, f"{average:.1f} words a sentence"


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_links_lead_somewhere(page: str) -> None:
    path = REPOSITORY / page
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(path.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file) if file else path
        if not there.exists() or (anchor and anchor not in anchors(there.read_text(encoding="utf-8"))):
            broken.append(target)
    assert not broken
