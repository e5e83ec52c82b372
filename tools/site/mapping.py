"""Where the files of the repository are on the site, and the links between them.

Pages link each other as they do on GitHub: ``docs/data.md`` from README.md, ``../README.md`` and ``../launch/plan.py``
from a page. On the site README.md is the home page. A source file or a folder that a page links has a page below
``source/``.
"""

from __future__ import annotations

import ast
import posixpath
import re
from pathlib import Path
from urllib.parse import quote, urlsplit

REPOSITORY = Path(__file__).resolve().parents[2]
TOP_PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Pages outside docs/, and their names on the site."""
SOURCES = "source"
"""The folder of the site with pages of source files."""
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".json": "json", ".toml": "toml", ".sh": "bash"}
HIGHLIGHTED = 60_000
"""Bytes. Larger files (results of benchmarks in JSON) are shown without colours: each colour is an element of HTML."""


def origin(page: str) -> str | None:
    """The file in the repository of a page of the site; none for pages that are made, such as those of source files."""
    if page.startswith(f"{SOURCES}/"):
        return None
    return next((file for file, name in TOP_PAGES.items() if name == page), f"docs/{page}")


def place(path: str, repository: Path = REPOSITORY) -> str | None:
    """The name on the site of a file or folder of the repository; none if it is not there."""
    if path in TOP_PAGES:
        return TOP_PAGES[path]
    if path.startswith("../") or not (repository / path).exists():
        return None
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"{SOURCES}/{path}/index.md" if (repository / path).is_dir() else f"{SOURCES}/{path}.md"


def target(url: str, file: str) -> str | None:
    """The path in the repository that a relative link in ``file`` leads to; none for other links."""
    parts = urlsplit(url)
    if parts.scheme or parts.netloc or not parts.path or parts.path.startswith("/"):
        return None
    return posixpath.normpath(posixpath.join(posixpath.dirname(file), parts.path))


def relinked(url: str, page: str, repository: Path = REPOSITORY) -> str:
    """A link as the page of the site needs it. One that leads nowhere stays, for MkDocs to complain about."""
    file = origin(page)
    path = target(url, file) if file else None
    there = place(path, repository) if path else None
    if there is None:
        return url
    anchor = urlsplit(url).fragment
    return quote(posixpath.relpath(there, posixpath.dirname(page) or ".")) + (f"#{anchor}" if anchor else "")


def linked_sources(file: str, text: str, repository: Path = REPOSITORY) -> set[str]:
    """The source files and folders that a page links, by path in the repository."""
    paths = {target(url, file) for url in re.findall(r"\]\(([^)\s]+)\)", text)}
    return {path for path in paths if path and (place(path, repository) or "").startswith(f"{SOURCES}/")}


def with_contents(paths: set[str], repository: Path = REPOSITORY) -> set[str]:
    """The same and the files in those folders, which their pages list."""
    return paths | {name for path in paths for name in contents(path, repository) if not (repository / name).is_dir()}


def contents(folder: str, repository: Path = REPOSITORY) -> list[str]:
    """What is in a folder, folders first, without caches, hidden and empty files; of a file nothing."""
    if not (repository / folder).is_dir():
        return []
    found = [
        path
        for path in (repository / folder).iterdir()
        if not path.name.startswith((".", "__pycache__"))
        and (any(path.glob("[!_.]*")) if path.is_dir() else path.suffix in LANGUAGES and path.stat().st_size)
    ]
    return [path.relative_to(repository).as_posix() for path in sorted(found, key=lambda path: (path.is_file(), path))]


def summary(path: Path) -> str:
    """The first sentence of what a file or a folder says about itself."""
    if path.is_dir():
        inside = path / "__init__.py"
        return summary(inside) if inside.exists() else ""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        said = ast.get_docstring(ast.parse(text)) or ""
    elif path.suffix in (".yaml", ".yml", ".sh"):
        comments = re.match(r"(?:#!.*\n)?((?:#.*\n)*)", text)
        said = re.sub(r"^# ?", "", comments[1], flags=re.MULTILINE) if comments else ""
    else:
        return ""
    sentence = re.split(r"(?<=[.])(?<!et al\.)\s|\n\s*\n", said.strip(), maxsplit=1)[0]
    return " ".join(sentence.split()).replace("``", "`").replace("|", "\\|").replace("<", "&lt;").rstrip(".:")


def source_page(path: str, present: set[str], repository: Path = REPOSITORY) -> str:
    """The Markdown of the page of a source file or folder. The search leaves it out: the pages are what is searched."""
    head = "---\nsearch:\n  exclude: true\nhide:\n  - toc\n---\n\n"
    folder = posixpath.dirname(path)
    link = posixpath.relpath(f"{SOURCES}/{folder}/index.md", posixpath.dirname(place(path, repository) or ""))
    above = f"In [`{folder}/`]({link})\n\n" if folder in present else ""
    if (repository / path).is_dir():
        rows = [
            f"| {_name(name, path, present, repository)} | {summary(repository / name)} |"
            for name in contents(path, repository)
        ]
        return head + f"# `{path}/`\n\n" + above + "\n".join(["| | what it is |", "|---|---|", *rows]) + "\n"
    text = (repository / path).read_text(encoding="utf-8", errors="replace")
    fence = "~" * max(3, *(len(run) + 1 for run in re.findall(r"~+", text)), 3)
    language = LANGUAGES.get(Path(path).suffix, "text") if len(text) <= HIGHLIGHTED else "text"
    return head + f"# `{path}`\n\n{above}{fence}{language}\n{text.rstrip()}\n{fence}\n"


def _name(name: str, folder: str, present: set[str], repository: Path) -> str:
    shown = posixpath.basename(name) + ("/" if (repository / name).is_dir() else "")
    there = place(name, repository)
    if name not in present or there is None:
        return f"`{shown}`"
    return f"[`{shown}`]({posixpath.relpath(there, f'{SOURCES}/{folder}')})"
