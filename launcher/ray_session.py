"""Joins a Ray cluster or starts a Ray on this machine, and finds out early whether it has what a recipe asks for."""

from __future__ import annotations

import logging
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from trainer.errors import InputError, Interrupted
from trainer.recipe import ResourcesSection

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
RESOURCE_WAIT_S = 40.0
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
}


@contextmanager
def ray_session(address: str | None, resources: ResourcesSection) -> Iterator[None]:
    """A connected Ray for the time of the block: the cluster at ``address``, or one of this machine's own.

    Raises InputError when no cluster answers there."""
    for name, value in DRIVER_SETTINGS.items():
        os.environ.setdefault(name, value)
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
    # A submitted job brings its own working directory; elsewhere the workers find this tree by its path.
    submitted = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    runtime_env = None if submitted else {"env_vars": {"PYTHONPATH": os.environ["PYTHONPATH"]}}
    try:
        ray.init(address=found, runtime_env=runtime_env, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as e:
        raise no_cluster(address, " ".join(str(e).split())) from e


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


def wanted(resources: ResourcesSection) -> dict[str, float]:
    """The least that the recipe's workers need together, by Ray's names."""
    workers = resources.min_workers
    need = {"CPU": float(workers * resources.cpus_per_worker), "GPU": float(workers * resources.gpus_per_worker)}
    return {name: amount for name, amount in need.items() if amount}


def workers_that_fit(resources: ResourcesSection, nodes: Sequence[Mapping[str, float]]) -> int:
    """How many workers the nodes' resources hold: a worker cannot be split over two nodes."""
    need = {"CPU": float(resources.cpus_per_worker), "GPU": float(resources.gpus_per_worker)}
    asked = {name: amount for name, amount in need.items() if amount}
    return sum(min(math.floor(node.get(name, 0.0) / amount) for name, amount in asked.items()) for node in nodes)


def check_resources(
    resources: ResourcesSection,
    *,
    timeout_s: float = RESOURCE_WAIT_S,
    nodes: Callable[[], list[dict[str, float]]] | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Waits (an autoscaler may be adding nodes) until the cluster can hold the least number of workers.

    Raises InputError that says what is missing."""
    nodes = nodes or _live_nodes
    deadline = clock() + timeout_s
    while workers_that_fit(resources, nodes()) < resources.min_workers:
        if stopped():
            raise Interrupted("stopped while waiting for the cluster's resources")
        if clock() >= deadline:
            raise InputError(_missing(resources, nodes()))
        sleep(POLL_S)


def _missing(resources: ResourcesSection, nodes: Sequence[Mapping[str, float]]) -> str:
    need = wanted(resources)
    have = {name: sum(node.get(name, 0.0) for node in nodes) for name in need}
    lacking = {name: need[name] - have[name] for name in need if need[name] > have[name]}
    if lacking:
        missing = f"missing: {_amounts(lacking)}"
    else:
        missing = "enough in all, but no single node has enough for one more worker"
    fit = workers_that_fit(resources, nodes)
    return (
        f"resources.workers asks for {_many(resources.min_workers, 'worker')} with {_each(resources)} each, and the "
        f"cluster has room for {fit} ({_many(len(nodes), 'node')} with {_amounts(have)} in all; {missing}): add "
        f"nodes, or lower {' or '.join(_to_lower(resources))}"
    )


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


def _live_nodes() -> list[dict[str, float]]:
    import ray

    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def _hush_raylet() -> None:
    """Ray prints what its daemons say of dead processes to stdout, where results belong; the first cause of a failure
    is told by this driver anyway."""
    from ray._private import worker

    worker.listen_error_messages = lambda worker, threads_stopped: None


def quiet_logs() -> None:
    """Ray's own loggers say nothing below an error: what matters is in the run's events."""
    for name in ("ray", "ray.train", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.warnoptions:
        import warnings

        warnings.filterwarnings("ignore", module=r"ray\..*")
