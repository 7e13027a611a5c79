"""``python -m tests.support.pictures``: remakes the pictures of reports in docs/images, of runs that are made up."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from launcher.report import report
from launcher.report.reading import DataFacts, RunRecord, read_run
from tests.support.browser import Browser, browser
from tests.support.made_up_run import COUNTS, WORDS, make_up
from trainer.run.events import FailureEvent
from trainer.storage import open_storage

IMAGES = Path(__file__).resolve().parents[2] / "docs" / "images"
SCREEN = 1280
FAILED = {
    "cause": "RuntimeError: the loader's worker is killed by signal 9",
    "trace": "trainer/worker/loop.py:209, in _accumulate\n    loss, sums = self.task.loss(…)",
    "advice": "the host's memory may have been full: ask for more, or for fewer workers per host",
}
PHONE, PHONE_HEIGHT = 390, 844


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="pictures-") as folder:
        page, both = Path(folder, "one.html"), Path(folder, "two.html")
        storage = open_storage(f"{folder}/runs")
        runs: list[RunRecord] = []
        for name, lr, ended in (("first", 1e-4, "succeeded"), ("second", 3e-4, "interrupted")):
            make_up(storage.child(name), lr=lr, ended=ended)
            runs.append(presentable(read_run(storage.child(name))))
        page.write_text(report(runs[:1]), encoding="utf-8")
        both.write_text(report(runs), encoding="utf-8")
        with browser(Path(folder, "profile")) as tab:
            tab.open(page, width=SCREEN)
            down_to(tab, "checkpoints", IMAGES / "report.png")
            tab.open(page, width=SCREEN, dark=True)
            down_to(tab, "checkpoints", IMAGES / "report-dark.png")
            tab.open(both, width=PHONE, height=PHONE_HEIGHT)
            tab.picture(IMAGES / "report-phone.png", x=0, y=0, width=PHONE, height=2 * PHONE_HEIGHT)
            assert tab.said == [], tab.said


def presentable(run: RunRecord) -> RunRecord:
    """With data, an address and a failure as runs have them."""
    status = replace(run.status, uri=f"s3://runs/{run.label}")
    events = [replace(event, **FAILED) if isinstance(event, FailureEvent) else event for event in run.events]
    return replace(run, status=status, events=events, data=DataFacts(COUNTS, WORDS))


def down_to(tab: Browser, section: str, target: Path) -> None:
    """From the top of the page to the end of a section."""
    end = tab.ask(f"document.getElementById('{section}').getBoundingClientRect().bottom + scrollY")
    tab.picture(target, x=0, y=0, width=SCREEN, height=end + 16)


if __name__ == "__main__":
    main()
