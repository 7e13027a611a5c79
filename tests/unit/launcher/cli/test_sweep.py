"""The words of `muster sweep`: what varies, what is the same for all, and what is refused before anything starts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.cli.sweep import read_sweep
from launcher.submit.cancel import _run_or_sweep
from tests.unit.launcher.cli.test_app import Muster
from tests.unit.trainer.recipe.sweeps.test_trials import base
from trainer.errors import RecipeError
from trainer.recipe import dump, loads
from trainer.recipe.sweeps.trials import as_text
from trainer.run import layout
from trainer.run.lease import Lease
from trainer.run.sweep import TrialRecord, folder_of, write_trial
from trainer.storage import open_storage

SECTION = {"parameters": {"optimizer.lr": [1e-4, 3e-4], "adapter.rank": [2, 4]}, "stop": "asha"}


@pytest.fixture
def muster(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Muster:
    monkeypatch.setenv("TERM", "dumb")
    return Muster(capsys, monkeypatch)


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "toy.yaml"
    path.write_text(as_text(base(sweep=SECTION)))
    return str(path)


def test_words_add_to_the_section_and_fix_what_it_varies(file: str) -> None:
    words = ["adapter.rank=8", "adapter.alpha=8,16", "training.steps=20"]
    recipe, plain = read_sweep(file, words, {"trials": 3, "metric": None})
    assert recipe.sweep is not None
    assert recipe.sweep.parameters == {"optimizer.lr": (1e-4, 3e-4), "adapter.alpha": (8, 16)}
    assert (recipe.sweep.stop, recipe.sweep.trials, recipe.sweep.metric) == ("asha", 3, "eval_loss")
    assert (recipe.adapter.rank, recipe.training.steps) == (8, 20)
    assert plain["adapter"] == {"rank": 8}  # no filled-in defaults
    assert loads(as_text(plain)) == recipe


def test_mistakes_name_the_line_or_the_command_line(file: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"command line: sweep\.parameters\.optimizer\.lrr: unknown key"):
        read_sweep(file, ["optimizer.lrr=1,2"], {})
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(as_text(base(sweep={**SECTION, "stopp": "asha"})))
    with pytest.raises(RecipeError, match=r"wrong\.yaml:\d+: sweep\.stopp: unknown key; did you mean 'stop'"):
        read_sweep(str(wrong), [], {})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["optimizer.lr=1e-4,-1"], "optimizer.lr: must be"),
        (["storage=a,b"], "sweep.parameters.storage: cannot vary"),
        (["optimizer.lr=1e-4,1e-3", "--metric", "eval_los"], "did you mean 'eval_loss'?"),
        (["optimizer.lr=1e-4,1e-3", "--stop", "ash"], "did you mean 'asha'?"),
        (["optimizer.lr=1e-4,1e-3", "--trials", "9"], "the lists have 4 combinations"),
        (["data.eval=[]", "training.eval_every=null"], "sweep.metric: is never measured"),
    ],
)
def test_wrong_words_end_with_2_before_anything_is_started(
    muster: Muster, file: str, tmp_path: Path, words: list[str], said: str
) -> None:
    assert muster("sweep", file, *words) == 2, muster.err
    assert said in muster.err
    assert not (tmp_path / "runs").exists()


def test_validate_builds_the_trials(muster: Muster, tmp_path: Path) -> None:
    file = tmp_path / "toy.yaml"
    file.write_text(as_text(base(sweep={"parameters": {"adapter.rank": [8, 0]}})))
    assert muster("validate", str(file)) == 2
    assert "adapter.rank: must be at least 1, got 0 (in the trial with adapter.rank 0)" in muster.err


def test_status_shows_the_trials_of_a_sweep(muster: Muster, tmp_path: Path) -> None:
    sweep = folder_of(open_storage(str(tmp_path / "runs")), "toy")
    sweep.write(layout.RECIPE, as_text(base(sweep=SECTION)).encode())
    write_trial(sweep, TrialRecord(1, "toy-001", {"adapter.rank": 2, "optimizer.lr": 1e-4}))
    assert muster("status", str(tmp_path / "runs" / "toy")) == 0
    assert "toy-001" in muster.out
    assert "1 trial: 1 interrupted" in muster.out
    assert muster("status", str(tmp_path / "runs" / "toy"), "--json") == 0
    (row,) = json.loads(muster.out)
    assert (row["run"], row["values"]["adapter.rank"]) == ("toy-001", 2)


@pytest.fixture
def held(tmp_path: Path) -> Iterator[str]:
    """The URI of a sweep that a driver holds."""
    sweep = folder_of(open_storage(str(tmp_path / "runs")), "toy")
    sweep.write(layout.RECIPE, as_text(base()).encode())
    lease = Lease.acquire(sweep)
    yield str(tmp_path / "runs" / "toy")
    lease.release("interrupted")


def test_cancel_ends_the_sweep_of_a_name_and_else_the_run(held: str, tmp_path: Path) -> None:
    assert _run_or_sweep(held).url.endswith("_sweeps/toy")
    run = open_storage(held)
    run.write(layout.RECIPE, dump(loads(as_text(base()))).encode())
    assert _run_or_sweep(held).url.endswith("_sweeps/toy")  # it is what is running
    sweep = folder_of(open_storage(str(tmp_path / "runs")), "toy")
    Lease.acquire(sweep, takeover=True).release("interrupted")
    assert _run_or_sweep(held).url == run.url
    assert _run_or_sweep(f"{held}-001").url == f"{run.url}-001"
