"""The lease: which driver is alive and has the run.

The lease is a record in the run that its driver rewrites every 3 s with a growing ``beat``. It informs (`status`, the
message of RunHeld) and keeps two drivers from competing. It does not protect: clocks differ and networks stall, so a
new holder always claims a driver number, which fences the old one (trainer.run.claims) whether or not it has noticed.

Whether a holder is alive is observed, not computed: by its process if it runs on this host, otherwise by whether the
beat changes while the reader watches. The time in a record is from another host's clock. A fresh time shows a living
holder at once; any other time proves nothing, and the reader has to watch.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypedDict

from trainer.errors import CorruptObject, Interrupted, MusterError, RunHeld
from trainer.parsing import Malformed
from trainer.records import Count, UnixTime, read_record
from trainer.run import layout
from trainer.run.claims import claim_driver, claim_driver_after, read_claims
from trainer.storage import Storage

log = logging.getLogger(__name__)
RENEW_S = 3.0
RENEWAL_S = 5.0
"""Deadline of each request of a renewal: one that hangs is abandoned, and retried while the lease is fresh."""
STALE_S = 15.0
WATCH_S = 20.0
"""How long a driver that wants the run watches; longer than a renewal with two hung requests."""
GLANCE_S = 2.5 * RENEW_S
"""How long a reader watches that does not want the run (`is_held`)."""
_POLL_S = 1.0
RUNNING, STOPPING = "running", "stopping"
ENDED = ("succeeded", "failed", "interrupted")


@dataclass(frozen=True)
class Holder:
    """The identity of a process among all that ever ran: ``process_start`` is unix s, ``boot_id`` names the boot and
    the pid namespace, ``job`` a Slurm job or RayJob that may be requeued under the same name."""

    host: str
    boot_id: str
    pid: Count
    process_start: float
    job: str | None

    @staticmethod
    def of_this_process(job: str | None) -> Holder:
        import psutil

        me = psutil.Process()
        return Holder(socket.gethostname(), _boot_id(), me.pid, me.create_time(), job)

    def is_dead(self) -> bool:
        """Returns whether this process is known to have ended. That is visible only on its own host and boot."""
        # Another boot id proves nothing: hosts may share a name. A reboot takes longer than a lease stays fresh.
        if (self.host, self.boot_id) != (socket.gethostname(), _boot_id()):
            return False
        import psutil

        try:
            process = psutil.Process(self.pid)
            other_process = abs(process.create_time() - self.process_start) > 1.0
            return other_process or bool(process.status() == psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return True

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" + (f" (job {self.job})" if self.job else "")


@dataclass(frozen=True)
class LeaseRecord:
    """``time`` is the holder's clock at the last renewal (unix s); ``beat`` counts renewals, ``gathers`` the resizes:
    how often the driver has requested its workers to commit and be started again. ``shared``: the driver trains other
    runs too, in the same processes."""

    driver: Count
    state: str
    holder: Holder
    time: UnixTime
    beat: Count
    gathers: Count = 0
    shared: bool = False

    def may_be_alive(self) -> bool:
        """Returns False once the driver has ended, or its process is known to have ended."""
        return self.state not in ENDED and not self.holder.is_dead()

    def is_fresh(self, now: float) -> bool:
        """Returns whether the lease was renewed a moment ago, by clocks that may differ."""
        return abs(now - self.time) <= STALE_S


def read_lease(run: Storage) -> LeaseRecord | None:
    """Returns None when no driver ever held the run. Raises CorruptObject when the record is not a lease."""
    try:
        body = run.read_json(layout.LEASE)
    except FileNotFoundError:
        return None
    try:
        holder = {"holder": body}  # its fields are stored flat, next to the lease's own
        return read_record(LeaseRecord, {**body, **holder} if isinstance(body, dict) else body)
    except Malformed as error:
        raise CorruptObject(f"{run.uri(layout.LEASE)} is not a lease ({error}); take over with --takeover") from error


def read_owner(run: Storage) -> LeaseRecord | None:
    """Returns the newest driver's lease. For a driver that has claimed the run and not yet written its lease, builds
    the record from its claim."""
    newest, lease = read_claims(run).driver, read_lease(run)
    if newest <= (lease.driver if lease else 0):
        return lease
    try:
        holder = read_record(Holder, run.read_json(layout.driver_claim(newest)))
    except (FileNotFoundError, CorruptObject, Malformed):
        holder = Holder("an unknown host", "", 0, 0.0, None)
    return LeaseRecord(newest, RUNNING, holder, 0.0, 0)


def is_held(
    run: Storage,
    lease: LeaseRecord,
    *,
    earlier: LeaseRecord | None = None,
    clock: Callable[[], float] = time.time,
    sleep: Callable[[float], None] = time.sleep,
) -> bool:
    """Returns whether the driver of ``lease``, which was just read, is alive.

    Returns at once for a driver that has ended, that is seen dead on this host, or whose lease is fresh. Otherwise
    watches for a renewal, up to `GLANCE_S`, unless the caller has seen the ``earlier`` record that long ago."""
    if not lease.may_be_alive():
        return False
    if lease.is_fresh(clock()):
        return True
    if earlier is not None:
        return (lease.driver, lease.beat) != (earlier.driver, earlier.beat)
    return _renews(run, lease, GLANCE_S, sleep)


def _renews(run: Storage, lease: LeaseRecord, watch_s: float, sleep: Callable[[float], None]) -> bool:
    """Returns whether the owner's record changes within ``watch_s`` and its holder may be alive."""
    for _ in range(math.ceil(watch_s / _POLL_S)):
        sleep(_POLL_S)
        now = read_owner(run)
        if now is None or not now.may_be_alive():
            return False
        if (now.driver, now.beat) != (lease.driver, lease.beat):
            return True
    return False


