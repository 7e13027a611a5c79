"""A report's page in a headless browser: drawn, dark, on a phone, on paper."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.report import report
from launcher.report.reading import DataFacts, read_run
from tests.support.browser import FOUND, PAPER_PX, Browser, browser
from tests.support.made_up_run import CHARTS, COUNTS, WORDS, make_up
from tests.support.pictures import all_pictures
from trainer.run.metrics import StepMetrics
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
    assert night == ["rgb(14, 18, 24)", "rgb(230, 233, 239)", "rgb(152, 162, 179)"]
    tab.media(dark=False)
    day = ["rgb(245, 246, 248)", "rgb(31, 41, 55)", "rgb(102, 112, 133)"]
    assert tab.ask(f"new Promise((go) => requestAnimationFrame(() => requestAnimationFrame(() => go({look}))))") == day


def test_a_phone_shows_it_without_scrolling_sideways(tab: Browser, page: Path) -> None:
    tab.open(page, width=390, height=844)
    assert tab.ask("document.documentElement.scrollWidth") <= 390
    assert tab.ask(STICKS_OUT) == []
    widths = tab.ask("[...document.querySelectorAll('.plot-container .main-svg')].map((one) => one.clientWidth)")
    assert len(widths) >= len(CHARTS)
    assert 300 <= min(widths) <= max(widths) <= 390


def test_texts_to_be_compared_are_beside_each_other_and_on_a_phone_below_each_other(tab: Browser, page: Path) -> None:
    places = (
        "[...document.querySelectorAll('.prose tbody tr:first-child td')].map((one) => one.getBoundingClientRect().%s)"
    )
    tab.open(page)
    assert len(set(tab.ask(places % "top"))) == 1
    tab.open(page, width=390, height=844)
    assert len(set(tab.ask(places % "left"))) == 1
    assert tab.ask("getComputedStyle(document.querySelector('.prose td'), '::before').content") == '"prompt"'


def test_an_event_of_a_phone_has_its_text_below_its_time(tab: Browser, page: Path) -> None:
    tab.open(page, width=390, height=844)
    lefts = (
        "[...document.querySelectorAll('#events tbody td:is(:first-child, :last-child)')].map((one) => one.offsetLeft)"
    )
    assert len(set(tab.ask(lefts))) == 1
    assert tab.ask("getComputedStyle(document.querySelector('#events .number'), '::before').content") == '"attempt "'


def test_the_bar_stays_and_shows_the_group_in_the_window(tab: Browser, page: Path) -> None:
    tab.open(page)
    here = "[...document.querySelectorAll('nav a.here')].map((one) => one.hash)"
    assert tab.ask(here) == ["#loss"]
    tab.ask("document.querySelector('nav a[href=\"#machine\"]').click()")
    settled = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
    assert tab.ask(f"{settled}.then(() => {here})") == ["#machine"]
    assert tab.ask("document.querySelector('nav').getBoundingClientRect().top") == 0
    assert 0 <= tab.ask("document.getElementById('machine').getBoundingClientRect().top") < 100


def test_a_constant_rate_is_read_off_its_axis(tab: Browser, tmp_path: Path) -> None:
    run = open_storage(str(tmp_path / "runs")).child("constant")
    make_up(run, lr=5e-3)
    found = read_run(run)
    rows = [replace(row, lr=5e-3) if isinstance(row, StepMetrics) else row for row in found.rows]
    (tmp_path / "report.html").write_text(report([replace(found, rows=rows)]), encoding="utf-8")
    tab.open(tmp_path / "report.html")
    ticks = "[...document.querySelectorAll('[data-chart=\"learning-rate\"] .ytick text')].map((one) => one.textContent)"
    assert tab.ask(ticks) == ["0", "5e\u22123"], "with plotly's minus sign"


def test_pictures_are_taken_of_any_page(tab: Browser, tmp_path: Path) -> None:
    other = tmp_path / "other.html"
    other.write_text("<!doctype html><title>A page</title><p>Not a report.", encoding="utf-8")
    all_pictures(tab, other, tmp_path)
    taken = sorted(path.stem for path in tmp_path.glob("*.webp"))
    sizes = [f"other-{size}{mode}" for size in ("desktop", "tablet", "phone") for mode in ("", "-dark")]
    assert taken == sorted([*sizes, "other-printed"])
    assert all(path.read_bytes().startswith(b"RIFF") for path in tmp_path.glob("*.webp"))


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
    ends = "[...document.querySelectorAll('.cards')].flatMap(({ children: cards }) => [...cards].filter((card, i) => "
    ends += "cards[i + 1]?.offsetTop !== card.offsetTop)).map((card) => Math.round(card.getBoundingClientRect().right))"
    assert len(set(tab.ask(ends))) == 1, "every row of cards is full"
    widths = tab.ask("[...document.querySelectorAll('.alone .main-svg')].map((svg) => svg.clientWidth)")
    assert widths
    assert min(widths) > 600
