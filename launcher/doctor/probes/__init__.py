"""Probes of a rank's host, GPUs and storage, and of its connection to other ranks, before anything trains.

Each function only measures and returns plain data; `launcher.doctor.diagnosis` turns the data into findings.
"""

from launcher.doctor.probes.collectives import Bandwidth, GroupResult, measure_bandwidth
from launcher.doctor.probes.gpus import Computed, Gpu, compute, gpus
from launcher.doctor.probes.host import HostFacts, Memory, Space, examine, memory, shared_memory, space
from launcher.doctor.probes.pair import PairTimes, Timing, meet, open_store
from launcher.doctor.probes.roundtrip import RoundTrip, storage_roundtrip
from launcher.doctor.probes.versions import versions

__all__ = [
    "Bandwidth",
    "Computed",
    "Gpu",
    "GroupResult",
    "HostFacts",
    "Memory",
    "PairTimes",
    "RoundTrip",
    "Space",
    "Timing",
    "compute",
    "examine",
    "gpus",
    "measure_bandwidth",
    "meet",
    "memory",
    "open_store",
    "shared_memory",
    "space",
    "storage_roundtrip",
    "versions",
]
