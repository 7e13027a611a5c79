"""Joins a Ray cluster or starts a Ray on this machine, and finds out early whether it has what a recipe asks for."""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.standing import RAY_JOB
from launcher.capacity import Node, nodes_of_cluster, suits, wanted, workers_that_fit
from trainer.errors import InputError, Interrupted, StartAgain
from trainer.recipe import ResourcesSection

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
RESOURCE_WAIT_S = 40.0
JOIN_WAIT_S = 300.0  # for nodes that a scheduler has given already: a slow file system may hold Ray up on them
ANSWER_WAIT_S = 15.0
POLL_S = 1.0
DIAL_S = 3.0
DRIVER_SETTINGS = {
    # A dead worker is noticed within half a second, and a group that cannot be placed gives up in time to say why.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",
    # A process that was stopped answers nobody; of several ranks, the others have ended it before this.
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "120",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    # The controller runs in the driver, where its log would come between what is said to people.
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    # What is called after the driver has left Ray must not start another one.
    "RAY_ENABLE_AUTO_CONNECT": "0",
}


def set_up() -> None:
    """Before ray is first imported, which reads some of the settings only then."""
    for name, value in DRIVER_SETTINGS.items():
        os.environ.setdefault(name, value)


@contextmanager
def ray_session(address: str | None, resources: ResourcesSection) -> Iterator[None]:
    """A connected Ray for the time of the block: the cluster at ``address``, or one of this machine's own.

    Raises InputError when no cluster answers there."""
    set_up()
    # Workers import this very tree, from a checkout as from a wheel.
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([str(ROOT), *filter(None, _python_path())]))
    import ray

    _hush_raylet()
    if address is None:
        _start_local(resources)
    else:
        _join(address)
    try:
        yield
    finally:
        ray.shutdown()


def _python_path() -> list[str]:
    return os.environ.get("PYTHONPATH", "").split(os.pathsep)


def _start_local(resources: ResourcesSection) -> None:
    import ray

    # A token file in the home directory would switch authentication on for some processes and not for others.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    wanted = resources.max_workers * resources.cpus_per_worker
    cores = os.cpu_count() or 1
    if wanted > cores:
        log.warning(
            "%d workers of %d CPUs run on %d cores: slower, with the same result",
            resources.max_workers,
            resources.cpus_per_worker,
            cores,
        )
    ray.init(
        address="local",
        num_cpus=max(wanted, cores),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        configure_logging=True,
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


def runtime_environment(environment: Mapping[str, str], folder: Path) -> dict[str, Any] | None:
    """How workers find this program's tree: by its path; in a submitted job that brought it along as its working
    directory (where the driver then stands, ``folder``) by that, which is another path on each node."""
    if RAY_JOB in environment and folder.resolve() == ROOT:
        return None
    return {"env_vars": {"PYTHONPATH": environment["PYTHONPATH"]}}


def locate_cluster(address: str) -> str:
    """``host:port`` of the cluster at ``address`` (``auto``: the one on this machine), which something listens at.

    Raises InputError. Ray itself would try again and again for minutes, in the words of its network layer."""
    from ray._private.services import canonicalize_bootstrap_address

    if "://" in address:
        raise InputError(
            f"RAY_ADDRESS is {address!r}, which is not a cluster to join: give HOST:PORT of its head (6379 unless told "
            "otherwise), or submit with `ray job submit --address http://HOST:8265 -- muster run …`"
        )
    try:
        found = canonicalize_bootstrap_address(address)
    except (ConnectionError, ValueError, OSError) as e:
        raise no_cluster(address, " ".join(str(e).split())) from e
    if found is None:
        raise no_cluster(address, "none is known on this machine")
    await_answer(address, found)
    return str(found)


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


def check_resources(
    resources: ResourcesSection,
    *,
    timeout_s: float = RESOURCE_WAIT_S,
    expected_nodes: int = 0,
    nodes: Callable[[], list[Node]] = nodes_of_cluster,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Waits (an autoscaler may be adding nodes) until the cluster can hold the least number of workers, and, for up to
    ``JOIN_WAIT_S``, until the ``expected_nodes`` that are on their way have joined or it can hold the most.

    Raises InputError that says what is missing, StartAgain when nodes that were given did not come up."""
    began = clock()
    while True:
        found = [node for node in nodes() if node.alive]
        fit, waited, joining = workers_that_fit(resources, found), clock() - began, len(found) < expected_nodes
        if fit >= resources.max_workers or (fit >= resources.min_workers and not (joining and waited < JOIN_WAIT_S)):
            return
        if stopped():
            raise Interrupted("stopped while waiting for the cluster's resources")
        if joining and waited >= JOIN_WAIT_S:
            absent = f"{len(found)} of {expected_nodes} nodes came up within {JOIN_WAIT_S:.0f} s"
            raise StartAgain(f"{absent}: {missing(resources, found)}")
        if not joining and waited >= timeout_s:
            raise InputError(missing(resources, found))
        sleep(POLL_S)


def missing(resources: ResourcesSection, nodes: Sequence[Node]) -> str:
    """What the live nodes lack for the least number of workers, and what to do."""
    need, suitable = wanted(resources), [node for node in nodes if suits(resources, node)]
    have = {name: sum(node.total.get(name, 0.0) for node in suitable) for name in need}
    lacking = {name: need[name] - have[name] for name in need if need[name] > have[name]}
    if lacking:
        absent = f"missing: {_amounts(lacking)}"
    else:
        absent = "enough in all, but no single node has enough for one more worker"
    fit = workers_that_fit(resources, nodes)
    return (
        f"resources.workers asks for {_many(resources.min_workers, 'worker')} with {_each(resources)} each, and the "
        f"cluster has room for {fit} ({_nodes(len(suitable), len(nodes))} with {_amounts(have)} in all; {absent}): add "
        f"nodes, or lower {' or '.join(_to_lower(resources))}"
    )


def _nodes(suitable: int, all_: int) -> str:
    if suitable == all_:
        return _many(all_, "node")
    return f"{suitable} of {_many(all_, 'node')}, those of the asked accelerator_type and labels"


def _each(resources: ResourcesSection) -> str:
    gpus = {"GPU": float(resources.gpus_per_worker)} if resources.gpus_per_worker else {}
    return _amounts({"CPU": float(resources.cpus_per_worker), **gpus})


def _to_lower(resources: ResourcesSection) -> Iterator[str]:
    """The settings that can be lowered at all."""
    if resources.min_workers > 1:
        yield "resources.workers"
    if resources.gpus_per_worker:
        yield "resources.gpus_per_worker (0 trains on CPUs)"
    if resources.cpus_per_worker > 1:
        yield "resources.cpus_per_worker"


def _amounts(amounts: Mapping[str, float]) -> str:
    return " and ".join(_many(amount, name) for name, amount in amounts.items())


def _many(count: float, noun: str) -> str:
    return f"{count:g} {noun}" + ("" if count == 1 else "s")


def _hush_raylet() -> None:
    """Ray prints what its daemons say of dead processes to stdout, where results belong; the first cause of a failure
    is told by this driver anyway."""
    from ray._private import worker

    worker.listen_error_messages = lambda worker, threads_stopped: None


def quiet_logs() -> None:
    """Ray's own loggers say nothing below an error: what matters is in the run's events."""
    for name in ("ray", "ray.train", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("ray.train.v2").setLevel(logging.CRITICAL)  # what fails there is told by the run's events
    if not sys.warnoptions:
        import warnings

        warnings.filterwarnings("ignore", module=r"ray\..*")
