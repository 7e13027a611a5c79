"""How a driver leaves its run when something has failed: with the first cause told, here and in the run."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.driver import driver
from tests.storage.doubles import FaultyBackend, faulty, unreachable
from tests.support.training import run_of, small_recipe, train_here, write_pairs
from trainer import __main__ as torchrun
from trainer import torchrun_failure
from trainer.checkpoint import claim_attempt
from trainer.errors import InputError, Interrupted, MusterError, NonFiniteLoss, StorageError, WorkerFailed, note_where
from trainer.recipe import Recipe
from trainer.run import layout
from trainer.run.events import HangEvent, Pulse
from trainer.run.failure import Failure
from trainer.run.jsonl import Events, newest_failure, read_rows
from trainer.run.lease import Lease, read_lease
from trainer.run.outcome import DEADLINE_S, leave
from trainer.storage import Storage
from trainer.tasks.sft import SFT
from trainer.torchrun_failure import RankFailed, RunRank, explain_failure
from trainer.worker import attempt, build


@pytest.fixture
def held() -> Iterator[tuple[Storage, FaultyBackend, Lease]]:
    run, backend = faulty()
    lease = Lease.acquire(run, renew_s=3600.0)
    yield run, backend, lease
    backend.before = lambda verb, path: None
    lease.release("interrupted")


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return small_recipe("a-run", tmp_path / "model", tmp_path)


Held = tuple[Storage, FaultyBackend, Lease]


def ends(run: Storage) -> list[dict[str, Any]]:
    return [e for e in read_rows(run, layout.EVENTS) if e["event"] == "end"]


def state(run: Storage) -> str:
    record = read_lease(run)
    assert record is not None
    return record.state


def test_a_failed_driver_says_why_in_the_events(held: Held) -> None:
    run, _, lease = held
    leave(run, lease, "failed", WorkerFailed("rank 1 died", "  a stack", "  next: look"))
    (end,) = ends(run)
    assert (end["state"], end["cause"], end["driver"]) == ("failed", "rank 1 died", lease.driver)
    assert state(run) == "failed"


def test_an_error_of_no_kind_is_told_with_its_kind(held: Held) -> None:
    run, _, lease = held
    leave(run, lease, "failed", KeyError("text"))
    assert ends(run)[0]["cause"] == "KeyError: 'text'"


def test_one_that_was_stopped_has_not_failed(held: Held) -> None:
    run, _, lease = held
    leave(run, lease, "interrupted", Interrupted("stopped"))
    assert (ends(run), state(run)) == ([], "interrupted")


def test_a_storage_that_is_away_does_not_take_the_place_of_the_cause(
    held: Held, caplog: pytest.LogCaptureFixture
) -> None:
    run, backend, lease = held
    backend.before = unreachable
    leave(run, lease, "failed", InputError("no such column"))
    assert "the cause of the failure is not in the run's events" in caplog.text
    assert "the state 'failed' is not in the run's lease" in caplog.text
    waited_s = [int(seconds) for seconds in re.findall(r"within (\d+) s failed", caplog.text)]
    assert len(waited_s) == 2
    assert max(waited_s) <= DEADLINE_S, "nobody waits two minutes for each"


def test_a_success_that_cannot_be_recorded_is_none(held: Held) -> None:
    run, backend, lease = held
    backend.before = unreachable
    with pytest.raises(StorageError):
        leave(run, lease, "succeeded")


class Driven(driver.RunDriver):
    """A driver whose training is a function."""

    def _train(self) -> None:
        self.phases()  # type: ignore[operator]


def drive(held: Held, recipe: Recipe, train: Callable[[], object], *, stopped: bool = False) -> MusterError:
    run, _, lease = held
    parts: Any = SimpleNamespace(child=lambda name: run), SimpleNamespace(stopped=stopped), None, train
    with pytest.raises(MusterError) as found:
        Driven((driver.HeldRun(recipe, run, lease),), *parts).drive()
    return found.value


def fails(error: Exception) -> Callable[[], None]:
    def train() -> None:
        raise error

    return train


def test_the_driver_raises_the_first_cause_whatever_the_storage_does(held: Held, recipe: Recipe) -> None:
    def train() -> None:
        held[1].before = unreachable
        raise InputError("no such column")

    assert str(drive(held, recipe, train)) == "no such column"


def test_a_failure_on_the_drivers_own_side_is_in_the_run(held: Held, recipe: Recipe) -> None:
    drive(held, recipe, fails(InputError("data.train[0]: no such file")))
    assert ends(held[0])[0]["cause"] == "data.train[0]: no such file"
    found = newest_failure(held[0], held[2].driver)
    assert found is not None
    assert found.row == ends(held[0])[0]


@pytest.mark.parametrize("error", [Interrupted("asked"), WorkerFailed("on the way out")])
def test_after_a_second_signal_what_is_committed_counts(held: Held, recipe: Recipe, error: MusterError) -> None:
    drive(held, recipe, fails(error), stopped=True)
    assert (ends(held[0]), state(held[0])) == ([], "interrupted")


def test_a_rank_whose_collectives_break_says_where_it_saw_the_others(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*given: Any) -> None:
        raise RuntimeError("[gloo] Connection closed by peer")

    monkeypatch.setattr(SFT, "loss_sum", breaks)
    monkeypatch.setattr(build, "check_used", lambda *_: None)  # it would break before the first step
    monkeypatch.setattr(attempt.HangDetector, "seen", lambda self: {0: "step 1, optimizer", 1: "step 1, forward"})
    write_pairs(tmp_path / "data" / "a.jsonl", 20)
    recipe = small_recipe("broken", tiny_model, tmp_path)
    with pytest.raises(RuntimeError, match="gloo"):
        train_here(recipe)
    (told,) = [e for e in read_rows(run_of(recipe), layout.EVENTS) if e["event"] == "broken"]
    assert told["seen"] == {"0": "step 1, optimizer", "1": "step 1, forward"}


# ---------------------------------------------------------------------------------------------------------- torchrun


def broken(text: str = "[gloo] Connection closed by peer") -> RuntimeError:
    error = RuntimeError(text)
    note_where(error, "step 3, exchange of the loss")
    return error


def failures(run: Storage) -> list[dict[str, Any]]:
    return [e for e in read_rows(run, layout.EVENTS) if e["event"] == "failure"]


def test_a_rank_tells_and_keeps_what_it_failed_of(held: Held, recipe: Recipe) -> None:
    run, _, lease = held
    claim_attempt(run, lease.driver, {})
    slept: list[float] = []
    said = explain_failure(
        broken("CUDA error: device-side assert triggered"), RunRank(run, recipe, 1, None), slept.append
    )
    where = f"rank 1 on {os.uname().nodename}: step 3, exchange of the loss"
    assert said.cause == f"{where}: RuntimeError: CUDA error: device-side assert triggered"
    assert "CUDA_LAUNCH_BLOCKING=1" in str(said)
    assert isinstance(said, RankFailed)
    (event,) = failures(run)
    assert (event["attempt"], event["rank"], event["driver"], event["retried"]) == (1, 1, lease.driver, False)
    assert (event["cause"], event["phase"]) == (said.cause, "exchange of the loss")
    assert event["advice"] in str(said)


def test_rank_0_tells_the_cause_and_not_what_followed_from_it(held: Held, recipe: Recipe) -> None:
    run, _, lease = held

    def meanwhile(seconds: float) -> None:
        try:
            dict[str, int]()["text"]
        except KeyError as error:
            explain_failure(error, RunRank(run, recipe, 1, None), lambda seconds: None)

    said = explain_failure(broken(), RunRank(run, recipe, 0, lease.driver), meanwhile)
    assert said.cause == f"rank 1 on {os.uname().nodename}: KeyError: 'text'"
    assert 'dict[str, int]()["text"]' in str(said)
    assert f"muster logs {run.url} --rank 1" in str(said)
    assert [e["rank"] for e in failures(run)] == [1]


def test_rank_0_waits_for_others_only_so_long(held: Held, recipe: Recipe) -> None:
    run, _, lease = held
    slept: list[float] = []
    said = explain_failure(broken(), RunRank(run, recipe, 0, lease.driver), slept.append)
    assert sum(slept) == torchrun_failure.PEER_FAILURE_WAIT_S
    assert "another worker died" in str(said)
    assert [e["rank"] for e in failures(run)] == [0]


def test_rank_0_names_the_rank_that_held_it_up(held: Held, recipe: Recipe) -> None:
    run, _, lease = held
    claim_attempt(run, lease.driver, {})
    pulse = Pulse(rank=1, host="b", step=3, phase="optimizer")
    events = Events(run, 1, "rank0")
    events.emit(HangEvent(cause="nothing has moved for 30 s; held up by rank 1", ranks=(pulse,)))
    events.close()
    said = explain_failure(broken(), RunRank(run, recipe, 0, lease.driver), lambda seconds: None)
    assert said.cause == "nothing has moved for 30 s; held up by rank 1"
    (event,) = failures(run)
    assert (event["rank"], event["host"], event["phase"]) == (1, "b", "optimizer")


def test_what_all_ranks_meet_is_kept_once(held: Held, recipe: Recipe) -> None:
    run, _, lease = held
    alike = NonFiniteLoss("step 3: the loss is not finite")
    for rank, number in ((0, lease.driver), (1, None), (2, None)):
        said = explain_failure(alike, RunRank(run, recipe, rank, number), lambda seconds: None)
        assert said.cause.endswith(f"{os.uname().nodename}: step 3: the loss is not finite")
        assert not isinstance(said, RankFailed)
    assert [e["rank"] for e in failures(run)] == [0]


def test_a_rank_whose_storage_is_away_tells_all_the_same(
    held: Held, recipe: Recipe, caplog: pytest.LogCaptureFixture
) -> None:
    run, backend, lease = held
    backend.before = unreachable
    said = explain_failure(
        StorageError("could not write x"), RunRank(run, recipe, 0, lease.driver), lambda seconds: None
    )
    assert said.cause.endswith("could not write x")
    assert "the failure is not in the run's events" in caplog.text


def test_a_failure_of_another_driver_is_not_this_ones_cause(held: Held) -> None:
    run, _, lease = held
    events = Events(run, 1, f"driver{lease.driver + 10}")
    events.emit(Failure("x").event("", retried=False))
    events.close()
    assert newest_failure(run, lease.driver) is None


@pytest.mark.parametrize(
    ("error", "code", "left"),
    [(RankFailed("x"), 1, None), (WorkerFailed("x"), 1, "1"), (InputError("x"), 2, "2"), (Interrupted("x"), 3, "3")],
)
def test_what_may_pass_leaves_no_exit_code_as_a_killed_rank_leaves_none(
    error: MusterError, code: int, left: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm's script starts the ranks again where there is none."""

    def run(*given: object, **named: object) -> None:
        raise error

    monkeypatch.setattr(torchrun, "_run", run)
    monkeypatch.setenv("MUSTER_EXIT_FILE", str(tmp_path / "exit"))
    monkeypatch.delenv("RANK", raising=False)
    assert torchrun.main(["x"]) == code
    written = tmp_path / "exit"
    assert (written.read_text() if written.exists() else None) == left
