"""The command line's contract: exit codes, one sentence for what is wrong, results on stdout and nothing else there."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import launcher.driver.driver
import launcher.quickstart.prepare
from launcher.cli.app import ToStderr, main
from launcher.submit.place import choose_place
from launcher.terminal.console import Console, stderr
from launcher.terminal.exit_codes import exit_code
from tests.support.training import small_recipe
from trainer.errors import Fenced, InputError, Interrupted, RunHeld, StartAgain, StorageError, UsageError, WorkerFailed
from trainer.recipe import Recipe, dump

SECRET = "secret-41fe"


class Muster:
    """Calls the program in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys, self._monkeypatch = capsys, monkeypatch
        self.out = self.err = ""

    def __call__(self, *arguments: str) -> int:
        self._monkeypatch.setattr(sys, "argv", ["muster", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        self.out, self.err = self._capsys.readouterr()
        return int(ended.value.code or 0)

    def last_line(self) -> str:
        return self.err.strip().splitlines()[-1]


@pytest.fixture
def muster(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Muster:
    monkeypatch.setenv("TERM", "dumb")
    return Muster(capsys, monkeypatch)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(dump(small_recipe("cli", tmp_path / "model", tmp_path)))
    return path


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (InputError("no such column"), 2, "muster: error: no such column"),
        (RunHeld("process 7 holds it"), 2, "muster: error: process 7 holds it"),
        (WorkerFailed("rank 1 died"), 1, "muster: error: rank 1 died"),
        (StorageError("503"), 1, "muster: error: 503"),
        (Fenced("attempt 3"), 1, "muster: error: attempt 3"),
        (Interrupted("stopped on request"), 3, "muster: interrupted: stopped on request"),
        (KeyboardInterrupt(), 3, "muster: interrupted: the same command resumes from the newest checkpoint"),
    ],
)
def test_how_a_run_ends(
    muster: Muster, recipe: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, said: str
) -> None:
    def drive(recipes: list[Recipe], progress: object, *, takeover: bool) -> list[str]:
        raise error

    monkeypatch.setattr(launcher.driver.driver, "run_together", drive)
    assert muster("run", str(recipe)) == code
    assert muster.last_line() == said
    assert muster.out == ""


def test_a_run_that_succeeds(muster: Muster, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int | None, bool]] = []

    def drive(recipes: list[Recipe], progress: object, *, takeover: bool) -> list[str]:
        seen.append((recipes[0].training.steps, takeover))
        return ["s3://runs/cli/adapter"]

    monkeypatch.setattr(launcher.driver.driver, "run_together", drive)
    assert muster("run", str(recipe), "training.steps=7", "--takeover") == 0
    run = f"{recipe.parent}/runs/cli"
    finished, chat, report, *serve = muster.err.strip().splitlines()
    assert finished == "finished: the adapter is s3://runs/cli/adapter"
    assert [chat, report] == [f"muster chat --run {run}", f"muster report {run}"]
    assert serve[-1].startswith("vllm serve ")
    assert (muster.out, seen) == ("", [(7, True)])


def test_the_last_lines_are_not_wrapped_in_a_narrow_terminal(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    screen = Console(sys.stderr, results=False, force_terminal=True, width=20)
    monkeypatch.setattr("launcher.cli.run.stderr", lambda: screen)
    adapters = [f"{recipe.parent}/runs/cli/adapter"]
    monkeypatch.setattr(launcher.driver.driver, "run_together", lambda *given, **options: adapters)
    monkeypatch.setattr(sys, "argv", ["muster", "run", str(recipe)])
    with pytest.raises(SystemExit):
        main()
    *_, chat, report, serve = capfd.readouterr().err.strip().splitlines()
    assert chat == f"muster chat --run {recipe.parent}/runs/cli"
    assert report == f"muster report {recipe.parent}/runs/cli"
    assert serve.startswith("vllm serve ")
    assert serve.endswith("}'")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["status"], "Missing argument 'RUN_URI'"),
        (["run", "{recipe}", "--frob"], "No such option"),
        (["run", "{recipe}", "--on", "mars"], "--on 'mars' is not one of: local, ray"),
        (["run", "none.yaml"], "none.yaml: there is no such file"),
        (["run", "{recipe}", "training.stepz=3"], "command line: training.stepz: unknown key; did you mean 'steps'?"),
        (["run", "{recipe}", "training.steps=abc"], "training.steps: takes a whole number, got the text 'abc'"),
        (["run", "{recipe}", "training.steps"], "is not KEY=VALUE"),
        (["validate"], "name a recipe to validate, or --all"),
        (["validate", "none.yaml"], "none.yaml: there is no such file"),
        (["status", "{folder}/none"], "there is no run at"),
        (["status", "{recipe}"], "Not a directory"),
        (["ls", "{recipe}"], "Not a directory"),
        (["ls", "nope://x"], "cannot open nope://x"),
        (["ls", f"s3://key:{SECRET}@bucket/x"], "take them out"),
        (["status", f"s3://key:{SECRET}@bucket/x"], "take them out"),
        (["validate", "{credentials}"], "take them out"),
    ],
)
def test_a_wrong_command_line_is_exit_code_2(muster: Muster, recipe: Path, arguments: list[str], said: str) -> None:
    credentials = recipe.with_name("credentials.yaml")
    text = recipe.read_text()
    credentials.write_text(text.replace(f"storage: {recipe.parent}/runs", f"storage: s3://key:{SECRET}@runs/x"))
    assert credentials.read_text() != text
    places = {"recipe": recipe, "folder": recipe.parent, "credentials": credentials}
    assert muster(*(a.format(**places) for a in arguments)) == 2
    assert said in muster.err
    assert "Traceback" not in muster.err
    assert SECRET not in muster.err + muster.out
    assert muster.out == ""


