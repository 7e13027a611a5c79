from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, replace

import psutil
import pytest

from tests.storage.doubles import faulty, times
from tests.support.waiting import wait_for
from trainer.checkpoint import claim_driver, read_claims
from trainer.errors import CorruptObject, RunHeld
from trainer.run.lease import RENEW_S, STALE_S, WATCH_S, Holder, Lease, LeaseRecord, is_held, read_lease, to_row
from trainer.storage import Storage
from trainer.storage.backend import Transient

ELSEWHERE = Holder("another-host", "boot/1", 4711, 1000.0, None)
NEVER_S = 3600.0


class Clock:
    def __init__(self) -> None:
        self.now = 5000.0
        self.on_sleep: Callable[[], None] = lambda: None

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.on_sleep()


def put_lease(
    storage: Storage, holder: Holder = ELSEWHERE, *, state: str = "running", time: float = 5000.0
) -> LeaseRecord:
    driver = claim_driver(storage, {})
    record = LeaseRecord(driver, state, holder, time, 7)
    storage.write_json("lease", to_row(record))
    return record


def acquire(storage: Storage, clock: Clock, **options: object) -> Lease:
    return Lease.acquire(storage, clock=clock, sleep=clock.sleep, renew_s=NEVER_S, **options)  # type: ignore[arg-type]


def test_a_run_that_nobody_holds_is_taken_at_once() -> None:
    storage, _ = faulty()
    clock = Clock()
    lease = acquire(storage, clock, job="slurm-17")
    record = read_lease(storage)
    assert record is not None
    assert (record.driver, record.state, record.time, record.holder.pid) == (1, "running", 5000.0, os.getpid())
    assert record.holder.job == "slurm-17"
    assert record.is_fresh(5000.0 + STALE_S)
    assert not record.is_fresh(5001.0 + STALE_S)
    assert not record.is_fresh(4999.0 - STALE_S), "a clock that runs ahead proves nothing either"
    lease.release("succeeded")
    ended = read_lease(storage)
    assert ended is not None
    assert (ended.state, ended.may_be_alive(), clock.now) == ("succeeded", False, 5000.0)


def test_a_holder_that_renews_is_named() -> None:
    storage, _ = faulty()
    clock = Clock()
    record = put_lease(storage, replace(ELSEWHERE, job="job-9"))
    clock.on_sleep = lambda: storage.write_json("lease", to_row(replace(record, time=clock.now, beat=8)))
    with pytest.raises(RunHeld, match=r"process 4711 on another-host \(job job-9\) holds faulty://run .*--takeover"):
        acquire(storage, clock)
    assert read_claims(storage).driver == 1, "whoever is refused leaves no claim"


@pytest.mark.parametrize("skew_s", [0.0, -20.0, 4000.0, -4000.0])
def test_a_holder_that_does_not_renew_loses_the_run_after_20_s_whatever_its_clock_says(skew_s: float) -> None:
    storage, _ = faulty()
    clock = Clock()
    put_lease(storage, time=5000.0 + skew_s)
    acquire(storage, clock).release("failed")
    assert WATCH_S <= clock.now - 5000.0 <= WATCH_S + 2
    assert read_claims(storage).driver == 2


@pytest.mark.parametrize("skew_s", [-20.0, -4000.0, 4000.0])
def test_a_healthy_holder_keeps_the_run_whatever_its_clock_says(skew_s: float) -> None:
    storage, _ = faulty()
    clock = Clock()
    record = put_lease(storage, time=5000.0 + skew_s)

    def renew() -> None:
        beat = record.beat + int((clock.now - 5000.0) / RENEW_S)
        storage.write_json("lease", to_row(replace(record, time=clock.now + skew_s, beat=beat)))

    clock.on_sleep = renew
    with pytest.raises(RunHeld, match="renewed its lease"):
        acquire(storage, clock)
    assert read_claims(storage).driver == 1
    assert is_held(storage, record, clock=clock, sleep=clock.sleep), "`status` says the same"


def test_who_looks_sees_a_dead_holder_too() -> None:
    storage, _ = faulty()
    clock = Clock()
    record = put_lease(storage, time=0.0)
    assert not is_held(storage, record, clock=clock, sleep=clock.sleep)
    assert not is_held(storage, replace(record, state="failed"), clock=clock, sleep=clock.sleep)


