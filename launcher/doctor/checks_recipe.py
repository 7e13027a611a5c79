"""Checks of what a recipe needs: storage, model, data, and the memory and disk space of its plan."""

from __future__ import annotations

from collections.abc import Iterator

from launcher.doctor.checks_host import gib
from launcher.doctor.findings import Finding, failure, warning
from launcher.doctor.observations import Examination, Room

SLOW_STEP_S = 3.0


def storage(seen: Examination) -> Iterator[Finding]:
    if seen.wanted is None or not seen.ranks:
        return
    gone = {silent.address for silent in seen.silent}
    tried = [rank for rank in seen.ranks if rank.storage is not None and rank.address not in gone]
    url = seen.wanted.storage
    if not tried and not seen.silent:
        yield failure(url, "no host could try the storage in time", f"check the network to {url}, then run this again")
    failed = False
    for rank in tried:
        assert rank.storage is not None
        if rank.storage.error:
            failed = True
            do = "correct the address, permissions or credentials (AWS_*), or choose another storage with storage=…"
            yield failure(f"{rank.host}: {url}", rank.storage.error, do)
        elif rank.storage.same_place is False:
            failed = True
            do = "give all hosts the same storage: a shared file system, or s3://…"
            yield failure(f"{rank.host}: {url}", "is not the place that the other hosts write to", do)
        elif (slowest := max(rank.storage.seconds.items(), key=lambda step: step[1]))[1] > SLOW_STEP_S:
            do = "check the network to the storage; checkpoints are uploaded during training, and take longer"
            yield warning(f"{rank.host}: {url}", f"{slowest[0]} took {slowest[1]:.1f} s", do)
    if tried and not failed and any(rank.storage and rank.storage.conditional is False for rank in tried):
        what = "has no conditional put: two drivers that start a run at the same moment cannot detect each other"
        yield warning(url, what, "start each run from one place only, or use a store that has it (S3, Ceph, MinIO, …)")


def inputs(seen: Examination) -> Iterator[Finding]:
    if seen.inputs is None:
        return
    error = seen.inputs.error
    if error:
        do = "correct the recipe, or the model or data that it names; `muster validate --inputs` checks them again"
        yield failure("model and data", error, do)
    elif seen.inputs.late:
        do = "check the connection to model and data; `muster validate --inputs` reads them without a time limit"
        yield failure("model and data", "were not read in time", do)
    for text in seen.inputs.warnings:
        yield warning("the recipe", text, "change the recipe, or continue if this is intended")
    gone = {silent.address for silent in seen.silent}
    for rank in seen.ranks:
        if rank.model_error and rank.model_error != error and rank.address not in gone:
            do = "put the model where every host can read it: a shared folder, an object store, or the Hub"
            yield failure(rank.host, f"cannot read the model: {rank.model_error}", do)


def room(seen: Examination) -> Iterator[Finding]:
    """Compares the plan with the GPU memory, host memory and disk space that are free now.

    GPUs and host memory are compared only if the probes run in the places of the recipe's workers.
    """
    if seen.plan_error is not None and not (seen.inputs and seen.inputs.error):
        do = "run `muster plan` for details; without a plan, missing memory is noticed only when training starts"
        yield warning("the plan", f"could not be made: {seen.plan_error}", do)
    if seen.room is None:
        return
    if not seen.placement_error:
        yield from _devices(seen, seen.room)
        yield from _hosts(seen, seen.room)
    yield from _local_storage(seen, seen.room)


def _devices(seen: Examination, room: Room) -> Iterator[Finding]:
    for rank, needed in zip(seen.ranks, room.device_bytes, strict=False):
        if room.on_host or not rank.facts.gpus:
            continue
        gpu = rank.facts.gpus[0]
        if needed > gpu.free_bytes:
            others = gpu.free_bytes < 0.9 * gpu.total_bytes
            free = f"{gib(gpu.free_bytes)} free of {gib(gpu.total_bytes)}"
            what = f"needs {gib(needed)} on GPU {gpu.index}, which has {free}"
            do = "stop the other processes on it (nvidia-smi), or see" if others else "see"
            yield failure(f"rank {rank.rank} on {rank.host}", what, f"{do} what `muster plan` suggests instead")


def _hosts(seen: Examination, room: Room) -> Iterator[Finding]:
    for there in seen.by_address().values():
        needed = sum(room.host_bytes[rank.rank] for rank in there if rank.rank < len(room.host_bytes))
        free = there[0].facts.memory.available_bytes
        if needed > free:
            who = f"rank {there[0].rank} needs" if len(there) == 1 else f"{len(there)} ranks need"
            what = f"{who} {gib(needed)} of host memory together, and {gib(free)} are free"
            do = (
                "stop other processes there, put fewer workers on it (resources.placement=spread), or see `muster plan`"
            )
            yield failure(there[0].host, what, do)


def _local_storage(seen: Examination, room: Room) -> Iterator[Finding]:
    """Checks a local storage for ``keep_last`` checkpoints, one that is being written, and the final adapter."""
    if seen.wanted is None or not seen.wanted.local_storage:
        return
    needed = room.checkpoint_bytes * (seen.wanted.keep_last + 2)
    for there in list(seen.by_address().values())[:1]:
        disk = there[0].facts.disks.get("storage")
        if disk is not None and disk.free_bytes < needed:
            what = f"{gib(disk.free_bytes)} free in {disk.path}, and the checkpoints that are kept take {gib(needed)}"
            yield failure(
                there[0].host, what, "free space there, keep fewer (checkpoint.keep_last), or choose another storage"
            )
