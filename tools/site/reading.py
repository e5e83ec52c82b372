"""Markdown as GitHub reads it, where Python-Markdown, on which MkDocs stands, reads otherwise.

Links are those of the repository. Formulas between dollars and in blocks named ``math`` become MathML, which browsers
draw by themselves: no script, no network. Indented blocks of code get colours and a button that copies.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any
from xml.etree import ElementTree

import yaml
from latex2mathml.converter import convert
from markdown import Extension, Markdown
from markdown.inlinepatterns import InlineProcessor
from markdown.treeprocessors import Treeprocessor
from markdown_it import MarkdownIt

from tools.site.mapping import relinked

FORMULA = r"(?<![\\\w$])\$(?![\s$])([^$`]+?)(?<![\s\\])\$(?![\w$])"
GITHUB = MarkdownIt("commonmark").enable("table")
"""CommonMark with tables: what the pages use of GitHub's Markdown."""
PROGRAMS = """apptainer bash cd conda curl deepspeed docker export for git kubectl make module mpirun nystrom pip podman
pytest python python3 ray sacct salloc sbatch scancel scontrol source squeue srun ssh sudo torchrun uv wandb"""
LANGUAGES = {
    "console": re.compile(r"\$ "),
    "python": re.compile(r"(from [\w.]+ )?import \w|@\w|(class|def) \w+\(|>>> "),
    "bash": re.compile(rf"(\w+=\S+ )*({'|'.join(PROGRAMS.split())}|\S+/(pip|python|run)) "),
}
"""What the first line of a block of each language begins with, in the order of trial."""
OPENING = ("bullet_list_open", "ordered_list_open", "table_open")
COUNTED = re.compile(r"<(h[1-6]|li|ul|ol|table|tr|td|th|em|strong|pre|img|blockquote)\b")


def fenced(text: str) -> str:
    """The page as Python-Markdown reads it rightly: the same page, with other blanks.

    Indented blocks of code become fenced ones with a language. GitHub takes what is indented as far as the text of an
    item for a part of the item, and lists and tables need no empty line before them. Python-Markdown wants four spaces
    for each level of lists, and empty lines.
    """
    lines: list[str | None] = list(text.split("\n"))
    source = text.split("\n")
    levels: dict[int, tuple[int, int]] = {}  # line -> columns to take away, levels of lists to put there
    depth = 0
    blocks: list[tuple[int, int, int, str]] = []
    apart: set[int] = set()  # lines that an empty one must precede
    for token in GITHUB.parse(text):
        if token.type == "list_item_close":
            depth -= 1
        elif token.type == "list_item_open" and token.map:
            first, end = token.map
            marker = re.match(r"( *)(?:[-*+]|\d+[.)]) *", source[first])
            columns = len(marker[0]) if marker else 0
            levels |= dict.fromkeys(range(first, end), (columns, depth + 1))
            levels[first] = (len(marker[1]) if marker else 0, depth)
            depth += 1
        elif token.type == "code_block" and token.map:
            blocks.append((token.map[0], token.map[1], depth, token.content.rstrip("\n")))
        elif token.type == "inline" and token.map:  # a line of a paragraph with a number first is no item
            for number in range(token.map[0] + 1, token.map[1]):
                source[number] = re.sub(r"^( *\d+)\. ", r"\1\\. ", source[number])
        if token.map and token.type in OPENING:
            apart.add(token.map[0])
        elif token.map and token.type in ("fence", "code_block"):
            apart.add(token.map[1])
    for number, (columns, level) in levels.items():
        line = source[number]
        lines[number] = "    " * level + line[min(columns, len(line) - len(line.lstrip())) :] if line.strip() else line
    for first, end, level, code in blocks:
        while end > first + 1 and not source[end - 1].strip():
            end -= 1
        fence = "`" * max(3, *(len(run) + 1 for run in re.findall(r"`+", code)), 3)
        block = [fence + language(code), *code.split("\n"), fence]
        lines[first] = "\n".join("    " * level + line if line else line for line in block)
        lines[first + 1 : end] = [None] * (end - first - 1)
    for number in apart:
        if 0 < number < len(lines) and source[number - 1].strip():
            lines[number] = f"\n{lines[number]}"
    return "\n".join(line for line in lines if line is not None)


def language(code: str) -> str:
    """The language of a block without one, by its first line that is no comment, or YAML by the whole."""
    said = re.sub(r"\A(?:#.*\n|\n)*", "", code)
    for name, pattern in LANGUAGES.items():
        if pattern.match(said):
            return name
    try:
        return "yaml" if isinstance(yaml.safe_load(code), dict) else "text"
    except yaml.YAMLError:  # a message of a program: `nystrom: error: ...`
        return "text"


def differences(text: str, html: str) -> dict[str, tuple[int, int]]:
    """How many elements GitHub makes of a page and the site has, where they differ."""
    plain = re.sub(FORMULA, "formula", text)
    there = Counter(COUNTED.findall(GITHUB.render(plain)))
    there["pre"] -= len(re.findall(r"^\s*```math", text, re.MULTILINE))
    here = Counter(COUNTED.findall(html))
    return {tag: (there[tag], here[tag]) for tag in sorted(there | here) if there[tag] != here[tag]}


def display(source: str, *_: Any, **__: Any) -> str:
    """A block named ``math``, as a formatter of fences."""
    return f'<div class="math">{convert(source, display="block")}</div>'


class _Formula(InlineProcessor):
    """``$x_1$``."""

    def handleMatch(self, m: re.Match[str], data: str) -> tuple[str, int, int]:
        return self.md.htmlStash.store(convert(m[1])), m.start(0), m.end(0)


class _Links(Treeprocessor):
    """Links and pictures of the repository become those of the site. MkDocs then checks them."""

    def __init__(self, md: Markdown, page: str) -> None:
        super().__init__(md)
        self.page = page

    def run(self, root: ElementTree.Element) -> None:
        for element in root.iter():
            key = {"a": "href", "img": "src"}.get(element.tag)
            url = element.get(key) if key else None
            if key and url:
                element.set(key, relinked(url, self.page))


class GitHub(Extension):
    """The extension; ``page`` is the name on the site of the page that is read next."""

    page = ""

    def extendMarkdown(self, md: Markdown) -> None:
        # After code (190), before escapes (180), which would take the backslashes.
        md.inlinePatterns.register(_Formula(FORMULA, md), "formula", 185)
        # After inline text (20), before MkDocs's own (0).
        md.treeprocessors.register(_Links(md, self.page), "repository-links", 1)
