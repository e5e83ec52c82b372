"""The documentation as a site: links, lists, code and formulas come out as on GitHub, and faults are found."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

markdown = pytest.importorskip("markdown", reason="the site's packages are in the extra `docs`")
pytest.importorskip("latex2mathml", reason="the site's packages are in the extra `docs`")

from tools.site import check, mapping, reading  # noqa: E402 after the packages are known to be there


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """README.md, a page, a tutorial, and a package of two files."""
    for name, text in {
        "README.md": "[data](docs/data.md#speed), [code](pack/), [out](https://x.org/a.md)",
        "docs/data.md": "[home](../README.md#top), [code](../pack/one.py), [gone](../pack/three.py), [own](#speed)",
        "docs/tutorials/first.md": "[code](../../pack/one.py), [data](../data.md)",
        "docs/data.svg": "<svg/>",
        "pack/__init__.py": '"""A package (Xiong et al. 2021). More."""\n',
        "pack/one.py": '"""Reads a | b: ``c``.\n\nMore.\n"""\nFENCE = "~~~~"\n',
        "pack/two.yaml": "# Two lines\n# of it. More.\nkey: 1\n",
        "pack/empty.py": "",
        "pack/.hidden.py": "x = 1\n",
        "pack/inner/deep.py": "x = 1\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("url", "page", "expected"),
    [
        ("docs/data.md#speed", "index.md", "data.md#speed"),
        ("docs/data.svg", "index.md", "data.svg"),
        ("pack/", "index.md", "source/pack/index.md"),
        ("https://x.org/a.md", "index.md", "https://x.org/a.md"),
        ("#speed", "data.md", "#speed"),
        ("../README.md#top", "data.md", "index.md#top"),
        ("../pack/one.py", "data.md", "source/pack/one.py.md"),
        ("../../pack/one.py", "tutorials/first.md", "../source/pack/one.py.md"),
        ("../data.md", "tutorials/first.md", "../data.md"),
        ("../pack/three.py", "data.md", "../pack/three.py"),  # nothing there: left for MkDocs, which ends the build
        ("../../outside.py", "data.md", "../../outside.py"),
        ("two.yaml.md", "source/pack/index.md", "two.yaml.md"),  # made for the site already
    ],
)
def test_links_are_those_of_the_site(url: str, page: str, expected: str, repository: Path) -> None:
    assert mapping.relinked(url, page, repository) == expected


def test_linked_sources_have_pages(repository: Path) -> None:
    read = (repository / "docs/data.md").read_text(encoding="utf-8")
    assert mapping.linked_sources("docs/data.md", read, repository) == {"pack/one.py"}
    read = (repository / "README.md").read_text(encoding="utf-8")
    linked = mapping.linked_sources("README.md", read, repository)
    assert linked == {"pack"}
    present = mapping.with_contents(linked, repository)
    assert present == {"pack", "pack/__init__.py", "pack/one.py", "pack/two.yaml"}
    page = mapping.source_page("pack", present, repository)
    assert "| `inner/` |  |" in page  # no page links it
    assert "| [`__init__.py`](__init__.py.md) | A package (Xiong et al. 2021) |" in page
    assert "| [`one.py`](one.py.md) | Reads a \\| b: `c` |" in page
    assert "| [`two.yaml`](two.yaml.md) | Two lines of it |" in page
    page = mapping.source_page("pack/one.py", present, repository)
    assert "In [`pack/`](index.md)" in page
    assert '~~~~~python\n"""Reads' in page  # a fence longer than any in the file
    assert page.startswith("---\nsearch:\n  exclude: true\n")


