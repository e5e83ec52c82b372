"""The report in a browser: what is drawn, at a phone's width, light and dark; no request, no error, no overflow."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from report_case import EVIL, make_run, write, write_everything

from eval.report.cli import main
from eval.results.schema import Metric, ModelInfo, Outcome

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
    "--virtual-time-budget=3000", "--dump-dom",
]  # fmt: skip
# Refuses every load and says so on the console: with it an attempt is seen, whether or not there is a network.
POLICY = (
    '<meta http-equiv="Content-Security-Policy" '
    "content=\"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
)
PROBE = """<script>
addEventListener("load", () => {
  const root = document.documentElement, wide = () => root.scrollWidth
  const closed = wide()
  document.querySelectorAll("details").forEach(each => each.open = true)
  const box = each => each.getBoundingClientRect()
  const spilled = [...document.querySelectorAll("body *")]
    .filter(each => !each.parentElement.closest(".scroll") && box(each).right > innerWidth + 1)
    .map(each => each.outerHTML.slice(0, 90))
  parent.document.getElementById("probe").textContent = JSON.stringify({
    width: innerWidth, closed, opened: wide(), spilled,
    dark: matchMedia("(prefers-color-scheme: dark)").matches,
    paper: getComputedStyle(document.body).backgroundColor,
    cell: getComputedStyle(document.querySelector(".heat .high") || document.body).fill,
    requests: performance.getEntriesByType("resource").map(each => each.name),
    cells: document.querySelectorAll(".heat .high").length,
    scrolls: [...document.querySelectorAll(".scroll")].filter(each => each.scrollWidth > each.clientWidth).length,
    text: document.querySelector("main").innerText,
  })
})
</script>"""

# The page stands in a frame: a window of the browser cannot be made narrower than 500 px.
FRAME = """<!doctype html><html><head><meta name="color-scheme" content="light dark"><title>frame</title></head>
<body><iframe style="width:{width}px;height:900px;border:0" srcdoc="{page}"></iframe>
<pre id="probe"></pre></body></html>"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: the page is not tried in a browser"),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("browser")
    runs = [make_run(root, "one"), make_run(root, "two-" + "longer" * 12), make_run(root, "masked", "mlm")]
    write_everything(runs[0])
    write_everything(runs[1], shift=0.05, gate="forced")
    write_everything(runs[2], "mlm")
    outcome = Outcome({"accuracy": Metric(0.37, True, 0.01, 3)})
    write(root / "lra", "lra", outcome, suite="listops-nystrom", model=ModelInfo(), gate="none")
    (runs[2] / "eval" / "old.json").write_text('{"schema": 1}')
    main([*map(str, runs), str(root / "lra"), "--out", str(root / "report.html")])
    return (root / "report.html").read_text(encoding="utf-8")


def visit(page: str, folder: Path, *, width: int = 1200, dark: bool = False) -> tuple[dict[str, Any], list[str]]:
    """What the probe found on a copy of the page, and the lines of the browser's console."""
    assert CHROMIUM is not None
    probed = page.replace("<head>", "<head>" + POLICY, 1).replace("</body>", PROBE + "</body>")
    copy = folder / "frame.html"
    copy.write_text(FRAME.format(width=width, page=html.escape(probed)), encoding="utf-8")
    command = [
        CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--window-size=1300,1000",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}", copy.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None
    assert found[1], done.stderr[-2000:]
    return json.loads(html.unescape(found[1])), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 1200])
def test_page_in_the_browser(page: str, tmp_path: Path, width: int, dark: bool) -> None:
    found, console = visit(page, tmp_path, width=width, dark=dark)
    assert console == []
    assert found["requests"] == []
    assert found["width"] == width
    assert found["spilled"] == []
    assert max(found["closed"], found["opened"]) <= width
    if width == 400:
        assert found["scrolls"] > 0  # wide tables scroll inside their own box
    assert found["dark"] == dark
    assert found["paper"] == ("rgb(20, 24, 31)" if dark else "rgb(255, 255, 255)")
    assert found["cell"] == ("rgb(169, 214, 255)" if dark else "rgb(8, 64, 127)")
    assert found["cells"] == 3 * (24 + 144 + 1)
    for words in (
        "Scored all the same, by --force", "forced", "Held-out perplexity, per token", "[0.500, 0.700]", EVIL,
        "Loss by position", "Perplexity by context", "Share found", "20 keys in each cell.", "relative error",
        "House task", "listops-nystrom", "TF-IDF + logistic regression", "has schema 1", "what really follows",
        "continued by one.", "guessed", "setting: length", "model.objective",
    ):  # fmt: skip
        assert words in found["text"], words


def test_the_probe_sees_what_it_must_not_find(tmp_path: Path) -> None:
    faulty = (
        "<!doctype html><html><head></head><body><main><h1 style='width:900px'>wide</h1>"
        '<img src="http://127.0.0.1:9/x.png"></main><script>console.error("oh")</script></body></html>'
    )
    found, console = visit(faulty, tmp_path, width=400)
    assert found["closed"] > 400
    assert found["spilled"]
    assert any("oh" in line for line in console)
    assert any("Content Security Policy" in line for line in console)
