"""Joins a Ray cluster, or starts a Ray on this machine."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from cluster.job_environment import RAY_JOB
from launcher.capacity import NO_SERVERS, Servers
from trainer.errors import InputError, MusterError
from trainer.interruption import current
from trainer.recipe import ResourcesSection
from trainer.storage.backend import one_line

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[2]
ANSWER_WAIT_S = 15.0
POLL_S = 1.0
REMOVE_S, REMOVE_POLL_S = 5.0, 0.05
DIAL_S = 3.0
CLUSTERS = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Ray listens on the loopback address alone where no cluster can be made of it."""
LEAST_FREE = 64 << 20
ROOM = "make room there, or let TMPDIR name another folder"
LONGEST_FOLDER = 36
"""Characters: Ray makes sockets below, whose paths may have 107."""
CHECKS_S = 160
DRIVER_SETTINGS = {
    "RAY_TRAIN_V2_ENABLED": "1",
    # A group that cannot be placed gives up in time to say why.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",
    # A process that was stopped answers nobody; of several ranks, the others have ended it before this.
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "120",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    # What is called after the driver has left Ray must not start another one.
    "RAY_ENABLE_AUTO_CONNECT": "0",
}


def health_check_interval_s(workers: int) -> float:
    """Returns the seconds after which Ray Train's controller asks each worker again how it is, which is when it notices
    a dead one: half a second, or longer where ``workers`` would make more than ``CHECKS_S`` calls a second."""
    return max(0.5, workers / CHECKS_S)


def set_up(address: str | None, workers: int = 1) -> None:
    """Imports ray for the cluster at ``address``, or for one of this machine. Some settings are read only then."""
    interval = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": f"{health_check_interval_s(workers):g}"}
    for name, value in {**DRIVER_SETTINGS, **interval}.items():
        os.environ.setdefault(name, value)
    if address is None:
        # Whoever reaches a Ray runs code as its user, and other users of this machine are near: it listens on the
        # loopback address alone, and asks for a random token, which its processes have in their environment. What the
        # user has set, in a file of the home directory too, is meant for other clusters.
        os.environ |= {CLUSTERS: "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        os.environ.pop("RAY_AUTH_TOKEN_PATH", None)
    import ray  # noqa: F401


def connect(address: str | None, resources: ResourcesSection, servers: Servers = NO_SERVERS) -> None:
    """Joins the cluster at ``address``, or starts a Ray of this machine's own, in a process that does nothing else.

    Raises InputError when no cluster answers there, or MusterError when this machine has no room for one."""
    set_up(address, resources.max_workers)
    # Workers import this very tree, from a checkout as from a wheel.
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([str(ROOT), *filter(None, given)]))
    if address is None:
        _start_local(resources, servers)
    else:
        _join(address)
    quiet_logs()


@contextmanager
def session_folder() -> Iterator[Path]:
    """The temporary folder of a local Ray, its workers and this process, private to the user. It is removed with
    everything in it, also what killed workers have left."""
    before_dir, names = tempfile.tempdir, ("TMPDIR", "RAY_TMPDIR", "MUSTER_LASTING_TMPDIR", "TORCHINDUCTOR_CACHE_DIR")
    folders = [_made_in(None)]
    if "RAY_TMPDIR" not in os.environ and len(str(folders[0])) > LONGEST_FOLDER:
        folders.append(_made_in("/tmp"))
    remove = partial(_remove, folders)
    current.on_force(remove)
    before = {name: os.environ.get(name) for name in names}
    lasting = str(folders[0].parent)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{lasting}/torchinductor_{os.getuid()}")
    os.environ |= {"TMPDIR": str(folders[0]), "MUSTER_LASTING_TMPDIR": lasting}
    os.environ.setdefault("RAY_TMPDIR", str(folders[-1]))
    tempfile.tempdir = str(folders[0])
    try:
        yield folders[0]
    finally:
        tempfile.tempdir = before_dir
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        remove()


def _made_in(parent: str | None) -> Path:
    try:
        folder = Path(tempfile.mkdtemp(prefix="muster-", dir=parent))
        free = shutil.disk_usage(folder).free
    except OSError as error:
        where = parent or "the temporary folder"
        raise InputError(f"{where} cannot be written ({error.strerror or error}): {ROOM}") from error
    if free < LEAST_FREE:
        folder.rmdir()
        raise InputError(
            f"{folder.parent} has {free >> 20} MiB free, and a run needs {LEAST_FREE >> 20} MiB there at least, for "
            f"Ray's logs and for checkpoints on their way to the storage: {ROOM}"
        )
    return folder


