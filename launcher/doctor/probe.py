"""The probe: a Ray actor in the place of a training worker. Its methods answer one after the other."""

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
    from launcher.doctor.probes import Computed, Gpu, HostFacts, PairTimes, RoundTrip
    from trainer.recipe import ModelSection, Recipe

VISIBLE = "CUDA_VISIBLE_DEVICES"
HEAD_PROCESS = "gcs_server"
STORE_TIMEOUT_S = 10.0


class Probe:
    """``whole``: looks at all GPUs of the node, also at those that it has not reserved."""

    def __init__(self, *, whole: bool) -> None:
        self._store: Any = None
        if whole:
            _set(VISIBLE, _of_raylet(VISIBLE))
            self._visible = os.environ.get(VISIBLE)
        else:
            self._visible = os.environ.get(VISIBLE, "")

    def begin(
        self, environment: Environment, folders: Sequence[tuple[str, str]]
    ) -> tuple[HostFacts, tuple[str, ...], str | None, dict[str, str | None] | None]:
        """The host's facts, Ray's GPU ids, Ray's authentication mode, and on the head the settings of its processes.

        The driver's environment comes as an argument, which the cluster does not keep."""
        import ray
        import torch.distributed  # noqa: F401  (takes seconds on a busy host; what comes after has shorter limits)

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
        """The port at which other probes meet this one."""
        from launcher.doctor.probes import open_store

        if self._store is None:
            self._store = open_store(address, STORE_TIMEOUT_S)
        return int(self._store.port)

    def meet(self, name: str, at: tuple[str, int] | None, gpu: bool, timeout_s: float) -> PairTimes:
        """``at``: the other's address and port; None where the other comes to this one's store."""
        from launcher.doctor.probes import meet

        return meet(name, at or self._store, gpu=gpu, timeout_s=timeout_s)

    def storage(self, url: str, beacon: str, *, first: bool, deadline_s: float) -> RoundTrip:
        """The ``first`` leaves a beacon, which the others look for."""
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
        """Why the model cannot be read from this host, empty when it can; headers of its weights only."""
        from trainer.errors import MusterError
        from trainer.model import check_weights, fetch_model

        try:
            fetch_model(section, weights=False)
            check_weights(section)
        except (MusterError, OSError) as error:
            return str(error)
        return ""

    def inputs(self, recipe: Recipe) -> Inputs:
        """Model and data as the driver of a run looks at them before it starts workers."""
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
        """What the recipe takes on so many ranks, or why that cannot be told."""
        from launcher.doctor.observations import Room
        from trainer.errors import MusterError
        from trainer.plan import Limits, Planner, read_base

        try:
            plan = Planner(read_base(recipe.model).config, Limits()).plan(recipe, ranks)
        except MusterError as error:
            return str(error)
        return Room(
            plan.on_host,
            tuple(r.peak_device_bytes + plan.device_reserve_bytes for r in plan.ranks),
            tuple(r.peak_host_bytes + plan.host_reserve_bytes for r in plan.ranks),
            plan.checkpoint_bytes,
        )


def head_settings() -> dict[str, str | None] | None:
    """`NODE_SETTINGS` as the head's control process has them; None where it does not run."""
    import psutil
    import ray

    port = ray.get_runtime_context().gcs_address.rpartition(":")[2]
    for process in psutil.process_iter(["name", "cmdline"]):
        if process.info["name"] == HEAD_PROCESS and any(port in word for word in process.info["cmdline"] or ()):
            try:
                has: Mapping[str, str] = process.environ()
            except psutil.Error:
                has = os.environ  # of the same `ray start`, unless it is another user's
            return {name: has.get(name) for name in NODE_SETTINGS}
    return None


def _of_raylet(name: str) -> str | None:
    """A variable as the node's raylet has it: of its workers, it takes the GPUs away that they did not reserve."""
    try:
        pairs = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    lead = f"{name}=".encode()
    return next((pair[len(lead) :].decode() for pair in pairs if pair.startswith(lead)), None)


def _set(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
