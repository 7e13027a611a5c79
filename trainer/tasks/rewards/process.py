"""The inside of a reward process: loads the functions that the recipe names, calls them, and checks their results.

Nothing of the project that takes long to import is imported here: every rank starts such processes.
"""

from __future__ import annotations

import asyncio
import ctypes
import importlib
import importlib.util
import inspect
import math
import numbers
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

from trainer.errors import MusterError, RewardFailed

Function = Callable[..., Any]
SHOWN = 200
PARENTS_SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1)
"""Signals that a terminal or a scheduler sends to all processes of a job. The rank handles them, and may still need the
rewards of its step."""
PR_SET_PDEATHSIG = 1

_functions: dict[str, Function] = {}
_failures: dict[str, str] = {}


def begin(specs: Sequence[str], folder: str, parent: int, started: SimpleQueue[int]) -> None:
    """Runs once in each process: prepares it and loads the functions. ``folder``: the working folder of the rank.
    ``parent``: the rank's process. ``started`` gets the number of this process."""
    os.setpgid(0, 0)  # the rank ends the group, and so what the functions have started
    _end_with(parent)
    started.put(os.getpid())
    for name in PARENTS_SIGNALS:
        signal.signal(name, lambda *_: None)  # not SIG_IGN, which programs that a function starts would inherit
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PARENTS_SIGNALS)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a process that is killed flushes nothing
    os.chdir(folder)  # multiprocessing goes to the folder in which the rank was started
    sys.path.insert(0, folder)
    for spec in specs:
        _load(spec)


def _end_with(parent: int) -> None:
    """Has the kernel kill this process when the thread of the rank that has started it ends."""
    with suppress(AttributeError, OSError):  # elsewhere than on Linux, it ends with its call, as its pipe is closed
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _load(spec: str) -> None:
    try:
        _functions[spec] = load(spec)
    except MusterError as error:
        _failures[spec] = str(error)
    except BaseException as error:
        _failures[spec] = f"cannot be loaded from {Path.cwd()}: {type(error).__name__}: {error}"


def load(spec: str) -> Function:
    """Returns the function that ``spec`` names."""
    place, _, name = spec.rpartition(":")
    module = _from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    function = getattr(module, name, None)
    if not callable(function):
        raise MusterError(f"cannot be loaded: {place} has no function {name!r}")
    found: Function = function
    return found


def _from_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    name = re.sub(r"\W", "_", f"muster_reward_{path.resolve()}")
    if name in sys.modules:  # another function of the file
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a module up by its name
    spec.loader.exec_module(module)
    return module


def failure(spec: str) -> str | None:
    """Returns why the function could not be loaded, as the end of a sentence; None if it was loaded."""
    return _failures.get(spec)


def loaded(spec: str) -> Function:
    """Returns the function or class, which `begin` has loaded."""
    return _functions[spec]


def call(spec: str, prompts: list[str], completions: list[str], references: list[str]) -> list[float]:
    """Returns a number for each completion. Raises RewardFailed for a function that raises or returns something
    else."""
    called = _functions[spec]
    try:
        got = called(prompts=prompts, completions=completions, references=references)
        if inspect.iscoroutine(got):
            got = asyncio.run(got)
        return _checked(spec, got, completions)
    except RewardFailed:
        raise
    except BaseException as error:  # SystemExit too: the function is not to end the process
        traceback.print_exc()
        raise RewardFailed(f"{spec} raised {type(error).__name__}: {error} ({where(called, error)})") from None


def where(function: Function, error: BaseException) -> str:
    """Returns the line that raised: the innermost one of the file of the function (or class), if it is in the
    traceback."""
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    module = sys.modules.get(getattr(function, "__module__", ""))
    file = getattr(getattr(function, "__code__", module), "co_filename", getattr(module, "__file__", None))
    file, line = next((frame for frame in reversed(frames) if frame[0] == file), frames[-1])
    return f"line {line} of {file}"


def _checked(spec: str, got: Any, completions: Sequence[str]) -> list[float]:
    values = got.tolist() if hasattr(got, "tolist") else got
    if not isinstance(values, list | tuple):
        raise RewardFailed(f"{spec} returned {type(got).__name__}; it has to return a list of numbers")
    if len(values) != len(completions):
        raise RewardFailed(f"{spec} returned {len(values)} numbers for {len(completions)} texts")
    for value, text in zip(values, completions, strict=True):
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise RewardFailed(f"{spec} returned {value!r:.{SHOWN}} for the text {text[:SHOWN]!r}; it has to be finite")
    return [float(value) for value in values]
