"""The page: whole in itself, says what the JSON says, escapes what users wrote, and stays small."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from report_material import NASTY_NAMES, RUN, judge, make_samples, reading

from dfadc.reporting.charts import panels_of
from dfadc.reporting.disagreements import MAX_CLASSES, describe_disagreements
from dfadc.reporting.html import render_html
from dfadc.reporting.rows import speed_conditions
from dfadc.verification.summary import reason_lines, source_rows

if TYPE_CHECKING:
    from dfadc.verification.report import Report
    from dfadc.verification.samples import SampleSet

BENCH = {
    "machine": "a machine",
    "threads": 1,
    "batch": 4,
    "networks": {
        "student.onnx": {
            "latency_ms": 1.25,
            "latency_p95_ms": 1.5,
            "throughput": 4000.0,
            "device": "CPU",
            "speedup": 3.5,
        },
        "student.rtx.engine": {"not_run": "no GPU"},
    },
}
BASELINE = {
    "run": "<i>before</i>",
    "teacher_sha256": "cd" * 32,
    "gated_sources": ["generator"],
    "data": None,
    "max_drop": 0.01,
    "samples": {"n": 500, "sha256": "ef" * 32, "sources": {"generator": 500}},
    "significance": 0.05,
    "missing": ["student.gone.onnx"],
    "new": [],
    "networks": {
        "student": {
            "agreement": {
                "gated": {"n": 500, "before": 0.9, "after": 0.8, "drop": 0.1, "lost": 60, "gained": 10, "p_value": 1e-9}
            },
            "accuracy": None,
        }
    },
}
VOID = {"meta", "img", "br", "hr", "input", "link"}


class Page(HTMLParser):
    """What a browser would make of the page, as far as the tests ask."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.identifiers: list[str] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        self.identifiers += filter(None, [attributes.get("id")])
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def complete(samples: SampleSet, **parts: Any) -> Report:
    report = judge(samples, RUN)
    return {**report, "disagreements": describe_disagreements(samples, report["gate"]["source"]), **parts}


def curves(count: int) -> dict[str, Any]:
    return {
        "readings": count,
        "last": {"step": count, "student_loss": None},
        "notes": ["step 7: <b>x</b>"],
        "num_notes": 9,
    }


@pytest.fixture(scope="module")
def samples() -> SampleSet:
    return make_samples()


@pytest.fixture(scope="module")
def report(samples: SampleSet) -> Report:
    return complete(samples, bench=BENCH, baseline=BASELINE, curves=curves(20))


@pytest.fixture(scope="module")
def html(report: Report, samples: SampleSet) -> str:
    return render_html(report, samples=samples, panels=panels_of([reading(step) for step in range(1, 21)]))


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_the_page_is_whole_in_itself(html: str, page: Page) -> None:
    assert html.startswith("<!doctype html>")
    assert {name for name, _ in page.tags} & {"script", "link", "iframe", "object", "base"} == set()
    sources = [
        value
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name in {"src", "href", "xlink:href"}
    ]
    assert sources
    assert all(value and value.startswith(("data:image/png;base64,", "#")) for value in sources)
    assert "default-src 'none'" in str(page.all("meta"))
    assert not re.search(r"url\((?!#)|@import|https?://", re.sub(r'xmlns(:xlink)?="[^"]*"', "", html))


def test_links_lead_somewhere_and_identifiers_are_unique(page: Page) -> None:
    assert len(page.identifiers) == len(set(page.identifiers))
    targets = [str(link["href"])[1:] for link in page.all("a")]
    assert targets
    assert set(targets) <= set(page.identifiers)
    labels = [attributes["aria-labelledby"] for attributes in page.all("section")]
    assert set(labels) <= set(page.identifiers)


def test_what_the_json_says_is_there_to_read(report: Report, page: Page) -> None:
    text = page.text
    assert report["verdict"] in text
    for reason in reason_lines(report):
        assert reason in text
    for row in source_rows(report):
        for cell in row:
            assert all(part in text for part in cell.split(" ["))
    for check in report["student"]["checks"]:
        assert check["message"] in text
    said = ("small, distilled from large", "25.0% of the teacher's", "1.25 ms", speed_conditions(report))
    compared = ("<i>before</i>", "student.gone.onnx", "1e-09")
    made = (str(RUN["command"]), "ab" * 32, "opset 18", "student.steps = 2")
    assert [words for words in (*said, *compared, *made) if words not in text] == []
    assert "The first 1 of 9" in text


def test_only_what_was_timed_has_a_latency(report: Report, samples: SampleSet, page: Page) -> None:
    assert page.text.count("1.25 ms") == 2, "in the summary, and in the table of speeds"
    without = Page(render_html({**report, "bench": None}, samples=samples, panels=()))
    assert "latency" not in without.text


