"""Reward functions in processes of their own: their results, how each failure is reported, and that no process is left
behind."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.waiting import wait_for
from trainer.errors import InputError, RewardFailed
from trainer.recipe.sections.rollouts.reward import RewardFunctionSection
from trainer.run.failure import FATAL
from trainer.tasks.rewards.functions import RewardFunctions, weighted

ROOT = Path(__file__).parents[5]
REWARDS = """
import asyncio, dataclasses, os, re, subprocess, sys, time
from pathlib import Path
import numpy as np

@dataclasses.dataclass
class Kept:
    value: "int" = 0

kept = Kept()

def right(prompts, completions, references):
    return np.array([len(text) for text in completions])

async def later(prompts, completions, references):
    async def one(text):
        await asyncio.sleep(0.01)
        return len(text) + 0.5
    return await asyncio.gather(*map(one, completions))

async def broken_later(prompts, completions, references):
    await asyncio.sleep(0)
    raise KeyError("later")

def pid(prompts, completions, references):
    kept.value += 1
    return [os.getpid()] * len(completions)

def calls(prompts, completions, references):
    kept.value += 1
    return [kept.value] * len(completions)

def side_by_side(prompts, completions, references):
    return waiting("one", "two", completions)

def by_side(prompts, completions, references):
    return waiting("two", "one", completions)

def waiting(mine, other, completions):
    Path(mine).touch()
    while not Path(other).exists():
        time.sleep(0.01)
    return [1.0] * len(completions)

def environment(prompts, completions, references):
    return [float(os.environ["OMP_NUM_THREADS"]), os.getcwd() == sys.path[0], "torch" in sys.modules]

def prints(prompts, completions, references):
    print("printed by the function")
    return [0.0] * len(completions)

def short(prompts, completions, references):
    return [1.0]

def nan(prompts, completions, references):
    return [1.0, float("nan")]

def words(prompts, completions, references):
    return ["good", "bad"]

def nothing(prompts, completions, references):
    return None

def broken(prompts, completions, references):
    raise KeyError("answer")

def inside_a_library(prompts, completions, references):
    return [re.compile("(") for text in completions]  # here

def exits(prompts, completions, references):
    sys.exit("enough")

def dies(prompts, completions, references):
    os._exit(3)

def is_killed(prompts, completions, references):
    os.kill(os.getpid(), 9)

def hangs(prompts, completions, references):
    started = subprocess.Popen(["sleep", "1000"])
    Path("pids").write_text(f"{os.getpid()} {started.pid}")
    time.sleep(1000)

def hangs_with_the_lock(prompts, completions, references):
    Path("pids").write_text(f"{os.getpid()}")
    re.match("(a*)*b", "a" * 100)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    before = set(workers())
    yield
    wait_for(lambda: not set(workers()) - before, "end of the processes", 10)


