"""Small tables of HTML, by which a notebook shows an object (``_repr_html_``). Every text in them is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

_LEFT = ' style="text-align: left"'


def html_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows under named columns; notebooks have styles for such tables."""
    header = "".join(f"<th{_LEFT}>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td{_LEFT}>{html_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table>"


def html_facts(title: str, facts: Iterable[tuple[str, object]]) -> str:
    """Names and values, one a line, under a title; what is None is left out, whole numbers get commas."""
    rows = "".join(
        f"<tr><th{_LEFT}>{escape(name)}</th><td{_LEFT}>"
        + html_text(f"{value:,}" if type(value) is int else str(value))
        + "</td></tr>"
        for name, value in facts
        if value is not None
    )
    return f"<b>{escape(title)}</b><table><tbody>{rows}</tbody></table>"


def html_text(text: str) -> str:
    """Text for HTML, its line ends kept."""
    return escape(text).replace("\n", "<br>")