def test_every_page_is_in_the_navigation() -> None:
    text = (mapping.REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8")
    listed = re.findall(r": (\S+\.md)$", text[text.index("\nnav:") : text.index("\nnot_in_nav")], re.MULTILINE)
    docs = mapping.REPOSITORY / "docs"
    pages = [path.relative_to(docs).as_posix() for path in docs.rglob("*.md")] + list(mapping.TOP_PAGES.values())
    assert sorted(listed) == sorted(pages)


PAGE = """\
Commands:

    # a comment
    nystrom data verify shards

    nystrom eval list

- An item
  that continues with
  128. That is no item.

  A paragraph of it:

      $ pytest
      ```
  - a nested item
    1. and one more

       ```python
       x = 1
       ```
- The last
A list at once:
1. one
2. two

A table at once:
| a | b |
|---|---|
| 1 | 2 |

```math
A^\\top
```
"""


def site_html(text: str) -> str:
    """What the site makes of the text of a page."""
    extension = reading.GitHub()
    extension.page = "data.md"
    fence = {"name": "math", "class": "math", "format": reading.display}
    return markdown.markdown(
        reading.fenced(text),
        extensions=["tables", "sane_lists", "pymdownx.highlight", "pymdownx.superfences", extension],
        extension_configs={"pymdownx.superfences": {"custom_fences": [fence]}},
    )


def test_lists_and_code_are_read_as_on_github() -> None:
    plain = reading.fenced(PAGE)
    assert "```bash\n# a comment\nnystrom data verify shards\n\nnystrom eval list\n```\n" in plain
    assert "\n    ````console\n    $ pytest\n    ```\n    ````\n" in plain
    assert "\n    - a nested item\n\n        1. and one more\n" in plain
    assert "\n            ```python\n            x = 1\n" in plain
    assert reading.differences(PAGE, site_html(PAGE)) == {}
    text = "No lists and no code, but `code` and **more**.\n\n| a | b |\n|---|---|\n| 1 | 2 |"
    assert reading.fenced(text) == text


def test_a_page_read_otherwise_is_found() -> None:
    text = "A paragraph\n- and a list without a line between\n- of two"
    assert reading.differences(text, site_html(text)) == {}
    assert reading.differences(text, markdown.markdown(text)) == {"li": (2, 0), "ul": (1, 0)}


@pytest.mark.parametrize(
    ("code", "language"),
    [
        ("nystrom plan --config x", "bash"),
        ("# why\n\nRANK=0 LOCAL_RANK=0 python -m pretrain", "bash"),
        (".venv/bin/python -m x", "bash"),
        ("$ nystrom demo\noutput", "console"),
        ("from pathlib import Path\n", "python"),
        ("# x.yaml\ntask: classify\n", "yaml"),
        ("curriculum:\n  - {}\n", "yaml"),
        ("pretrain/   the loop", "text"),
        ("nystrom: error: no shards", "text"),
        ("# x\ntask: classify\n$ nystrom eval", "text"),
    ],
)
def test_the_language_of_a_block_is_told(code: str, language: str) -> None:
    assert reading.language(code) == language


def test_formulas_are_mathml() -> None:
    html = site_html("Of $\\tilde q_j$ and `$code$`, $HOME and 5 $x and \\$6.\n\n```math\nA^\\top\n```\n")
    assert html.count("<math") == 2
    assert "<mi>q</mi>" in html
    assert "<code>$code$</code>, $HOME and 5 $x and " in html
    assert '<div class="math"><math xmlns="http://www.w3.org/1998/Math/MathML" display="block">' in html
    assert "&#x022A4;" in html


def test_links_in_code_stay() -> None:
    html = site_html("[a](../README.md#top) and `[b](../README.md)`")
    assert html == '<p><a href="index.md#top">a</a> and <code>[b](../README.md)</code></p>'


def test_faults_of_a_site_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sub").mkdir()
    page = '<h1 id="top">A</h1><a href="sub/b.html#x y">b</a><a href="https://x.org">out</a><img src="p.svg">'
    (tmp_path / "index.html").write_text(page, encoding="utf-8")
    (tmp_path / "p.svg").write_text("<svg/>", encoding="utf-8")
    (tmp_path / "a.css").write_text("/* url(https://x.org) */ a { background: url(p.svg) }", encoding="utf-8")
    (tmp_path / "sub/b.html").write_text(
        '<p id="x y"><a href="../index.html#top">up</a><a href="..">', encoding="utf-8"
    )
    assert check.faults(tmp_path) == []
    assert check.main([str(tmp_path)]) == 0
    wrong = '<a href="#gone"></a><a href="../c.html"></a><a href="."></a><a href="../../d"></a><script src="https://cdn/x.js">'
    (tmp_path / "sub/b.html").write_text(wrong, encoding="utf-8")
    (tmp_path / "a.css").write_text("@import '//fonts/x'; b { src: url(\"https://f/y\") }", encoding="utf-8")
    assert check.faults(tmp_path) == [
        "index.html: sub/b.html#x y leads to no anchor of sub/b.html",
        "sub/b.html: #gone leads to no anchor of sub/b.html",
        "sub/b.html: . is a folder without index.html",
        "sub/b.html: ../../d leads to no file",
        "sub/b.html: ../c.html leads to no file",
        "sub/b.html: loads https://cdn/x.js from the network",
        "a.css: loads //fonts/x from the network",
        "a.css: loads https://f/y from the network",
    ]
    assert check.main([str(tmp_path)]) == 1
    assert "loads https://cdn/x.js from the network" in capsys.readouterr().err
    assert check.faults(tmp_path / "sub") != []
