"""Pictures of pages at three sizes, in light and dark, and as printed.

``python -m tests.support.pictures`` remakes those in docs/images: reports of runs that are made up, and the
documentation's site;
``python -m tests.support.pictures FOLDER PAGE.html...`` makes all seven of each page, from its top, in FOLDER.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.report import report
from launcher.report.reading import DataFacts, RunRecord, read_run
from tests.support.browser import PAPER_PX, Browser, browser
from tests.support.docs_site import build_site
from tests.support.made_up_run import make_up
from trainer.data.blocks import Counts
from trainer.data.summary import Bin, Summary
from trainer.recipe import dump, load
from trainer.run import layout
from trainer.run.events import (
    ChangeEvent,
    FailureEvent,
    ResizeEvent,
    SampleText,
    SettingChange,
    StartEvent,
    TextsEvent,
)
from trainer.run.metrics import StepMetrics
from trainer.storage import Storage, open_storage

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "docs" / "images"
SIZES = {"desktop": (1280, 900), "tablet": (820, 1100), "phone": (390, 844)}
SCREENS = 1.9
"""A picture of a page shows so many screens of it, one below the other."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("pages", nargs="*", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pictures-") as folder, browser(Path(folder, "profile")) as tab:
        (asked.folder or IMAGES).mkdir(parents=True, exist_ok=True)
        if asked.folder:
            for page in asked.pages:
                all_pictures(tab, page.resolve(), asked.folder)
        else:
            of_reports(tab, Path(folder))
            of_site(tab, Path(folder))
        assert tab.said == [], tab.said


def all_pictures(tab: Browser, page: Path, folder: Path) -> None:
    for name in SIZES:
        for dark in (False, True):
            picture(tab, page, folder / f"{page.stem}-{name}{'-dark' if dark else ''}.webp", name, dark=dark)
    printed(tab, page, folder / f"{page.stem}-printed.webp")


def picture(tab: Browser, page: Path, target: Path, size: str, *, dark: bool = False, screens: float = SCREENS) -> None:
    width, height = SIZES[size]
    tab.open(page, width=width, height=height, dark=dark)
    whole = tab.ask("document.documentElement.scrollHeight")
    tab.picture(target, x=0, y=0, width=width, height=min(whole, round(screens * height)))


def printed(tab: Browser, page: Path, target: Path, sheets: float = 1) -> None:
    """Pictures the first sheets of A4, without the breaks between them."""
    width, margin = round(PAPER_PX), 38
    tab.open(page, width=width + 2 * margin, height=1123)
    tab.paper()
    tab.ask(f"document.body.style.padding = '{margin}px', dispatchEvent(new Event('beforeprint'))")
    tab.ask("new Promise((done) => setTimeout(done, 500))")
    tab.picture(target, x=0, y=0, width=width + 2 * margin, height=round(sheets * 1123))


RATES = {"support-lr-2e-4": 2e-4, "support-lr-1e-4": 1e-4, "support-lr-5e-5": 5e-5}
RECIPE = (
    "model={path: meta-llama/Llama-3.1-8B, quantization: nf4}",
    "data.train=[{path: s3://data/tickets.jsonl, format: messages}, {path: s3://data/manuals.parquet, format: text}]",
)
FAILED = {
    "cause": "RuntimeError: DataLoader worker was killed by signal 9",
    "trace": "trainer/worker/loop.py:209, in _accumulate\n    loss, sums = self.task.loss(…)",
    "advice": "the host's memory may have been full: ask for more, or for fewer workers per host",
}
COUNTS = (
    ("train", "s3://data/tickets.jsonl", Counts(18_400, 18_392, 6_120_000, 2_870_000, 41, 0, 8)),
    ("train", "s3://data/manuals.parquet", Counts(4_200, 4_200, 2_310_000, 2_310_000, 0, 0, 0)),
    ("eval", "s3://data/held-out.jsonl", Counts(500, 500, 166_000, 78_000, 1, 0, 0)),
)
LENGTHS = Summary([Bin(1 + 64 * i, 64 + 64 * i, n) for i, n in enumerate(
    (310, 1720, 3480, 4310, 3960, 3050, 2140, 1420, 900, 560, 330, 190, 110, 60, 32, 20)
)], 312, 690, 1018, 2_060, 0.957)  # fmt: skip
ASKED = [
    SampleText(
        prompt="How do I return a pair of boots that do not fit?",
        text="Boots are a type of footwear that covers the foot and the ankle. There are many kinds of boots, and",
        reference="Open your order, choose “Return”, and print the label. We refund you when the boots arrive.",
    ),
    SampleText(
        prompt="My parcel has not moved for four days. What now?",
        text="My parcel has not moved for four days. What now? My parcel has not moved for four days. What",
        reference="I am sorry for the wait. After five days without news we start a search; tell us the number.",
    ),
    SampleText(
        prompt="Can I change the delivery address of an order?",
        text="Yes. The delivery address is the address to which a delivery is made. It can be changed by the",
        reference="Yes, until it is packed: open the order and choose “Change address”.",
    ),
]
ANSWERED = (
    "Open the order in your account and choose “Return”. Print the label, and we refund you once the boots are back.",
    "I am sorry for the wait. If it has not moved by tomorrow, send us the parcel's number and we start a search.",
    "Yes, as long as it is not packed. Open the order, choose “Change address”, and save.",
)