def workers() -> list[psutil.Process]:
    """The processes of this one, besides Python's own that stays."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has ended
            if "resource_tracker" not in " ".join(process.cmdline()):
                found.append(process)
    return found


def row(function: str, **settings: Any) -> RewardFunctionSection:
    spec = function if ":" in function else f"own_rewards.py:{function}"
    return RewardFunctionSection(function=spec, **settings)


def rated(*rows: RewardFunctionSection, processes: int = 1) -> dict[str, list[float]]:
    functions = RewardFunctions(rows, processes)
    try:
        return functions(["p", "q"], ["ab", "abc"], ["r", "s"])
    finally:
        functions.close()


def test_a_function_is_found_by_file_and_by_module() -> None:
    assert rated(row("right")) == rated(row("own_rewards:right")) == {"right": [2.0, 3.0]}


def test_several_are_given_by_name_sync_or_not() -> None:
    assert rated(row("right"), row("later"), row("right", name="again")) == {
        "right": [2.0, 3.0],
        "later": [2.5, 3.5],
        "again": [2.0, 3.0],
    }


def test_functions_of_a_call_run_at_the_same_time() -> None:
    """Each waits for the other."""
    assert rated(row("side_by_side"), row("by_side"), processes=2) == {"side_by_side": [1, 1], "by_side": [1, 1]}


def test_a_function_is_loaded_once_and_not_here() -> None:
    functions = RewardFunctions([row("pid"), row("calls")])
    found = [functions(["p"], [text], ["r"]) for text in ("a", "b")]
    assert functions([], [], []) == {"pid": [], "calls": []}
    functions.close()
    assert [call["calls"] for call in found] == [[2.0], [4.0]], "one module, that of the process"
    assert len({call["pid"][0] for call in found} | {float(os.getpid())}) == 2
    assert not [name for name in sys.modules if "own_rewards" in name]


def test_texts_of_any_size_pass() -> None:
    functions = RewardFunctions([row("right")])
    text = os.urandom(2 << 20).hex()
    assert functions([text + "p"], [text], [text + "r"]) == {"right": [len(text)]}
    functions.close()


@pytest.mark.parametrize(("given", "threads"), [(None, 1.0), ("3", 3.0)])
def test_the_process_has_one_thread_and_the_working_folder(
    given: str | None, threads: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    functions = RewardFunctions([row("environment")])
    assert functions(["p"] * 3, ["a"] * 3, ["r"] * 3) == {"environment": [threads, 1.0, 0.0]}
    functions.close()


def test_its_output_is_that_of_the_rank(capfd: pytest.CaptureFixture[str]) -> None:
    rated(row("prints"))
    assert capfd.readouterr().out == "printed by the function\n"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("short", "returned 1 numbers for 2 texts"),
        ("nan", r"returned nan for the text 'abc'"),
        ("words", "returned 'good' for the text 'ab'"),
        ("nothing", "returned NoneType; it has to return a list of numbers"),
        ("broken", r"raised KeyError: 'answer' \(line \d+ of .*own_rewards.py\)"),
        ("broken_later", r"raised KeyError: 'later' \(line \d+ of .*own_rewards.py\)"),
        ("exits", r"raised SystemExit: enough \(line \d+ of .*own_rewards.py\)"),
        ("dies", r"was rating 2 texts: its process ended with exit code 3"),
        ("is_killed", r"was rating 2 texts: its process was killed by SIGKILL"),
    ],
)
def test_what_is_no_reward_is_said(name: str, said: str) -> None:
    with pytest.raises(RewardFailed, match=f"own_rewards.py:{name} {said}"):
        rated(row("right"), row(name))


def test_the_line_of_a_failure_is_that_of_the_function(folder: Path) -> None:
    line = REWARDS.splitlines().index('    return [re.compile("(") for text in completions]  # here') + 1
    with pytest.raises(RewardFailed, match=rf"\(line {line} of .*own_rewards.py\)"):
        rated(row("inside_a_library"))


@pytest.mark.parametrize("name", ["hangs", "hangs_with_the_lock"])
def test_a_function_that_hangs_is_killed_with_what_it_started(folder: Path, name: str) -> None:
    began = time.monotonic()
    with pytest.raises(RewardFailed, match=rf"{name} did not return within 0.5 s for 2 texts; .* timeout_s"):
        rated(row(name, timeout_s=0.5))
    assert time.monotonic() - began < 15
    pids = [int(pid) for pid in (folder / "pids").read_text().split()]
    wait_for(lambda: not any(map(alive, pids)), "end of what hangs", 10)


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, FileNotFoundError):  # the latter: it ends while it is looked at
        return False


def test_a_failure_does_not_wait_for_the_others() -> None:
    began = time.monotonic()
    with pytest.raises(RewardFailed, match="broken raised KeyError"):
        rated(row("hangs"), row("broken"), processes=2)
    assert time.monotonic() - began < 15


def test_a_process_that_died_between_two_calls_is_reported() -> None:
    functions = RewardFunctions([row("pid")])
    (pid,) = functions(["p"], ["a"], ["r"])["pid"]
    os.kill(int(pid), signal.SIGKILL)
    wait_for(lambda: not alive(int(pid)), "end of the process", 10)
    with pytest.raises(RewardFailed, match="ended"):
        functions(["p"], ["a"], ["r"])
    with pytest.raises(RewardFailed, match="has ended between two calls"):
        functions(["p"], ["a"], ["r"])


def test_signals_to_all_processes_of_a_job_are_for_the_rank() -> None:
    functions = RewardFunctions([row("pid")])
    (pid,) = functions(["p"], ["a"], ["r"])["pid"]
    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        os.kill(int(pid), name)
    time.sleep(0.2)
    assert functions(["p"], ["a"], ["r"])["pid"] == [pid]
    functions.close()


def test_what_is_not_referenced_any_more_ends() -> None:
    functions = RewardFunctions([row("pid")])
    (pid,) = functions(["p"], ["a"], ["r"])["pid"]
    assert alive(int(pid))
    del functions
    gc.collect()
    wait_for(lambda: not alive(int(pid)), "end of the process", 10)


RANK = """
import multiprocessing, sys
from trainer.tasks.rewards.functions import RewardFunctions
from trainer.recipe.sections.rollouts.reward import RewardFunctionSection

