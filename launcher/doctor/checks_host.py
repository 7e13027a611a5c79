"""Checks of one host at a time: its GPUs, disks and shared memory."""

from __future__ import annotations

from collections.abc import Iterator

from launcher.doctor.findings import Finding, failure, warning
from launcher.doctor.observations import Examination, RankObservation
from launcher.doctor.probes import Gpu

GIB = 2**30
# For logs, spilled objects and a checkpoint during upload; on a full disk Ray creates no objects.
TEMPORARY_FAIL = 1 * GIB
TEMPORARY_WARN = 5 * GIB
FULL_SHARE = 0.95  # Ray's own limit: above it, objects are no longer written to disk
SHARED_FAIL = 64 * 2**20  # a container's default, which one NCCL rank can fill
SHARED_WARN = 1 * GIB
HOT_C = 90


def gpus(seen: Examination) -> Iterator[Finding]:
    needs_gpu = seen.wanted is not None and seen.wanted.gpus_per_worker > 0
    reported: set[tuple[str, str]] = set()
    for rank in seen.ranks:
        if needs_gpu and not seen.placement_error and not rank.facts.gpus:
            do = "check nvidia-smi and the CUDA build of torch on that host, or set resources.gpus_per_worker=0"
            yield failure(rank.host, "has no GPU that torch or nvidia-smi sees, though Ray gave it one", do)
        for gpu in rank.facts.gpus:
            if (rank.address, gpu.uuid) not in reported:
                reported.add((rank.address, gpu.uuid))
                yield from _gpu(rank, gpu)


def _gpu(rank: RankObservation, gpu: Gpu) -> Iterator[Finding]:
    where = f"{rank.host} GPU {gpu.index} ({gpu.name})"
    for problem in gpu.problems:
        do = "remove the host from the cluster; reset the GPU (`nvidia-smi -r`) or reboot; if that fails, replace it"
        yield failure(where, problem, do)
    for reason in gpu.slow:
        yield warning(
            where,
            f"is {reason}",
            "check the cooling and the power of the host: the whole run waits for its slowest GPU",
        )
    if gpu.temperature_c is not None and gpu.temperature_c >= HOT_C:
        yield warning(where, f"is at {gpu.temperature_c} °C", "check the cooling of the host")
    for computed in rank.computed:
        if computed.uuid == gpu.uuid and computed.error:
            do = "check that torch is a CUDA build for this driver, that the GPU is free, and `dmesg` for Xid errors"
            yield failure(where, f"does not compute: {computed.error}", do)


def memory_and_disks(seen: Examination) -> Iterator[Finding]:
    for there in seen.by_address().values():
        facts, host = there[0].facts, there[0].host
        temporary = facts.disks["temporary"]
        used = 1 - temporary.free_bytes / max(1, temporary.total_bytes)
        what = f"{gib(temporary.free_bytes)} free in {temporary.path}, {used:.0%} used"
        do = "free space there, or set TMPDIR and `ray start --temp-dir` to a larger disk"
        if temporary.free_bytes < TEMPORARY_FAIL:
            yield failure(host, what, do)
        elif temporary.free_bytes < TEMPORARY_WARN or used > FULL_SHARE:
            yield warning(host, what, do)
        shared = facts.shared_memory
        if shared is None:
            yield warning(host, "has no /dev/shm", "mount a tmpfs there: Ray and NCCL share memory through it")
            continue
        what = f"/dev/shm has {gib(shared.total_bytes)}, {gib(shared.free_bytes)} free"
        do = "enlarge it (docker: --shm-size=8g; Kubernetes: cluster.kubernetes.shared_memory), or delete files in it"
        if shared.free_bytes < SHARED_FAIL:
            yield failure(host, what, do)
        elif shared.total_bytes < SHARED_WARN:
            yield warning(host, what, do)


def gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.0f} MiB"
