"""Each block of commands or Python in the pages says what runs it, or why nothing does."""

from __future__ import annotations

import ast
import functools

import pytest
from pages_case import PAGES, REPOSITORY, read_page, to_mark


@functools.cache
def names_in(file: str) -> set[str]:
    """The tests of a module, which is not imported."""
    path = REPOSITORY / file
    if not path.is_file():
        return set()
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def faults(page: str, text: str | None = None) -> list[str]:
    """What is missing or wrong, each with its place."""
    found = read_page(page, text).faults
    for block in to_mark(page, text):
        told = [block.code] if block.language == "python" else [command.text for command in block.commands()]
        found += [f"{block.place}: no marker for: {one.splitlines()[0]}" for one in told if block.marker(one) is None]
        for marker in block.markers:
            if marker.only is not None and not any(marker.only in one for one in told):
                found.append(f"{block.place}: no command holds `{marker.only}`")
            if not marker.run and not marker.told:
                found.append(f"{block.place}: not run, and no reason")
            for name in marker.tests:
                file, _, test = name.partition("::")
                if test not in names_in(file):
                    found.append(f"{block.place}: no test {name}")
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_what_runs_it(page: str) -> None:
    found = faults(page)
    assert not found, "\n".join([*found, "tests/pages_case.py says how a block is marked"])


MARKED = """# Page

<!-- run -->

    nystrom plan --config a.yaml \\
        --gpus 1    # a comment
    nystrom: error: no

<!-- run -->
<!-- not run `--gpus 8`: needs GPUs -->
<!-- run `sort`: tests/test_page_markers.py::test_what_is_no_marker_is_told -->

    $ nystrom plan --gpus 8
    nystrom plan: error: no
    $ sort x
    $ for i in 0 1; do
    $   echo $i
    $ done

    callbacks: []

<!-- run -->
```python
import json
```

Text.

    from pathlib import Path
"""


def test_blocks_and_their_markers_are_found() -> None:
    first, second, third, last = to_mark("p.md", MARKED)
    assert [(command.text, command.status) for command in first.commands()] == [
        ("nystrom plan --config a.yaml --gpus 1", 2)
    ]
    texts = [command.text for command in second.commands()]
    assert texts == ["nystrom plan --gpus 8", "sort x", "for i in 0 1; do\n  echo $i\ndone"]
    kinds = [marker.kind for marker in map(second.marker, texts) if marker is not None]
    assert kinds == ["not run", "test", "run"]
    assert (third.language, third.code, last.language) == ("python", "import json\n", "python")
    assert faults("p.md", MARKED) == ["p.md:29: no marker for: from pathlib import Path"]
    assert faults("p.md", "<!-- all: not run: of another program -->\n" + MARKED) == []


@pytest.mark.parametrize(
    ("marker", "told"),
    [
        ("", "no marker for: make x"),
        ("<!-- not run -->", "not run, and no reason"),
        ("<!-- runs -->", "no marker for: make x"),
        ("<!-- run by hand -->", "no marker: run by hand"),
        ("<!-- run: tests/test_page_markers.py::test_nothing -->", "no test tests/test_page_markers.py::test_nothing"),
        ("<!-- run: tests/nothing.py::test_x -->", "no test tests/nothing.py::test_x"),
        ("<!-- run `sort` -->\n\n<!-- run -->", "no command holds `sort`"),
        ("<!-- run -->\n\nText.", "before no block (or a blank line is missing)"),
    ],
)
def test_what_is_no_marker_is_told(marker: str, told: str) -> None:
    assert any(fault.endswith(told) for fault in faults("p.md", f"{marker}\n\n    make x\n"))


def test_an_indented_block_stays_one_only_behind_a_blank_line() -> None:
    (fault,) = faults("p.md", "Text.\n\n<!-- run -->\n    make x\n")
    assert fault.startswith("p.md:4: the marker above stands before no block")