def run(name):
    global functions
    functions = RewardFunctions([RewardFunctionSection(function=f"own_rewards.py:{name}")], 2)
    functions(["p"], ["a"], ["r"])
    print("rated", flush=True)

if __name__ == "__main__":
    if sys.argv[3:] == ["child"]:
        child = multiprocessing.get_context("spawn").Process(target=run, args=sys.argv[1:2])
        child.start()
        child.join()
    else:
        run(sys.argv[1])
    if sys.argv[2] == "waits":
        sys.stdin.read()
"""


def rank_of(folder: Path, *words: str) -> subprocess.Popen[str]:
    (folder / "rank.py").write_text(RANK)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "rank.py", *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, stdin=pipe, stdout=pipe)


@pytest.mark.parametrize("name", ["right", "hangs_with_the_lock"])
def test_the_processes_end_with_a_rank_that_is_killed(folder: Path, name: str) -> None:
    with rank_of(folder, name, "waits") as rank:
        if name == "right":
            assert rank.stdout is not None
            assert rank.stdout.readline() == "rated\n"
        else:
            wait_for(lambda: (folder / "pids").exists(), "the call")
        children = psutil.Process(rank.pid).children(recursive=True)
        assert len(children) >= 2
        rank.kill()
    wait_for(lambda: not any(alive(child.pid) for child in children), "end of the processes", 15)


@pytest.mark.parametrize("words", [(), ("child",)], ids=["itself", "child"])
def test_a_rank_that_ends_leaves_none(folder: Path, words: tuple[str, ...]) -> None:
    """``child``: as a process of multiprocessing, which runs no exit handlers and waits for its children."""
    began = time.monotonic()
    with rank_of(folder, "right", "ends", *words) as rank:
        assert rank.wait(30) == 0
        assert rank.stdout is not None
        assert rank.stdout.read() == "rated\n"
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("missing.py:right", r"'missing.py:right' cannot be loaded from .*: FileNotFoundError: there is no file"),
        ("own_rewards.py:left", r"'own_rewards.py:left' cannot be loaded: own_rewards.py has no function 'left'"),
        ("no_such_module:right", r".*cannot be loaded from .*: ModuleNotFoundError: No module named 'no_such_module'"),
        ("leaves.py:right", r".*cannot be loaded from .*: SystemExit: 7"),
        ("dies.py:right", r".*dies.py:right cannot be loaded: its process ended"),
    ],
)
def test_a_function_that_is_not_there_is_a_mistake_of_the_recipe(folder: Path, spec: str, said: str) -> None:
    (folder / "leaves.py").write_text("raise SystemExit(7)")
    (folder / "dies.py").write_text("import os\nos._exit(7)")
    with pytest.raises(InputError, match=rf"ppo\.reward\.function {said}"):
        RewardFunctions([row("right"), row(spec)])


def test_a_broken_reward_is_not_tried_again() -> None:
    assert issubclass(RewardFailed, FATAL)


def test_it_can_be_called_where_an_event_loop_runs() -> None:
    async def main() -> dict[str, list[float]]:
        return rated(row("later"))

    assert asyncio.run(main()) == {"later": [2.5, 3.5]}


def test_rewards_are_added_by_their_weights() -> None:
    assert weighted({"a": [1.0, 2.0], "b": [10.0, 20.0]}, {"a": 1.0, "b": -0.5}) == [-4.0, -8.0]
    one = [0.1, -3.7, 1e-9]
    assert weighted({"a": one}, {"a": 1.0}) == one, "to the last bit"
    assert weighted({"a": []}, {"a": 1.0}) == []
