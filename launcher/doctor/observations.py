"""Data that an examination collects, before `diagnosis` turns it into findings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from launcher.doctor.probes import Bandwidth, Computed, HostFacts, PairTimes, RoundTrip
from trainer.recipe.strategies import Mesh

Axis = Literal["inside", "across", "all"]
"""The groups of ranks: inside each replica, across replicas (one rank of each), or all ranks."""


@dataclass(frozen=True)
class NodeObservation:
    """A node as Ray lists it.

    ``answers``: its port accepted a connection (None: not tried, because it is dead). ``expected``: it was removed on
    purpose. ``dead_for_s``: None while it is alive, or if Ray does not report the time.
    """

    node_id: str
    hostname: str
    address: str
    alive: bool
    answers: bool | None = None
    reason: str = ""
    expected: bool = False
    dead_for_s: float | None = None

    @property
    def host(self) -> str:
        return f"{self.hostname} ({self.address})" if self.hostname != self.address else self.address


@dataclass(frozen=True)
class Clock:
    """A host's clock: ``skew_s`` seconds ahead of the driver's, ± ``uncertainty_s``."""

    skew_s: float
    uncertainty_s: float


@dataclass
class RankObservation:
    """The results of one probe, which runs where a training worker would run.

    ``gpu_ids`` are Ray's. ``model_error``: why the model could not be read here; '' if it could, None if not tried.
    """

    rank: int
    node_id: str
    address: str
    gpu_ids: tuple[str, ...]
    facts: HostFacts
    auth_mode: str | None = None
    head_settings: dict[str, str | None] | None = None
    clock: Clock | None = None
    computed: tuple[Computed, ...] = ()
    storage: RoundTrip | None = None
    model_error: str | None = None

    @property
    def host(self) -> str:
        return f"{self.facts.hostname} ({self.address})"


@dataclass(frozen=True)
class Silent:
    """A probe that did not answer, with the ``stage`` and the error."""

    host: str
    address: str
    stage: str
    reason: str


@dataclass(frozen=True)
class Pair:
    """Two ranks and their measurement; ``times`` is None if the pair was left out."""

    ranks: tuple[int, int]
    times: PairTimes | None = None

    @property
    def failed(self) -> bool:
        return self.times is not None and self.times.error is not None


@dataclass(frozen=True)
class GroupBandwidth:
    """A group of ranks and their bandwidth. ``error``: why it was not measured; neither of them: it was left out.

    ``silent``: the ranks of the group that did not answer, each with the error."""

    axis: Axis
    ranks: tuple[int, ...]
    bandwidth: Bandwidth | None = None
    error: str | None = None
    silent: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Room:
    """The bytes that each rank needs according to the plan, including the reserve that holds no tensors."""

    on_host: bool
    device_bytes: tuple[int, ...]
    host_bytes: tuple[int, ...]
    checkpoint_bytes: int


@dataclass
class Inputs:
    """The check of model and data. ``error``: why they cannot be used; ``late``: the check did not end in time."""

    error: str | None = None
    warnings: tuple[str, ...] = ()
    late: bool = False


@dataclass
class Wanted:
    """The settings of the recipe that `diagnosis` needs."""

    name: str
    storage: str
    local_storage: bool
    gpus_per_worker: int
    min_workers: int
    keep_last: int


@dataclass
class Examination:
    """Everything that was observed. ``ray``: the address of the cluster; None for a Ray that was started here.

    ``mesh``: the recipe's mesh of the ranks, and ``groups`` the bandwidth in its groups, if the workers have places."""

    ray: str | None
    wanted: Wanted | None = None
    driver_auth_mode: str | None = None
    nodes: Sequence[NodeObservation] = ()
    placement_error: str | None = None
    ranks: list[RankObservation] = field(default_factory=list)
    silent: list[Silent] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    mesh: Mesh | None = None
    groups: list[GroupBandwidth] = field(default_factory=list)
    inputs: Inputs | None = None
    room: Room | None = None
    plan_error: str | None = None
    seconds: float = 0.0

    def by_address(self) -> dict[str, list[RankObservation]]:
        found: dict[str, list[RankObservation]] = {}
        for rank in self.ranks:
            found.setdefault(rank.address, []).append(rank)
        return found