def test_every_mistake_of_every_recipe_is_said(muster: Muster, recipe: Path) -> None:
    bad = recipe.with_name("bad.yaml")
    bad.write_text(recipe.read_text().replace("steps: 10", "steps: many").replace("dtype:", "dtyp:"))
    assert muster("validate", str(bad), str(recipe), "none.yaml") == 2
    assert "dtyp: unknown key; did you mean 'dtype'?" in muster.err
    assert "training.steps: takes a whole number, got the text 'many'" in muster.err
    assert "2 mistakes" in muster.err
    assert f"ok  {recipe}" in muster.err
    assert "none.yaml" in muster.err
    assert muster("validate", str(recipe), "training.steps=many") == 2
    assert len(muster.err.splitlines()) == 1, "one mistake is one sentence"


def test_validate_looks_at_each_of_the_runs_together(muster: Muster, recipe: Path) -> None:
    assert muster("validate", str(recipe), 'adapters={"low": {"optimizer.lr": -1}, "all": {"adapter.bias": all}}') == 2
    assert "adapters.low: optimizer.lr" in muster.err
    assert muster("validate", str(recipe), 'adapters={"low": {"optimizer.lr": 1e-5}}') == 0


def test_torchrun_trains_one_run(recipe: Path) -> None:
    from trainer.__main__ import _find

    with pytest.raises(InputError, match=r"adapters: runs together are started by `muster run`"):
        _find(str(recipe), ["adapters={low: {optimizer.lr: 1e-5}}"], trust=False)


