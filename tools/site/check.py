"""Checks a built site: every link leads to a file and an anchor, and nothing is loaded from the network.

``python -m tools.site.check site`` ends with status 1 and a line for each fault. MkDocs checks the links of Markdown
itself. This also sees navigation, raw HTML, pictures, styles and scripts as they came out.
"""

from __future__ import annotations

import argparse
import posixpath
import re
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src", "object": "data"}
"""What a browser loads by itself. ``a`` is followed on request and may lead out."""


class Document(HTMLParser):
    """The links, what is loaded, and the anchors of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.loaded: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Notes one element."""
        of = {name: value or "" for name, value in attrs}
        self.anchors |= {of[name] for name in ("id", "name") if of.get(name)}
        if tag == "a" and of.get("href"):
            self.links.add(of["href"])
        elif of.get(LOADED.get(tag, "")):
            self.loaded.add(of[LOADED[tag]])


def faults(site: Path) -> list[str]:
    """What is wrong with the site, a line each."""
    documents = {
        path.relative_to(site).as_posix(): Document(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")
    }
    found = [] if "index.html" in documents else [f"{site}: no index.html"]
    for name, document in sorted(documents.items()):
        for url in sorted(document.loaded | document.links):
            parts = urlsplit(url)
            if parts.scheme == "data":
                continue
            if parts.scheme or parts.netloc:
                if url in document.loaded:
                    found.append(f"{name}: loads {url} from the network")
                continue
            # 404.html alone has links from the root of the site: it is served at any depth.
            base = "" if parts.path.startswith("/") else posixpath.dirname(name)
            path = posixpath.normpath(posixpath.join(base, unquote(parts.path).lstrip("/"))) if parts.path else name
            if path.startswith("../") or not (site / path).exists():
                found.append(f"{name}: {url} leads to no file")
            elif (site / path).is_dir() and not (site / path / "index.html").exists():
                found.append(f"{name}: {url} is a folder without index.html")
            elif parts.fragment and path in documents and unquote(parts.fragment) not in documents[path].anchors:
                found.append(f"{name}: {url} leads to no anchor of {path}")
    for style in sorted(site.rglob("*.css")):
        text = re.sub(r"/\*.*?\*/", "", style.read_text(encoding="utf-8"), flags=re.DOTALL)
        for url in re.findall(r"(?:url\(|@import\s+)[\"']?((?:https?:)?//[^\"')\s]+)", text):
            found.append(f"{style.relative_to(site).as_posix()}: loads {url} from the network")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """The command; the exit status is 1 where there are faults."""
    parser = argparse.ArgumentParser(prog="python -m tools.site.check", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("site", type=Path, help="folder of the built site")
    site = parser.parse_args(argv).site
    found = faults(site)
    print(
        "\n".join(found) or f"{site}: {len(list(site.rglob('*.html')))} pages, every link leads somewhere",
        file=sys.stderr,
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