class Lease:
    """The lease of this driver, from `acquire` to `release`. ``lost`` is set once a newer driver is seen; then nothing
    may be written. ``asked`` is set once this driver is requested to stop (`request_end`)."""

    def __init__(self, run: Storage, record: LeaseRecord, clock: Callable[[], float], renew_s: float) -> None:
        self.lost, self.asked = threading.Event(), threading.Event()
        self._run = run
        self._record = record
        # Kept outside the record: a signal handler may set them during a renewal.
        self._state, self._gathers = record.state, record.gathers
        self._clock = clock
        self._renew_s = renew_s
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._work, name="lease", daemon=True)
        self._thread.start()

    @property
    def driver(self) -> int:
        """The driver number that attempts are claimed with."""
        return self._record.driver

    @property
    def holder(self) -> Holder:
        return self._record.holder

    @staticmethod
    def acquire(
        run: Storage,
        *,
        job: str | None = None,
        shared: bool = False,
        takeover: bool = False,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
        renew_s: float = RENEW_S,
    ) -> Lease:
        """Takes the run. Watches for up to 20 s whether the present holder renews its lease; if it does, raises
        RunHeld, which names the holder.

        Takes it at once when no driver holds it, when its holder is known to be dead on this host, when the holder has
        the same ``job`` (it was requeued), and with ``takeover``.
        """
        holder = Holder.of_this_process(job)
        driver = claim_driver(run, asdict(holder)) if takeover else _claim_free(run, holder, sleep)
        record = LeaseRecord(driver, RUNNING, holder, clock(), 1, shared=shared)
        _write(run, record)
        return Lease(run, record, clock, renew_s)

    def request_stop(self) -> None:
        """Sets the record's state to ``stopping``. A signal handler may call it: the renewing thread does the
        writing."""
        self._state = STOPPING
        self._wake.set()

    def request_resize(self) -> None:
        """Requests the workers to commit and exit, so that they are started again with the nodes of that time."""
        self._gathers += 1
        self._wake.set()

    def release(self, state: str, *, deadline_s: float | None = None) -> None:
        """Ends the lease as ``succeeded``, ``failed`` or ``interrupted``. Raises storage errors, after ``deadline_s``
        or else the storage's own deadline. Does not write to a lost lease."""
        if state not in ENDED:
            raise ValueError(f"a lease ends with one of {', '.join(ENDED)}, not with {state!r}")
        with self._lock:
            self._ended = True
        self._wake.set()
        self._thread.join(4 * RENEWAL_S)  # its requests: claims, lease, stop
        self._state = state
        self._renew(self._run if deadline_s is None else self._run.within(deadline_s))

    def _work(self) -> None:
        while not self.lost.is_set():
            self._wake.wait(self._renew_s)
            self._wake.clear()
            with self._lock:
                if self._ended:
                    return
            try:
                self._renew(self._run.within(RENEWAL_S))
            except MusterError as error:
                log.warning("the lease of %s was not renewed: %s", self._run.url, error)

    def _renew(self, run: Storage) -> None:
        """Writes the next beat. Looks for a newer driver first, so as not to overwrite the new holder's lease."""
        if read_claims(run, known=[layout.driver_claim(self.driver)]).driver > self.driver:
            self.lost.set()
            return
        beat = self._record.beat + 1
        self._record = replace(self._record, state=self._state, gathers=self._gathers, time=self._clock(), beat=beat)
        _write(run, self._record)
        if not self.asked.is_set() and end_is_requested(run, self.driver):
            self.asked.set()