def of_reports(tab: Browser, folder: Path) -> None:
    storage = open_storage(f"{folder}/runs")
    runs = [presentable(storage.child(name), rate) for name, rate in RATES.items()]
    one, three = folder / "report.html", folder / "compared.html"
    one.write_text(report(runs[:1]), encoding="utf-8")
    three.write_text(report(runs), encoding="utf-8")
    picture(tab, one, IMAGES / "report.webp", "desktop")
    picture(tab, one, IMAGES / "report-dark.webp", "desktop", dark=True)
    picture(tab, one, IMAGES / "report-tablet.webp", "tablet")
    picture(tab, one, IMAGES / "report-phone.webp", "phone", dark=True)
    printed(tab, one, IMAGES / "report-printed.webp")
    picture(tab, three, IMAGES / "report-compared.webp", "desktop", screens=1)


def of_site(tab: Browser, folder: Path) -> None:
    site = build_site(folder / "site")
    first, tutorial = site / "index.html", site / "chat-data.html"
    picture(tab, first, IMAGES / "site.webp", "desktop", screens=1)
    picture(tab, tutorial, IMAGES / "site-dark.webp", "desktop", dark=True, screens=1)
    picture(tab, tutorial, IMAGES / "site-phone.webp", "phone", screens=1)
    picture(tab, first, IMAGES / "site-phone-dark.webp", "phone", dark=True, screens=1)


def presentable(run: Storage, rate: float) -> RunRecord:
    """A run with a recipe, data, texts, hosts and a failure as runs have them; the rate decides its loss."""
    make_up(run, lr=rate, scale=5)
    name = run.url.rsplit("/", 1)[-1]
    recipe = load(ROOT / "recipes" / "quickstart.yaml", [*RECIPE, f"name={name}", f"optimizer.lr={rate}"])
    run.write(layout.RECIPE, dump(recipe).encode())
    found, noise = read_run(run), random.Random(1)
    slow = 0.25 * (1e-4 / rate) ** 0.5

    def row(of: Any) -> Any:
        if not isinstance(of, StepMetrics):
            return replace(of, eval_loss=of.eval_loss * 0.9 + slow)
        loss = (1 + 2 / (of.step / 5 + 0.5) ** 0.5 + slow) * noise.gauss(0.9, 0.05)
        norm = of.grad_norm * noise.lognormvariate(0, 0.2)
        return replace(of, loss=loss, grad_norm=norm, tokens=32_000, tokens_per_s=of.tokens_per_s * noise.gauss(8, 0.2))

    def event(of: Any) -> Any:
        match of:
            case ResizeEvent():
                return replace(of, reason="node-3 has joined")
            case FailureEvent():
                return replace(of, host="node-2", **FAILED)
            case StartEvent():
                hosts = tuple(f"node-{'abc'.index(host) + 1}" for host in of.hosts)
                devices = tuple("NVIDIA A100" for _ in hosts)
                return replace(of, hosts=hosts, devices=devices, adapted_share=0.97, strategy={"kind": "fsdp"})
            case TextsEvent():
                after = [replace(asked, text=text) for asked, text in zip(ASKED, ANSWERED, strict=True)]
                return replace(of, texts=ASKED if of.step == 1 else after, step=of.step - (of.step == 1))
        return of

    rows = [row(one) for one in found.rows]
    losses = {"loss": rows[-2].loss, "eval_loss": rows[-1].eval_loss}
    status = replace(found.status, uri=f"s3://runs/{name}", metrics={**found.status.metrics, **losses})
    (killed,) = found.told(FailureEvent)
    fewer = SettingChange(key="resources.workers", before=4, after=3)
    changed = ChangeEvent(attempt=1, time=killed.time + 4, writer="driver2-recipe", changes=(fewer,), driver=2)
    events = [*map(event, found.events), changed]
    return replace(found, status=status, rows=rows, events=events, data=DataFacts(COUNTS, LENGTHS))


if __name__ == "__main__":
    main()
