"""The result of a plan, as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.plan.traffic import Traffic


@dataclass(frozen=True)
class RankPlan:
    """One rank's bytes.

    Kept between steps: ``frozen_bytes`` and ``trainable_bytes`` of parameters, ``gradient_bytes``, ``optimizer_bytes``,
    ``quant_state_bytes`` (scales of quantised weights, not sharded), ``padding_bytes`` (allocated where sharding does
    not divide evenly), ``teacher_bytes`` (weights of a teacher of its own, with padding and scales), ``reward_bytes``
    (weights of a reward model of its own), ``server_bytes`` (the share of a vLLM server). In forward and backward:
    ``activation_bytes`` at their peak, ``unsharded_bytes`` of gathered parameters and their buffers. While texts are
    written: ``writing_bytes`` (keys and values, and what draws a token). In the optimizer's step: ``update_bytes``.

    ``peak_device_bytes`` is the largest sum on the device at one time; ``offloaded_bytes`` are in the host's memory
    instead. ``peak_host_load_bytes``: while the base is loaded; ``peak_host_bytes``: at any time.
    """

    rank: int
    frozen_bytes: int
    trainable_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    quant_state_bytes: int
    padding_bytes: int
    teacher_bytes: int
    reward_bytes: int
    server_bytes: int
    activation_bytes: int
    unsharded_bytes: int
    writing_bytes: int
    update_bytes: int
    offloaded_bytes: int
    peak_device_bytes: int
    peak_host_load_bytes: int
    peak_host_bytes: int


@dataclass(frozen=True)
class Limits:
    """The bytes that each rank may use, None where no limit is known."""

    device: int | None = None
    host: int | None = None


@dataclass(frozen=True)
class Plan:
    """The memory of all ranks. ``fits`` is None without limits.

    ``total_parameters`` and ``trainable_parameters`` count the whole model's elements before quantisation,
    ``adapted_parameters`` and ``quantised_parameters`` those of the base model's weights that have an adapter, and that
    are quantised. ``on_host``:
    the device is the host's own memory (no GPU). ``traffic``: what each rank sends in a step."""

    world_size: int
    total_parameters: int
    trainable_parameters: int
    adapted_parameters: int
    quantised_parameters: int
    ranks: tuple[RankPlan, ...]
    traffic: Traffic
    checkpoint_bytes: int
    tokens_per_step: int
    limits: Limits
    on_host: bool
    device_reserve_bytes: int
    host_reserve_bytes: int
    notes: tuple[str, ...] = ()

    @property
    def largest(self) -> RankPlan:
        """The rank that needs the most device memory; the first of several."""
        return max(self.ranks, key=lambda r: (r.peak_device_bytes, -r.rank))

    @property
    def peak_device_bytes(self) -> int:
        return self.largest.peak_device_bytes

    @property
    def peak_host_bytes(self) -> int:
        return max(r.peak_host_bytes for r in self.ranks)

    @property
    def device_fits(self) -> bool | None:
        limit = self.limits.device
        return None if limit is None else self.peak_device_bytes + self.device_reserve_bytes <= limit

    @property
    def host_fits(self) -> bool | None:
        limit = self.limits.host
        return None if limit is None else self.peak_host_bytes + self.host_reserve_bytes <= limit

    @property
    def fits(self) -> bool | None:
        known = [fit for fit in (self.device_fits, self.host_fits) if fit is not None]
        return all(known) if known else None

    def to_json(self) -> dict[str, Any]:
        return {
            "fits": self.fits,
            "world_size": self.world_size,
            "parameters": {
                "total": self.total_parameters,
                "trainable": self.trainable_parameters,
                "adapted": self.adapted_parameters,
                "quantised": self.quantised_parameters,
            },
            "ranks": [asdict(rank) for rank in self.ranks],
            "sent_bytes": self.traffic._asdict(),
            "checkpoint_bytes": self.checkpoint_bytes,
            "tokens_per_step": self.tokens_per_step,
            "device_memory_bytes": self.limits.device,
            "host_memory_bytes": self.limits.host,
            "device_reserve_bytes": self.device_reserve_bytes,
            "host_reserve_bytes": self.host_reserve_bytes,
            "notes": list(self.notes),
        }
