"""Puts files into the pages that show them whole: ``python -m tools.quote``.

A page marks the place with ``<!-- file: PATH -->`` and a block of code below it. The block is replaced by the file, so
that what a page shows is what the tests run.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
MARKED = re.compile(r"(<!-- file: (\S+) -->\n)```python\n.*?^```$", re.DOTALL | re.MULTILINE)


def quoted(page: str, root: Path = CHECKOUT) -> str:
    """The page with every marked block as the file is now. Raises ``OSError`` for a file that is not there."""

    def block(found: re.Match[str]) -> str:
        return f"{found[1]}```python\n{(root / found[2]).read_text(encoding='utf-8').rstrip()}\n```"

    return MARKED.sub(block, page)


def main(argv: Sequence[str] | None = None) -> None:
    """Rewrite the pages of ``docs/`` whose blocks are not the files any more."""
    argparse.ArgumentParser(prog="tools.quote", description="Put the files into docs/*.md that these show.").parse_args(
        argv
    )
    for path in sorted((CHECKOUT / "docs").glob("*.md")):
        before = path.read_text(encoding="utf-8")
        after = quoted(before)
        if after != before:
            path.write_text(after, encoding="utf-8")
            print(f"{path.relative_to(CHECKOUT)} brought up to date")


if __name__ == "__main__":
    main()
