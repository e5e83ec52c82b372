"""What MkDocs calls while it builds the site: the pages outside docs/, those of source files, and reading.py.

See https://www.mkdocs.org/user-guide/configuration/#hooks.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from tools.site import mapping, reading

log = logging.getLogger("mkdocs.plugins.nystrom")  # a warning here ends a strict build
HERE = Path(__file__).resolve().parent
SHIPPED = {"assets/javascripts/iframe-worker.js": "iframe-worker.js", "assets/site.css": "site.css"}
_github = reading.GitHub()


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Adds the extension of Markdown and the formatter of formulas."""
    config.markdown_extensions.append(_github)  # Python-Markdown takes instances as well as names
    fences: dict[str, Any] = config.mdx_configs.setdefault("pymdownx.superfences", {})
    fences["custom_fences"] = [{"name": "math", "class": "math", "format": reading.display}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds README.md and its like, and a page for each source file that a page links."""
    for file, name in mapping.TOP_PAGES.items():
        files.append(File.generated(config, name, abs_src_path=str(mapping.REPOSITORY / file)))
    for name, file in SHIPPED.items():
        files.append(File.generated(config, name, abs_src_path=str(HERE / file)))
    linked: set[str] = set()
    for page in files.documentation_pages():
        linked |= mapping.linked_sources(mapping.origin(page.src_uri) or "", page.content_string)
    present = mapping.with_contents(linked)
    for path in sorted(present):
        there = mapping.place(path)
        assert there is not None, path
        files.append(File.generated(config, there, content=mapping.source_page(path, present)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Tells the extension the page, and makes blocks of code what Python-Markdown reads."""
    _github.page = page.file.src_uri
    return markdown if mapping.origin(page.file.src_uri) is None else reading.fenced(markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Complains about a page that GitHub reads otherwise."""
    file = mapping.origin(page.file.src_uri)
    if file is not None:
        text = (mapping.REPOSITORY / file).read_text(encoding="utf-8")
        for tag, (there, here) in reading.differences(text, html).items():
            log.warning(
                f"{file}: GitHub makes {there} <{tag}> of it, the site {here}: part of the page is read otherwise"
            )
    return html