def test_names_are_text_and_never_markup(html: str, page: Page) -> None:
    assert "<script" not in html
    assert "<b>" not in html
    assert "<i>before" not in html
    assert not any("onload" in attributes for _, attributes in page.tags)
    for name in NASTY_NAMES:
        assert name in page.text


def test_every_picture_has_words_beside_it(page: Page) -> None:
    pictures = page.all("img")
    assert pictures
    assert all(
        re.fullmatch(r"generated sample \d+: teacher .+, student .+", picture["alt"] or "") for picture in pictures
    )
    figures = page.all("figure")
    assert len(figures) == 6
    assert all(figure["aria-label"] for figure in figures)


def test_a_verdict_is_a_word_and_a_sign_and_not_a_colour_alone(html: str) -> None:
    badges = re.findall(r'<span class="verdict (\w+)"><span aria-hidden="true">(.)</span> ([A-Z ]+)</span>', html)
    assert set(badges) >= {("fail", "✗", "FAIL"), ("absent", "–", "NOT RUN")}
    signs = {word: sign for _, sign, word in badges}
    assert len(set(signs.values())) == len(signs)


def test_bars_have_numbers_and_too_few_is_said(html: str, report: Report) -> None:
    entries = report["student"]["comparisons"]["B"]["generator"]["per_class"]
    entry = entries[3]
    assert f"--rate:{100 * entry['agreement']:.2f}%;--low:{100 * entry['low']:.2f}%" in html
    assert f"{entry['agreement']:.1%}" in html
    assert {entry["too_few"] for entry in entries} == {True, False}
    assert html.count('class="track few"') == sum(entry["too_few"] for entry in entries)
    few = make_samples(counts=(60, 0, 0, 0))
    assert render_html(complete(few), samples=few, panels=()).count('<span class="tag">too few</span>') == 6


def test_tables_scroll_inside_their_own_box(html: str) -> None:
    tables = html.count("<table")
    assert tables > 5
    assert len(re.findall(r'<div class="scroll"[^>]*>\s*<table', html)) == tables


def test_many_classes_stay_few_on_the_page() -> None:
    names = tuple(f"synset {number}, a rather long name" for number in range(1000))
    samples = make_samples(num_classes=1000, shape=(3, 224, 224), counts=(60, 10, 10, 10), names=names)
    html = render_html(complete(samples), samples=samples, panels=())
    assert html.count('<td class="same"') == MAX_CLASSES
    assert html.count('class="tiles"') == MAX_CLASSES
    assert html.count("The 20 of 1000 classes with most disagreements.") == 3
    assert "another class" in html
    assert len(html) < 3_000_000


def test_images_without_known_pixels_are_stretched_and_that_is_said() -> None:
    samples = make_samples(pixels=False)
    html = render_html(complete(samples), samples=samples, panels=())
    assert html.count("each image is stretched from its lowest to its highest value") == 2


def test_an_answer_that_is_no_number_is_no_class() -> None:
    samples = make_samples(counts=(40, 0, 0, 0))
    broken = replace(samples, student_logits=np.full_like(samples.student_logits, np.nan))
    page = Page(render_html(complete(broken), samples=broken, panels=()))
    assert page.all("img")
    assert all(str(picture["alt"]).endswith("student not finite") for picture in page.all("img"))
    assert all(picture["class"] == "differs" for picture in page.all("img"))


@pytest.mark.parametrize("counts", [(0, 0, 0, 0), (0, 50, 0, 0)], ids=["no samples", "none of the gate's source"])
def test_a_set_without_samples_is_a_page_too(counts: tuple[int, ...]) -> None:
    samples = make_samples(counts=counts)
    page = Page(render_html(complete(samples), samples=samples, panels=()))
    assert "no samples" in page.text
    assert bool(page.all("img")) == any(counts)


def test_a_bare_report_is_a_page_too(samples: SampleSet) -> None:
    """As an older dfadc wrote it, from a folder with nothing else left."""
    old = judge(samples)
    for key in ("baseline", "notes"):
        old.pop(key, None)
    page = Page(render_html(old, samples=None, panels=()))
    assert old["verdict"] in page.text
    assert page.all("img") == []


def test_the_same_folder_gives_the_same_page(report: Report, samples: SampleSet, html: str) -> None:
    panels = panels_of([reading(step) for step in range(1, 21)])
    assert render_html(report, samples=samples, panels=panels) == html


def test_nothing_is_imported_before_a_page_is_drawn() -> None:
    """A device kit carries report.py, and `dfadc --help` every command: neither draws."""
    program = "import sys\nsys.modules.update(dict.fromkeys(('matplotlib', 'jinja2', 'PIL')))\n"
    program += "import dfadc.verification.report, dfadc.pipeline.report, dfadc.cli.report, dfadc.reporting.html"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr
