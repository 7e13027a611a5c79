"""What a rank can find out about its host, its GPUs, its storage and its way to another rank, before anything trains.

Every function only looks, and says what it saw as plain data; what follows from it is decided elsewhere."""

from trainer.probe.gpus import Computed, Gpu, compute, gpus
from trainer.probe.host import HostFacts, Memory, Space, examine, memory, shared_memory, space
from trainer.probe.pair import PairTimes, Timing, meet, open_store
from trainer.probe.roundtrip import RoundTrip, storage_roundtrip
from trainer.probe.versions import versions

__all__ = [
    "Computed",
    "Gpu",
    "HostFacts",
    "Memory",
    "PairTimes",
    "RoundTrip",
    "Space",
    "Timing",
    "compute",
    "examine",
    "gpus",
    "meet",
    "memory",
    "open_store",
    "shared_memory",
    "space",
    "storage_roundtrip",
    "versions",
]
