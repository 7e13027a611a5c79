"""Runs the checks of many architectures, in processes that are forked from one which has imported the libraries."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from tests.families.checks import ALONE, ENDED, SHARDED, Row, alone, sharded
from tests.support.ranks import run_ranks

FILE = Path(__file__).resolve().parents[1] / "golden" / "families.json"
"""The rows of all architectures: {"transformers": version, "known": architectures, "rows": {model type: row}}."""

STILL_S = 120.0
"""A group of processes that use no processor for so long hangs."""

WAITING_S = 0.2
"""Processor time that processes use up which only wait."""

CHECKS = (*ALONE, *SHARDED)


def examine(model_type: str) -> dict[str, Any]:
    """Returns the row of an architecture: what it is, and for each check `ok`, or why not."""
    with tempfile.TemporaryDirectory(prefix="families-") as name:
        folder = Path(name)
        _run(folder, alone, 1, model_type, folder)
        row = Row(folder).values
        if "losses" in row:
            for check in SHARDED:
                if check != "nf4_fsdp" or "nf4_losses" in row:
                    _run(folder, sharded, 2, folder, check)
        return Row(folder).values


def examine_all(model_types: Iterable[str], jobs: int) -> Iterator[dict[str, Any]]:
    """Yields the rows as they are done."""
    with ThreadPoolExecutor(jobs) as pool:
        for done in as_completed([pool.submit(examine, model_type) for model_type in model_types]):
            yield done.result()


def outcomes(row: dict[str, Any]) -> dict[str, str]:
    """Returns for each check: ok, refused, fault, or not run."""
    return {check: row.get(check, "not run").partition(":")[0] for check in CHECKS}


def _run(folder: Path, function: Callable[..., None], ranks: int, *arguments: Any) -> None:
    """Runs the function on ``ranks`` processes, and records of which check they died."""
    reason = _death(function, ranks, *arguments)
    row = Row(folder)
    if reason:
        row.set(**{check: f"fault: {reason}" for check in CHECKS if row.values.get(check) == ENDED})


def _death(function: Callable[..., None], ranks: int, *arguments: Any) -> str | None:
    import torch.multiprocessing as mp

    context = run_ranks(function, ranks, *arguments, join=False)
    stillness = Stillness()
    try:
        while not context.join(timeout=0.5):
            if stillness.lasts(sum(map(_processor_s, context.pids())), time.monotonic()):
                return f"it stands still for {STILL_S:g} s"
    except mp.ProcessExitedException as error:
        return f"its process ended with {error.signal_name or f'exit code {error.exit_code}'}"
    except mp.ProcessRaisedException as error:
        return " ".join(str(error).strip().splitlines()[-1].split())
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    return None


class Stillness:
    """Finds a hang: for ``STILL_S`` the processes use no processor but for waiting."""

    def __init__(self) -> None:
        self._used_s, self._since = float("-inf"), 0.0

    def lasts(self, used_s: float, now: float) -> bool:
        """``used_s``: the processor time that the processes have used up to ``now``."""
        if used_s > self._used_s + WAITING_S:
            self._used_s, self._since = used_s, now
        return now - self._since > STILL_S


def _processor_s(pid: int) -> float:
    with suppress(psutil.Error):
        times = psutil.Process(pid).cpu_times()
        return float(times.user + times.system)
    return 0.0
