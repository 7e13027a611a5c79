"""What is imported quickly is what would have been imported."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.fast_imports import _compiling_late, load_libraries

ROOT = Path(__file__).resolve().parents[3]
IN_A_NEW_PROCESS = """
import gc, sys, torch
before = torch.compile
from trainer.fast_imports import load_libraries
load_libraries()
assert {"bitsandbytes", "peft"} <= sys.modules.keys()
assert "torch._inductor.compile_fx" not in sys.modules, "the compiler"
assert torch.compile is before
assert gc.isenabled() and gc.get_freeze_count() > 100_000
"""


def test_the_compiler_stays_away_and_all_is_put_back() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IN_A_NEW_PROCESS], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_a_second_call_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)  # type: ignore[arg-type]
    load_libraries()
    assert sys.modules["peft"] is None


class Torch:
    """Its compile notes what it was asked for."""

    def __init__(self) -> None:
        self.compiled: list[dict[str, Any]] = []

    def compile(self, function: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
        self.compiled.append(settings)
        return lambda *args, **kwargs: ("compiled", function(*args, **kwargs))


def test_what_is_compiled_late_is_compiled_once_as_it_was_asked_for() -> None:
    torch = Torch()
    with _compiling_late(torch):

        @torch.compile
        def double(x: int) -> int:
            return 2 * x

        @torch.compile(dynamic=False)  # type: ignore[call-arg, misc]
        def add(x: int, *, y: int) -> int:
            """Of two."""
            return x + y

        assert torch.compiled == []
    assert [double(2), double(3), add(1, y=2), add(1, y=3)] == [
        ("compiled", 4), ("compiled", 6), ("compiled", 3), ("compiled", 4),
    ]  # fmt: skip
    assert torch.compiled == [{}, {"dynamic": False}]
    assert (add.__name__, add.__doc__) == ("add", "Of two.")
    torch.compile(add)
    assert len(torch.compiled) == 3, "at once again"


def test_deepspeeds_notice_of_a_machine_without_a_gpu_is_dropped_and_nothing_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    load_libraries()
    logger = logging.getLogger("DeepSpeed")
    logger.warning("Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it.")
    logger.warning("the loss scale overflowed")
    assert [record.message for record in caplog.records if record.name == "DeepSpeed"] in (
        ["the loss scale overflowed"],
        [],  # once DeepSpeed is imported, its records are not handed on
    )
    assert not logger.filter(logging.LogRecord("DeepSpeed", 30, "", 0, "Setting accelerator to CPU. If …", (), None))
