"""matplotlib's pictures as elements of an HTML page."""

from __future__ import annotations

import re
from collections.abc import Mapping

from markupsafe import Markup, escape


def embed(svg: str, title: str, variables: Mapping[str, str]) -> Markup:
    """matplotlib's SVG file as an element of a page: no prolog or metadata, own ids, the page's colours and font.

    ``variables``: colours in the file -> the page's CSS variables, so that a picture follows light and dark. ``title``
    is what a screen reader says, and tells this picture's ids from those of others on the page.
    """
    prefix = re.sub(r"\W+", "-", title.lower())
    opening, rest = svg[svg.index("<svg") :].split(">", 1)
    opening = re.sub(r'\s(?:xmlns(?::\w+)?|width|height|version)="[^"]*"', "", opening)
    svg = re.sub(r"<metadata>.*?</metadata>", "", f"{opening}>{rest}", flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'href="#', f'href="#{prefix}-', svg).replace("url(#", f"url(#{prefix}-")
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    # The figure's and the axes' own white background.
    svg = re.sub(r'(<g id="[^"]*patch_[12]">\s*<path d="[^"]*" style=")fill: #ffffff', r"\1fill: none", svg)
    for sentinel, variable in variables.items():
        svg = svg.replace(sentinel, f"var({variable})")
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1))
