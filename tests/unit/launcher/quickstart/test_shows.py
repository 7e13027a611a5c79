"""The quickstart around a run that is played by a fake: what it hands to the run, and what it shows of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from launcher.quickstart import __main__ as quickstart
from launcher.quickstart.model import LlamaShape
from launcher.quickstart.prepare import prepare_base
from tests.support.played_time import PlayedTime
from trainer.progress.lines import ProgressLines
from trainer.recipe import load
from trainer.run import layout
from trainer.storage import open_storage

STEPS = 30


def leave_a_run(base: Path) -> None:
    """What a finished run leaves, as far as the quickstart reads it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from trainer.run.jsonl import JsonLinesWriter

    run = open_storage(load(quickstart.RECIPE).run_uri)
    metrics = JsonLinesWriter(run, layout.metrics_part(1))
    for step in range(1, STEPS + 1):
        metrics.add({"attempt": 1, "step": step, "loss": 3.0 / step})
    metrics.add({"attempt": 1, "step": STEPS, "eval_loss": 0.125})
    metrics.close()
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules="all-linear"))
    model.save_pretrained(base.parent / "saved")
    for file in (base.parent / "saved").iterdir():
        run.child(layout.ADAPTER).upload(file.name, file)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder with the quickstart's base in it, small and hardly trained."""
    monkeypatch.chdir(tmp_path)
    shape = LlamaShape(hidden=64, layers=1, heads=2, kv_heads=1, intermediate=64, vocabulary=300)
    prepare_base(Path("runs/quickstart/base"), shape, texts=50, steps=1)
    return tmp_path


def test_it_makes_the_inputs_runs_the_recipe_and_shows_the_result(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: list[Sequence[str]] = []

    def call(command: Sequence[str]) -> int:
        commands.append(command)
        leave_a_run(here / "runs/quickstart/base")
        return 0

    monkeypatch.setattr(quickstart, "call", call)
    assert quickstart.main(["optimizer.lr=1e-3"]) == 0
    assert commands == [[sys.executable, "-m", "launcher", "run", str(quickstart.RECIPE), "optimizer.lr=1e-3"]]
    assert list(here.glob("runs/quickstart/data/*.jsonl"))
    assert list(here.glob("runs/quickstart/eval/*.jsonl"))
    shown = capsys.readouterr().out
    assert "    3.00 |*" in shown
    assert "0.125" in shown
    assert "held-out questions: 0 before, 0 after" in shown
    assert "runs/storage/quickstart/adapter" in shown


@pytest.mark.parametrize(("gpus", "workers"), [(0, None), (1, 1), (8, 2)])
def test_it_takes_gpus_where_there_are_any(
    here: Path, monkeypatch: pytest.MonkeyPatch, gpus: int, workers: int | None
) -> None:
    commands: list[Sequence[str]] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr(quickstart, "call", lambda command: commands.append(command) or 3)
    quickstart.main(["name=mine"])
    *_, path = commands[0][:5]
    recipe = load(path, commands[0][5:])
    assert recipe.name == "mine"
    if workers is None:
        assert recipe.resources == load(quickstart.RECIPE).resources
    else:
        assert (recipe.resources.workers, recipe.resources.gpus_per_worker) == (workers, 1)


def test_making_the_base_is_told_while_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    time, told = PlayedTime(), list[str]()
    lines = ProgressLines(lambda text, style: told.append(text), time.clock)

    def prepare_base(base: Path, on_step: Callable[[int, float], None]) -> bool:
        for step in range(1, 4):
            time.sleep(6.0)
            on_step(step, 9.0 - step)
            lines.repeat()
        return True

    monkeypatch.setattr(quickstart.prepare, "prepare_base", prepare_base)
    quickstart.prepare.make_inputs(load(quickstart.RECIPE), lines)
    assert told[:4] == [
        "[  0.0 s] making a small Llama and its tokenizer",
        "[  6.0 s] pretraining a small Llama: step 1 of 300, loss 8.00",
        "[ 12.0 s] pretraining a small Llama: step 2 of 300, loss 7.00",
        "[ 18.0 s] pretraining a small Llama: step 3 of 300, loss 6.00",
    ]
    assert [line.partition(":")[0] for line in told[4:]] == ["base model", "questions to learn from"]


def test_a_run_that_fails_gives_its_exit_code_and_shows_nothing_more(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quickstart, "call", lambda command: 3)
    assert quickstart.main([]) == 3
    assert "adapter:" not in capsys.readouterr().out