def _remove(folders: Sequence[Path]) -> None:
    """A process that was killed a moment ago may still write a file while its folder is removed."""
    deadline = time.monotonic() + REMOVE_S
    while left := [folder for folder in folders if folder.exists()]:
        for folder in left:
            shutil.rmtree(folder, ignore_errors=True)
        if time.monotonic() >= deadline:
            return
        time.sleep(REMOVE_POLL_S)


def _start_local(resources: ResourcesSection, servers: Servers) -> None:
    import ray

    cpus = resources.max_workers * resources.cpus_per_worker + int(servers.count * servers.each.get("CPU", 0.0))
    try:
        ray.init(
            address="local",
            num_cpus=max(cpus, os.cpu_count() or 1),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=True,
        )
    except Exception as error:
        raise not_started(one_line(error)) from error


def not_started(cause: str) -> MusterError:
    return MusterError(
        f"Ray cannot be started on this machine ({cause}): the machine may be busy with other work; look for room in "
        f"{os.environ.get('RAY_TMPDIR', '/tmp')} and /dev/shm, and for limits on processes and open files (ulimit); "
        "MUSTER_DEBUG=1 shows what Ray itself prints"
    )


def _join(address: str) -> None:
    import ray

    found = locate_cluster(address)
    try:
        ray.init(
            address=found,
            runtime_env=runtime_environment(os.environ, Path.cwd()),
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, RuntimeError, ValueError) as e:
        raise no_cluster(address, " ".join(str(e).split())) from e


def runtime_environment(environment: Mapping[str, str], folder: Path) -> dict[str, Any]:
    """Returns the environment of the job's processes. They find this program's files by their path, or, in a submitted
    job with a working directory, by that directory (``folder``), which has another path on each node."""
    if RAY_JOB in environment and folder.resolve() == ROOT:
        return {}
    return {"env_vars": {"PYTHONPATH": environment["PYTHONPATH"]}}


def locate_cluster(address: str) -> str:
    """``host:port`` of the cluster at ``address`` (``auto``: the one on this machine), which something listens at.

    Raises InputError. Ray itself would try again and again for minutes, in the words of its network layer."""
    if "://" in address:
        raise InputError(
            f"RAY_ADDRESS is {address!r}, which is not a cluster to join: give HOST:PORT of its head (6379 unless told "
            "otherwise), or submit with `ray job submit --address http://HOST:8265 -- muster run …`"
        )
    found = address
    if address == "auto":
        try:  # `ray start` notes there which cluster this machine belongs to
            found = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster").read_text().strip()
        except OSError as e:
            raise no_cluster(address, "none is known on this machine") from e
    if not found.rpartition(":")[2].isdecimal():
        raise no_cluster(address, "it is not HOST:PORT")
    await_answer(address, found)
    return found


def no_cluster(address: str, cause: str) -> InputError:
    return InputError(
        f"no Ray cluster answers at {address!r} ({cause}): start one with `ray start --head`, correct RAY_ADDRESS, or "
        "unset it (--on local) for a Ray of this machine's own"
    )


def await_answer(
    address: str,
    found: str,
    *,
    timeout_s: float = ANSWER_WAIT_S,
    dial: Callable[[str], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Returns once ``found`` accepts a connection; InputError after ``timeout_s``: a head may be just starting."""
    dial = dial or _dial
    deadline = clock() + timeout_s
    while True:
        try:
            return dial(found)
        except OSError as e:
            if clock() >= deadline:
                raise no_cluster(address, e.strerror or str(e)) from e
        sleep(POLL_S)


def _dial(host_and_port: str) -> None:
    host, _, port = host_and_port.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), DIAL_S).close()


def quiet_logs() -> None:
    """Limits Ray's own loggers to errors: the run's events have the rest."""
    for name in ("ray", "ray.train", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("ray.train.v2").setLevel(logging.CRITICAL)  # the run's events report what fails there
    if not sys.warnoptions:
        import warnings

        warnings.filterwarnings("ignore", module=r"ray\..*")
