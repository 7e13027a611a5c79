"""`muster.run` in processes that are interrupted or die, and in a notebook."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.support.jobs import Command, start, wait_for_step, write_recipe
from tests.support.training import adapter_bytes, ledger, run_of, small_recipe, train_here, write_pairs
from tests.support.waiting import wait_for
from trainer.recipe import Recipe
from trainer.run.lease import read_lease

pytestmark = pytest.mark.timeout(300)
CHANGES: dict[str, Any] = {"training.steps": 1000, "checkpoint.every_steps": 200, "resources": {"workers": 1}}
SCRIPT = """
import muster
try:
    print("trained", muster.run(muster.Recipe.load({recipe!r})).uri)
except muster.Interrupted as error:
    print("interrupted:", error)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_pairs(tmp_path / "data" / "a.jsonl", 90)
    return tmp_path


def script(recipe: Recipe, folder: Path) -> Command:
    return start(["-c", SCRIPT.format(recipe=write_recipe(recipe, folder))], {})


@pytest.mark.night
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_the_workers_commit_when_the_caller_ends(end: signal.Signals, tiny_model: Path, folder: Path) -> None:
    recipe = small_recipe("ended", tiny_model, folder, **CHANGES)
    undisturbed = small_recipe("undisturbed", tiny_model, folder, **CHANGES)
    first = script(recipe, folder)
    wait_for_step(recipe, 15, first)
    os.kill(first.process.pid, end)
    first.wait()
    if end == signal.SIGINT:
        assert "interrupted: stopped " in first.output()

    def released() -> bool:
        lease = read_lease(run_of(recipe))
        return lease is not None and lease.state == "interrupted"

    wait_for(released, "the end of the driver")
    again = script(recipe, folder)
    assert again.wait() == 0, again.output()
    assert f"trained {recipe.run_uri}" in again.output()
    assert train_here(undisturbed) == "succeeded"
    assert adapter_bytes(recipe) == adapter_bytes(undisturbed)
    assert ledger(recipe) == ledger(undisturbed)


def test_a_notebook_shows_the_curve(tiny_model: Path, folder: Path) -> None:
    recipe = small_recipe("noted", tiny_model, folder, **{**CHANGES, "training.steps": 60})
    cells = [
        f"import muster\nrun = muster.run(muster.Recipe.load({write_recipe(recipe, folder)!r}))",
        "run.status().state",
    ]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(book, timeout=250, kernel_name="python3").execute()
    shown, state = (cell.outputs for cell in book.cells)
    (display,) = [output for output in shown if output.output_type == "display_data"]
    html = display.data["text/html"]
    assert "<polyline" in html
    assert "noted  succeeded  step 60/60  loss " in html
    assert "finished: the adapter is" in html
    assert "earlier lines</summary>" in html
    assert "storage, model and data are checked" in html, "no line of the driver is lost"
    assert state[0].data["text/plain"] == "'succeeded'"
    assert not any(output.output_type == "stream" for output in shown), "the driver's lines are in the display"
