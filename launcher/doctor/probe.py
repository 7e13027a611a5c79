"""The probe: a Ray actor that runs where a training worker would run. It answers one call after the other."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.ray_nodes import NODE_SETTINGS
from launcher.raytrain.environment import Environment

if TYPE_CHECKING:
    from launcher.doctor.observations import Inputs, Room
    from launcher.doctor.probes import Computed, Gpu, GroupResult, HostFacts, PairTimes, RoundTrip
    from trainer.recipe import ModelSection, Recipe

VISIBLE = "CUDA_VISIBLE_DEVICES"
HEAD_PROCESS = "gcs_server"
STORE_TIMEOUT_S = 10.0


class Probe:
    """Runs the probes of one rank. ``whole``: sees all GPUs of the node, not only those that it has reserved."""

    def __init__(self, *, whole: bool) -> None:
        self._store: Any = None
        if whole:
            # Ray hides the GPUs that this actor has not reserved; the raylet's environment still lists them.
            self._visible = _of_raylet(VISIBLE)
            if self._visible is None:
                os.environ.pop(VISIBLE, None)
            else:
                os.environ[VISIBLE] = self._visible
        else:
            self._visible = os.environ.get(VISIBLE, "")

    def begin(
        self, environment: Environment, folders: Sequence[tuple[str, str]]
    ) -> tuple[HostFacts, tuple[str, ...], str | None, dict[str, str | None] | None]:
        """Applies the driver's ``environment``; returns host facts, Ray's GPU ids, RAY_AUTH_MODE, and `head_settings`.

        The environment is an argument because the cluster does not store arguments.
        """
        import ray
        import torch.distributed  # noqa: F401  (takes seconds on a busy host; later calls have shorter limits)

        from launcher.doctor.probes import examine

        environment.apply()
        ids = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
        facts = examine(self._visible, folders)
        return facts, tuple(map(str, ids)), os.environ.get("RAY_AUTH_MODE"), head_settings()

    def clock(self) -> float:
        return time.time()

    def compute(self, expected: Sequence[Gpu]) -> tuple[Computed, ...]:
        from launcher.doctor.probes import compute

        return compute(expected)

    def open_store(self, address: str) -> int:
        """Returns the port at which other probes meet this one."""
        from launcher.doctor.probes import open_store

        if self._store is None:
            self._store = open_store(address, STORE_TIMEOUT_S)
        return int(self._store.port)

    def meet(self, name: str, at: tuple[str, int] | None, gpu: bool, timeout_s: float) -> PairTimes:
        """Measures this pair. ``at``: the other probe's address and port; None on the probe whose store is used."""
        from launcher.doctor.probes import meet

        return meet(name, at or self._store, gpu=gpu, timeout_s=timeout_s)

    def bandwidth(
        self, name: str, at: tuple[str, int] | None, rank: int, size: int, gpu: bool, timeout_s: float
    ) -> GroupResult:
        """Measures this group, in which this probe is ``rank``. ``at``: as in `meet`."""
        from launcher.doctor.probes import measure_bandwidth

        return measure_bandwidth(name, at or self._store, rank, size, gpu=gpu, timeout_s=timeout_s)

    def storage(self, url: str, beacon: str, *, first: bool, deadline_s: float) -> RoundTrip:
        """Measures a round trip. The ``first`` probe writes the object ``beacon``; the others look for it."""
        from launcher.doctor.probes import RoundTrip, storage_roundtrip
        from trainer.errors import MusterError
        from trainer.storage import open_storage

        try:
            storage = open_storage(url, deadline_s=deadline_s)
            found = storage_roundtrip(storage, None if first else beacon)
            if first and found.error is None:
                storage.write(beacon, b"1")
        except MusterError as error:
            return RoundTrip(url, error=str(error))
        return found

    def put_out(self, url: str, beacon: str, deadline_s: float) -> None:
        from trainer.storage import open_storage

        open_storage(url, deadline_s=deadline_s).delete([beacon])

    def read_model(self, section: ModelSection) -> str:
        """Returns why this host cannot read the model, or ''. Of the weights, only headers are read."""
        from trainer.errors import MusterError
        from trainer.model import check_weights, fetch_model

        try:
            fetch_model(section, weights=False)
            check_weights(section)
        except (MusterError, OSError) as error:
            return str(error)
        return ""

    def inputs(self, recipe: Recipe) -> Inputs:
        """Checks model and data as the driver of a run does before it starts workers."""
        from launcher.doctor.observations import Inputs
        from launcher.driver.preflight import check_model
        from trainer.errors import MusterError

        warnings: list[str] = []
        try:
            check_model(recipe, warnings.append)
        except MusterError as error:
            return Inputs(str(error), tuple(warnings))
        return Inputs(None, tuple(warnings))

    def plan(self, recipe: Recipe, ranks: int) -> Room | str:
        """Returns the memory and checkpoint size of the recipe on ``ranks`` ranks, or why there is no plan."""
        from launcher.doctor.observations import Room
        from trainer.errors import MusterError
        from trainer.plan.config import read_base
        from trainer.plan.memory import Planner
        from trainer.plan.result import Limits
        from trainer.recipe.tasks import TASKS

        try:
            plan = Planner(read_base(recipe.model, TASKS[recipe.task].auto_class).config, Limits()).plan(recipe, ranks)
        except MusterError as error:
            return str(error)
        return Room(
            plan.on_host,
            tuple(r.peak_device_bytes + plan.device_reserve_bytes for r in plan.ranks),
            tuple(r.peak_host_bytes + plan.host_reserve_bytes for r in plan.ranks),
            plan.checkpoint_bytes,
        )


def head_settings() -> dict[str, str | None] | None:
    """Returns `NODE_SETTINGS` as the head's control process has them; None on a host without that process."""
    import psutil
    import ray

    port = ray.get_runtime_context().gcs_address.rpartition(":")[2]
    for process in psutil.process_iter(["name", "cmdline"]):
        if process.info["name"] == HEAD_PROCESS and any(port in word for word in process.info["cmdline"] or ()):
            try:
                has: Mapping[str, str] = process.environ()
            except psutil.Error:
                has = os.environ  # from the same `ray start`, unless another user started it
            return {name: has.get(name) for name in NODE_SETTINGS}
    return None


def _of_raylet(name: str) -> str | None:
    """Reads an environment variable of the node's raylet, which is the parent of this process."""
    try:
        pairs = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    lead = f"{name}=".encode()
    return next((pair[len(lead) :].decode() for pair in pairs if pair.startswith(lead)), None)
