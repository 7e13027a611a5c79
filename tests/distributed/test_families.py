"""Small models of the architectures of transformers pass the checks that the table in docs/models.md promises."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.families import rows
from tests.families.bases import architectures
from tests.families.checks import Row
from tests.families.rows import FILE, examine_all, outcomes

SEED = int(os.environ.get("FAMILIES_SEED", "20261129"))
STORED: dict[str, Any] = json.loads(FILE.read_text())
ROWS: dict[str, Any] = STORED["rows"]

as_measured = pytest.mark.skipif(
    transformers.__version__ != STORED["transformers"],
    reason=f"the table was made with transformers {STORED['transformers']}",
)


def _sample() -> list[str]:
    """A dense model, a mixture of experts, one with sliding windows, and one with a state."""
    draw = random.Random(SEED)
    made = {name: row["kinds"] for name, row in ROWS.items() if "kinds" in row}
    wanted: list[Callable[[list[str]], bool]] = [lambda kinds: not kinds]
    wanted += [lambda kinds, kind=kind: kind in kinds for kind in ("experts", "sliding", "state")]  # type: ignore[misc]
    chosen: list[str] = []
    for fits in wanted:
        chosen.append(draw.choice([name for name, kinds in made.items() if name not in chosen and fits(kinds)]))
    return chosen


def _as_promised(model_types: Iterable[str]) -> None:
    found = {row["model_type"]: row for row in examine_all(model_types, jobs=2)}
    unlike = {name: row for name, row in found.items() if outcomes(row) != outcomes(ROWS.get(name, {}))}
    assert not unlike, f"seed {SEED}; if this is right, run: make families FAMILIES={' '.join(unlike)!r}"


@as_measured
@pytest.mark.timeout(600)
def test_a_sample_of_the_architectures_does_what_the_table_says() -> None:
    chosen = _sample()
    print(f"FAMILIES_SEED={SEED}: {', '.join(chosen)}")
    _as_promised(chosen)


@as_measured
@pytest.mark.night
@pytest.mark.timeout(0)
def test_every_architecture_does_what_the_table_says() -> None:
    _as_promised(architectures())


def _dies(rank: int, folder: Path) -> None:
    with Row(folder).check("merge"):
        os.kill(os.getpid(), signal.SIGKILL)


def _hangs(rank: int, folder: Path) -> None:
    with Row(folder).check("merge"):
        threading.Event().wait()


@pytest.mark.parametrize(("how", "reason"), [(_dies, "SIGKILL"), (_hangs, "stands still")])
def test_a_process_that_dies_or_hangs_is_a_fault_of_its_check(
    how: Callable[..., None], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how is _hangs:
        monkeypatch.setattr(rows.Stillness, "lasts", lambda *times: "merge" in Row(tmp_path).values)
    Row(tmp_path).set(plain="ok")
    rows._run(tmp_path, how, 1, tmp_path)
    row = Row(tmp_path).values
    assert row["plain"] == "ok"
    assert reason in row["merge"]
    assert outcomes(row)["merge"] == "fault"
