"""One self-contained HTML page about a shard folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_pipeline.report import base
from data_pipeline.report.picture import length_histogram
from data_pipeline.shards.summary import Lengths

FOLDER = Path(__file__).parent
TOP_SOURCES = 20


def render(contents: dict[str, Any], lengths: Lengths) -> str:
    """The whole page, from :func:`data_pipeline.report.contents.contents` and the lengths for the picture.

    It loads nothing from anywhere. All that comes from the data is escaped; only our own SVG goes in as it is. No time
    and no path: equal shards in folders of equal name give equal pages.
    """
    environment = base.environment(FOLDER)
    environment.filters["count"] = lambda value: f"{value:,}"
    environment.filters["percent"] = percent
    environment.filters["setting"] = setting
    return environment.get_template("page.html").render(
        **contents,
        picture=length_histogram(lengths),
        top_sources=contents["sources"][:TOP_SOURCES],
        style=base.style(FOLDER),
    )


def percent(share: float) -> str:
    """0.0153 as 1.53%; three significant digits."""
    if share == 0:
        return "0%"
    value = 100 * share
    return "<0.001%" if value < 0.001 else f"{value:.0f}%" if value >= 99.95 else f"{value:#.3g}%"


def setting(value: Any) -> str:
    """A setting of the manifest as text."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {setting(inner)}" for key, inner in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(setting, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return "none" if value is None else str(value)
