"""The page in a real browser: no sideways scrolling on a phone or a desk, no complaint, no request."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from report_material import RUN, judge, make_samples, reading

from dfadc.reporting.charts import panels_of
from dfadc.reporting.disagreements import describe_disagreements
from dfadc.reporting.html import render_html

if TYPE_CHECKING:
    from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
#: A page is looked at by itself: no first-run pages, no calls home.
OPTIONS = (
    *("--headless", "--disable-gpu", "--no-first-run", "--disable-quic", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-extensions", "--enable-logging=stderr"),
    # Where /dev/shm is small, as in many containers, a browser would die of it.
    "--disable-dev-shm-usage",
)
#: Written into a copy of the page.
MEASURE = """<script>
addEventListener("load", () => {
  const root = document.documentElement;
  const outside = [...document.querySelectorAll("body *")].filter(
    element => element.getBoundingClientRect().right > root.clientWidth + 1 && !element.closest(".scroll"));
  const requests = performance.getEntriesByType("resource").map(entry => entry.name);
  parent.postMessage(JSON.stringify({
    width: innerWidth, page: root.scrollWidth, outside: outside.map(element => element.outerHTML.slice(0, 80)),
    requests: requests.filter(name => !name.startsWith("data:")),
    images: document.images.length, broken: [...document.images].filter(image => !image.naturalWidth).length,
    scrolling: [...document.querySelectorAll(".scroll")].filter(box => box.scrollWidth > box.clientWidth).length,
  }), "*");
});
</script>"""
#: A headless window has a least width, a frame has none. What the copy found becomes the title.
FRAME = """<!doctype html><title></title><script>onmessage = event => { document.title = event.data; };</script>
<iframe src="PAGE" width="WIDTH" height="900" style="border: 0"></iframe>"""


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    return found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with long names, four sources and 20 of 30 classes: as wide as it gets."""
    names = tuple(f"class {number} of a rather long name that goes on and on" for number in range(30))
    samples = make_samples(num_classes=30, counts=(900, 60, 60, 60), names=names)
    report = judge(samples, {**RUN, "command": "dfadc distill " + "x" * 300})
    report["disagreements"] = describe_disagreements(samples, "generator")
    report["curves"] = {"readings": 9, "last": {}, "notes": [], "num_notes": 0}
    path = tmp_path_factory.mktemp("page") / "report.html"
    panels = panels_of([reading(step) for step in range(9)])
    path.write_text(render_html(report, samples=samples, panels=panels), encoding="utf-8")
    return path


def open_page(browser: str, page: Path) -> tuple[str, str]:
    """What the page became, and what the browser said about it."""
    sandbox = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    options = [*OPTIONS, *sandbox, f"--user-data-dir={page.parent / 'profile'}", "--window-size=1400,900"]
    done = subprocess.run(  # noqa: S603 -- the browser found above
        [browser, *options, "--virtual-time-budget=5000", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, done.stderr


def measure(browser: str, page: Path, width: int) -> dict[str, Any]:
    # The page forbids scripts; the copy must allow the one that measures.
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text(encoding="utf-8"))
    copy, frame = page.with_name("copy.html"), page.with_name("frame.html")
    copy.write_text(text.replace("</body>", f"{MEASURE}</body>"), encoding="utf-8")
    frame.write_text(FRAME.replace("PAGE", copy.name).replace("WIDTH", str(width)))
    dom, _ = open_page(browser, frame)
    title = re.search(r"<title>(.+?)</title>", dom, re.DOTALL)
    assert title is not None, dom[-500:]
    found: dict[str, Any] = json.loads(html.unescape(title.group(1)))
    return found


@pytest.mark.parametrize("width", [400, 1200])
def test_nothing_leaves_the_page_sideways(browser: str, page: Path, width: int) -> None:
    found = measure(browser, page, width)
    assert found["width"] == width
    assert found["page"] <= width
    assert found["outside"] == []
    assert found["images"] > 100
    assert found["broken"] == 0
    assert found["requests"] == []
    assert (found["scrolling"] > 5) == (width == 400), "wide tables are there, and scroll by themselves"


def test_the_browser_has_nothing_to_complain_about(browser: str, page: Path) -> None:
    """As it is, with its own rule that forbids scripts and every request."""
    dom, log = open_page(browser, page)
    assert "How it was made" in dom
    assert [line for line in log.splitlines() if "CONSOLE" in line] == []