def test_a_driver_that_has_claimed_and_not_yet_written_its_lease_is_watched() -> None:
    """Between the two, the lease is that of the driver before, which may be seen dead."""
    storage, _ = faulty()
    clock = Clock()
    record = put_lease(storage, state="failed")
    driver = claim_driver(storage, asdict(ELSEWHERE))
    clock.on_sleep = lambda: storage.write_json("lease", to_row(replace(record, driver=driver, state="running")))
    with pytest.raises(RunHeld, match=f"process 4711 on another-host holds .*driver {driver}"):
        acquire(storage, clock)
    assert read_claims(storage).driver == driver


def test_a_driver_that_died_between_its_claim_and_its_lease_holds_nothing() -> None:
    storage, _ = faulty()
    clock = Clock()
    me = Holder.of_this_process(None)
    claim_driver(storage, asdict(replace(me, process_start=me.process_start - 100)))
    acquire(storage, clock).release("failed")
    assert clock.now == 5000.0


def test_of_ten_drivers_that_start_in_the_same_moment_one_has_the_run() -> None:
    storage, _ = faulty()
    together, leases, held = threading.Barrier(10), list[Lease](), list[RunHeld]()

    def start() -> None:
        together.wait()
        try:
            leases.append(Lease.acquire(storage, renew_s=0.05, job=str(threading.get_ident())))
        except RunHeld as error:
            held.append(error)

    threads = [threading.Thread(target=start) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (lease,) = leases
    assert len(held) == 9
    wait_for(lambda: (now := read_lease(storage)) and now.driver == lease.driver, "the winner's own renewal")
    assert not lease.lost.is_set()
    lease.release("interrupted")


@pytest.mark.parametrize("state", ["succeeded", "failed", "interrupted"])
def test_a_lease_that_ended_is_free(state: str) -> None:
    storage, _ = faulty()
    clock = Clock()
    put_lease(storage, state=state)
    acquire(storage, clock).release("failed")
    assert clock.now == 5000.0


def test_the_same_job_and_a_takeover_do_not_wait() -> None:
    for options in ({"job": "slurm-17"}, {"takeover": True}):
        storage, _ = faulty()
        clock = Clock()
        put_lease(storage, replace(ELSEWHERE, job="slurm-17"))
        lease = acquire(storage, clock, **options)
        assert (lease.driver, clock.now) == (2, 5000.0)
        lease.release("failed")


def test_a_process_that_died_on_this_host_is_seen_at_once() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    me = Holder.of_this_process(None)
    holder = replace(me, pid=child.pid, process_start=psutil.Process(child.pid).create_time())
    assert not holder.is_dead()
    child.communicate(b"\n")
    assert holder.is_dead()
    storage, _ = faulty()
    clock = Clock()
    put_lease(storage, holder)
    acquire(storage, clock).release("failed")
    assert clock.now == 5000.0


def test_a_reused_pid_is_another_process_and_another_host_is_unknown() -> None:
    me = Holder.of_this_process(None)
    assert not me.is_dead()
    assert replace(me, process_start=me.process_start - 100).is_dead()
    assert not replace(me, process_start=0.0, host="another-host").is_dead()
    assert not replace(me, process_start=0.0, boot_id="another boot/1").is_dead()


def test_renewals_go_on_through_a_bad_moment_until_a_newer_driver_comes() -> None:
    storage, backend = faulty(deadline_s=0.0)
    lease = Lease.acquire(storage, renew_s=0.01)

    def beat() -> int:
        record = read_lease(storage)
        return record.beat if record else 0

    wait_for(lambda: beat() > 3, "renewals")
    backend.before = times(3, Transient("busy"), "put")
    before = beat()
    wait_for(lambda: beat() > before + 3, "renewals after failures")
    lease.request_stop()
    wait_for(lambda: (r := read_lease(storage)) and r.state == "stopping", "the state")
    put_lease(storage)
    assert lease.lost.wait(10)
    lease.release("succeeded")
    now = read_lease(storage)
    assert now is not None
    assert (now.holder, now.state) == (ELSEWHERE, "running"), "a lost lease is left alone"


def test_release_refuses_states_that_are_no_end() -> None:
    storage, _ = faulty()
    lease = acquire(storage, Clock())
    with pytest.raises(ValueError, match="not with 'running'"):
        lease.release("running")
    lease.release("interrupted")


def test_a_lease_that_is_none_is_named_and_can_be_taken_over() -> None:
    storage, _ = faulty()
    storage.write("lease", b'{"driver": 1}')
    with pytest.raises(CorruptObject, match="faulty://run/lease is not a lease"):
        acquire(storage, Clock())
    acquire(storage, Clock(), takeover=True).release("failed")
