"""A report's page in a browser that is not there to be seen: drawn, dark, on a phone, on paper."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.report import report
from launcher.report.reading import DataFacts, read_run
from tests.support.browser import FOUND, Browser, browser
from tests.support.made_up_run import CHARTS, COUNTS, WORDS, make_up
from trainer.storage import open_storage

pytestmark = pytest.mark.skipif(FOUND is None, reason="no chromium: apt-get install chromium")

WIDE = "s3://a-bucket-with-quite-a-long-name/and/a/folder/below/it/that/has/a/name/of/its/own/part-00017.parquet"
STICKS_OUT = """
[...document.querySelectorAll("main *")].filter((one) => {
  if (one.closest("svg") || one.closest(".scroll, pre") !== null || !one.getClientRects().length) return false;
  return one.getBoundingClientRect().right > innerWidth + 0.5;
}).map((one) => one.tagName + "." + one.className)
"""
"""What is wider than the page, but for what scrolls by itself."""
ON_PAPER = """
addEventListener("beforeprint", () => {
  const widths = [...document.querySelectorAll(".main-svg")].map((svg) => svg.getBoundingClientRect().width);
  const ink = getComputedStyle(document.querySelector(".xtick text")).fill;
  window.printed = { widest: Math.max(...widths), ink };
});
"""
PAPER_PX = 8.27 * 96 - 2 * 0.4 * 96
"""Of A4, between the margins that Chromium prints with."""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two runs over each other."""
    folder = tmp_path_factory.mktemp("page")
    storage = open_storage(str(folder / "runs"))
    make_up(storage.child("first"))
    make_up(storage.child("second"), lr=3e-4, ended="interrupted")
    counts = (*COUNTS, ("train", WIDE, COUNTS[0][2]))
    first = replace(read_run(storage.child("first")), data=DataFacts(counts, WORDS))
    target = folder / "report.html"
    target.write_text(report([first, read_run(storage.child("second"))]), encoding="utf-8")
    return target


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(autouse=True)
def quiet(tab: Browser) -> Iterator[None]:
    yield
    assert tab.said == [], "no test may make the page complain"


def test_every_chart_is_drawn(tab: Browser, page: Path) -> None:
    tab.open(page)
    assert tab.ask("[...document.querySelectorAll('[data-chart]')].map((one) => one.dataset.chart)") == list(CHARTS)
    for chart in CHARTS:
        body = tab.ask(f"""document.querySelector('[data-chart="{chart}"]').innerHTML""")
        assert re.search(r'class="(trace|point)[^"]*"', body), chart
        assert re.search(r'<path[^>]* d="M', body), chart
    assert tab.ask(STICKS_OUT) == []


def test_it_is_dark_where_the_reader_is(tab: Browser, page: Path) -> None:
    look = """[document.body, document.querySelector(".xtick text"), document.querySelector(".note")].map(
        (one, i) => getComputedStyle(one)[["backgroundColor", "fill", "color"][i]])"""
    tab.open(page, dark=True)
    night = tab.ask(look)
    assert night == ["rgb(17, 24, 39)", "rgb(229, 231, 235)", "rgb(156, 163, 175)"]
    tab.media(dark=False)
    day = ["rgb(255, 255, 255)", "rgb(31, 41, 55)", "rgb(107, 114, 128)"]
    assert tab.ask(f"new Promise((go) => requestAnimationFrame(() => requestAnimationFrame(() => go({look}))))") == day


def test_a_phone_shows_it_without_scrolling_sideways(tab: Browser, page: Path) -> None:
    tab.open(page, width=390, height=844)
    assert tab.ask("document.documentElement.scrollWidth") <= 390
    assert tab.ask(STICKS_OUT) == []
    widths = tab.ask("[...document.querySelectorAll('.plot-container .main-svg')].map((one) => one.clientWidth)")
    assert len(widths) >= len(CHARTS)
    assert 300 <= min(widths) <= max(widths) <= 390


def test_paper_cuts_nothing_off(tab: Browser, page: Path, tmp_path: Path) -> None:
    tab.open(page, width=1400, dark=True)
    tab.ask(ON_PAPER)
    before = tab.ask("document.querySelector('.main-svg').clientWidth")
    tab.pdf(tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
    printed = tab.ask("printed")
    assert 500 <= printed["widest"] <= PAPER_PX
    assert printed["ink"] == "rgb(31, 41, 55)", "dark on white, whatever the screen is"
    assert tab.ask("document.querySelector('.main-svg').clientWidth") == before

    tab.open(page, width=int(PAPER_PX))
    tab.paper()
    tab.ask("dispatchEvent(new Event('beforeprint'))")
    assert tab.ask(STICKS_OUT.replace('one.closest(".scroll, pre") !== null || ', "")) == []