def request_end(run: Storage, driver: int | None, jobs: Sequence[str] = ()) -> None:
    """Requests the run's driver of this number, from any host, to commit and stop; the driver looks every 3 s. A driver
    that one of these ``jobs`` starts later does not begin (`check_not_cancelled`)."""
    run.write_json(layout.STOP, {"driver": driver, "jobs": list(jobs), "time": time.time()})


def withdraw_end(run: Storage) -> None:
    """Deletes a stop request: a new submission may have the name of a job that was cancelled."""
    run.delete([layout.STOP])


def end_is_requested(run: Storage, driver: int) -> bool:
    return bool(_stop(run).get("driver") == driver)


def is_cancelled(run: Storage, job: str) -> bool:
    """Returns True if `muster cancel` has ended this job, or has left word that it must not begin."""
    return job in _stop(run).get("jobs", ())


def check_not_cancelled(run: Storage, job: str | None) -> None:
    """Raises Interrupted in a job that was cancelled and that its scheduler or cluster has started nevertheless."""
    if job is not None and is_cancelled(run, job):
        raise Interrupted(
            f"{job} was cancelled; to resume the run, submit it again with `muster run --on …`, or delete "
            f"{run.uri(layout.STOP)}"
        )


class _Stop(TypedDict, total=False):
    driver: Count | None
    jobs: list[str]


def _stop(run: Storage) -> _Stop:
    try:
        return read_record(_Stop, run.read_json(layout.STOP))
    except (FileNotFoundError, CorruptObject, Malformed):
        return {}


def _claim_free(run: Storage, holder: Holder, sleep: Callable[[float], None]) -> int:
    """Claims the run from an owner that is not alive, and returns the driver number. Raises RunHeld when the owner
    renews its lease (watched even if its time is fresh), or when another driver takes the run in the same moment."""
    owner = read_owner(run)
    same_job = owner is not None and holder.job is not None and owner.holder.job == holder.job
    if owner is not None and owner.may_be_alive() and not same_job and _renews(run, owner, WATCH_S, sleep):
        now = read_owner(run) or owner
        raise RunHeld(
            f"{now.holder} holds {run.url} and is alive: it has renewed its lease just now (driver {now.driver}). Stop "
            "it, or take the run over with --takeover"
        )
    older = owner.driver if owner is not None else 0
    if not claim_driver_after(run, older, asdict(holder)):
        raise RunHeld(f"driver {older + 1} took {run.url} in the same moment; see `muster status {run.url}`")
    return older + 1


def _write(run: Storage, record: LeaseRecord) -> None:
    run.write_json(layout.LEASE, to_row(record))


def to_row(record: LeaseRecord) -> Mapping[str, Any]:
    """Returns the flat JSON object that is stored."""
    row = asdict(record)
    return {**row.pop("holder"), **row}


def _boot_id() -> str:
    """Returns this boot of this machine and the pid namespace: a container's process 7 is not the host's."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        import psutil

        return f"{int(psutil.boot_time())}/0"
