"""What an examination has seen, as data: nothing of it is judged yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from launcher.doctor.probes import Computed, HostFacts, PairTimes, RoundTrip


@dataclass(frozen=True)
class NodeObservation:
    """A node as Ray lists it. ``answers``: whether its port took a connection (None: not tried, it is dead);
    ``expected``: it was taken away on purpose; ``dead_for_s``: None while it lives, or where Ray does not tell."""

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
    """``skew_s``: how far a host's clock is ahead of the driver's, within ``uncertainty_s`` either way."""

    skew_s: float
    uncertainty_s: float


@dataclass
class RankObservation:
    """One probe, in the place of a training worker. ``gpu_ids`` are Ray's; ``model_error``: why the model could not be
    read here, '' when it could, None when it was not asked."""

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
    """A probe that did not answer: at which ``stage``, and what is known of it."""

    host: str
    address: str
    stage: str
    reason: str


@dataclass(frozen=True)
class Pair:
    """Two ranks that were to meet; ``times`` is None when they were left out."""

    ranks: tuple[int, int]
    times: PairTimes | None = None

    @property
    def failed(self) -> bool:
        return self.times is not None and self.times.error is not None


@dataclass(frozen=True)
class Room:
    """What the plan says that each rank needs, in bytes, with what no tensor gets added to it."""

    on_host: bool
    device_bytes: tuple[int, ...]
    host_bytes: tuple[int, ...]
    checkpoint_bytes: int


@dataclass
class Inputs:
    """``error``: why model or data cannot be used; ``late``: what did not answer in time."""

    error: str | None = None
    warnings: tuple[str, ...] = ()
    late: bool = False


@dataclass
class Wanted:
    """Of the recipe, what the judgement needs."""

    name: str
    storage: str
    local_storage: bool
    gpus_per_worker: int
    min_workers: int
    keep_last: int


@dataclass
class Examination:
    """``ray``: the address that was joined, None for a Ray of this machine's own."""

    ray: str | None
    wanted: Wanted | None = None
    driver_auth_mode: str | None = None
    nodes: Sequence[NodeObservation] = ()
    placement_error: str | None = None
    ranks: list[RankObservation] = field(default_factory=list)
    silent: list[Silent] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    inputs: Inputs | None = None
    room: Room | None = None
    plan_error: str | None = None
    seconds: float = 0.0

    def by_address(self) -> dict[str, list[RankObservation]]:
        found: dict[str, list[RankObservation]] = {}
        for rank in self.ranks:
            found.setdefault(rank.address, []).append(rank)
        return found