def test_validate_takes_overrides_for_all_its_recipes(
    muster: Muster, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert muster("validate", str(recipe), "quickstart", "optimizer.lr=3e-4", "training.steps=6") == 0
    assert "ok  quickstart" in muster.err
    assert muster("validate", str(recipe), "training.learning_rate=1") == 2
    assert "command line: training.learning_rate: unknown key; write optimizer.lr" in muster.err
    assert muster("validate", "optimizer.lr=1") == 2
    assert "name a recipe to validate, or --all" in muster.err
    monkeypatch.chdir(recipe.parent)
    recipe.with_name("lr=3.yaml").write_text(recipe.read_text())
    assert muster("validate", "lr=3.yaml") == 0, "a file may have such a name"


@pytest.mark.parametrize("command", ["validate", "run", "render", "plan", "preview", "prepare", "doctor"])
def test_a_shipped_recipe_has_its_name_in_every_command(muster: Muster, command: str) -> None:
    assert muster(command, "quikstart") == 2
    assert "quikstart: there is no such file" in muster.err
    assert "did you mean 'quickstart'?" in muster.err
    assert muster(command, "qwen3-0.6b-chat", "training.steps=no") == 2
    assert "command line: training.steps: takes a whole number" in muster.err


def test_inputs_are_contacted_only_when_asked(muster: Muster, recipe: Path) -> None:
    assert muster("validate", str(recipe)) == 0
    assert not (recipe.parent / "runs").exists()
    assert muster("validate", "--inputs", str(recipe)) == 2
    assert "nothing there matches" in muster.err


def test_ls_of_nothing_says_so(muster: Muster, tmp_path: Path) -> None:
    assert muster("ls", str(tmp_path)) == 0
    assert (muster.out, muster.err.strip()) == ("", f"there is no run in {tmp_path}")
    assert muster("ls", "--json", str(tmp_path)) == 0
    assert (json.loads(muster.out), muster.err) == ([], "")


@pytest.mark.parametrize(
    ("on", "before", "after"),
    [
        (None, "10.0.0.1:6379", "10.0.0.1:6379"),
        (None, None, None),
        ("local", "10.0.0.1:6379", None),
        ("ray", None, "auto"),
        ("ray", "10.0.0.1:6379", "10.0.0.1:6379"),
    ],
)
def test_where_to_run(monkeypatch: pytest.MonkeyPatch, on: str | None, before: str | None, after: str | None) -> None:
    environment = {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}", **({"RAY_ADDRESS": before} if before else {})}
    monkeypatch.setattr(os, "environ", environment)
    choose_place(on, None, None)
    assert environment.get("RAY_ADDRESS") == after
    assert ("RAY_JOB_CONFIG_JSON_ENV_VAR" in environment) == (on != "local")


def test_whoever_manages_the_job_may_name_a_code_for_what_it_should_start_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lost = StartAgain("too few nodes")
    monkeypatch.delenv("MUSTER_AGAIN", raising=False)
    assert exit_code(lost) == 3
    monkeypatch.setenv("MUSTER_AGAIN", "75")
    assert (exit_code(lost), exit_code(Interrupted("stopped")), exit_code(InputError("no"))) == (75, 3, 2)
    monkeypatch.setenv("MUSTER_AGAIN", "soon")
    assert exit_code(lost) == 3


def test_a_ray_job_keeps_no_run_in_its_own_folder(tmp_path: Path) -> None:
    inside = small_recipe("r", tmp_path / "model", tmp_path).model_copy(update={"storage": "runs"})
    with pytest.raises(InputError, match="'runs', a folder in this job's working directory, which Ray deletes"):
        launcher.driver.driver.check_lasting(inside, "ray:j1")
    for job, storage in ((None, "runs"), ("slurm:1", "runs"), ("ray:j1", "/runs"), ("ray:j1", "s3://runs")):
        launcher.driver.driver.check_lasting(inside.model_copy(update={"storage": storage}), job)


def test_where_to_run_is_checked() -> None:
    with pytest.raises(UsageError, match="slurm2"):
        choose_place("slurm2", None, None)


@pytest.mark.parametrize(
    ("environment", "terminal", "live"),
    [
        ({"TERM": "xterm"}, True, True),
        ({"TERM": "xterm", "CI": "true"}, True, False),
        ({"TERM": "dumb"}, True, False),
        ({"TERM": "xterm"}, False, False),
    ],
)
def test_a_live_line_is_for_terminals(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], terminal: bool, live: bool
) -> None:
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    assert stderr().is_terminal is live


def test_no_color_means_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert stderr().no_color


def test_warnings_go_to_what_stands_for_stderr_at_the_time(capsys: pytest.CaptureFixture[str]) -> None:
    handler = ToStderr()
    handler.emit(logging.LogRecord("trainer", logging.WARNING, "f", 1, "%s of %s", ("one", "two"), None))
    assert capsys.readouterr().err == "one of two\n"


def test_the_quickstart_by_its_name_makes_its_inputs_first(
    muster: Muster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made: list[str] = []

    def prepare_base(folder: Path, *, on_step: Callable[[int, float], None]) -> bool:
        made.append(str(folder))
        on_step(50, 3.14159)
        return True

    monkeypatch.setattr(launcher.quickstart.prepare, "prepare_base", prepare_base)

    def drive(recipes: list[Recipe], progress: object, *, takeover: bool) -> list[str]:
        made.append(recipes[0].name)
        return ["runs/storage/quickstart/adapter"]

    monkeypatch.setattr(launcher.driver.driver, "run_together", drive)
    assert muster("run", "quickstart", "training.steps=7") == 0
    assert made == ["runs/quickstart/base", "quickstart"]
    assert list((tmp_path / "runs" / "quickstart" / "data").glob("*.jsonl"))
    assert "base model: runs/quickstart/base (made and pretrained)" in muster.err
    (tmp_path / "quickstart").write_text((tmp_path / "own").name)
    assert muster("run", "quickstart") == 2, "a file of this name is the recipe"
