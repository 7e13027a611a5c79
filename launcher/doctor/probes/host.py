"""The facts about this host as a rank sees it: name, memory, disks, shared memory and clock."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.doctor.probes.gpus import Gpu, gpus
from launcher.doctor.probes.versions import versions

SHARED_MEMORY = "/dev/shm"
CGROUPS = "/sys/fs/cgroup"


@dataclass(frozen=True)
class Space:
    """Disk space at ``path``: the requested folder, or its nearest parent that exists."""

    path: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class Memory:
    """Memory of the host, or of the container or job that limits this process, whichever is less."""

    total_bytes: int
    available_bytes: int


@dataclass(frozen=True)
class HostFacts:
    """The result of `examine`. ``disks``: the temporary folder and the requested ones, by purpose."""

    hostname: str
    pid: int
    cpus: int
    versions: dict[str, str | None]
    gpus: tuple[Gpu, ...]
    memory: Memory
    disks: dict[str, Space]
    shared_memory: Space | None
    time_s: float  # Unix time


def examine(visible: str | None, folders: Sequence[tuple[str, str]] = ()) -> HostFacts:
    """Collects the facts. ``visible``: the GPUs, as in `gpus`; ``folders``: (purpose, path), to read the disk space."""
    places = {"temporary": tempfile.gettempdir(), **dict(folders)}
    return HostFacts(
        hostname=socket.gethostname(),
        pid=os.getpid(),
        cpus=len(os.sched_getaffinity(0)),
        versions=versions(),
        gpus=gpus(visible),
        memory=memory(),
        disks={name: space(path) for name, path in places.items()},
        shared_memory=shared_memory(),
        time_s=time.time(),
    )


def space(path: str) -> Space:
    """Returns the disk space for this user at ``path``, which need not exist."""
    folder = Path(path).absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    usage = shutil.disk_usage(folder)
    return Space(str(folder), usage.total, usage.free)


def shared_memory() -> Space | None:
    """Returns the space in /dev/shm, or None if there is no such folder."""
    return space(SHARED_MEMORY) if os.path.isdir(SHARED_MEMORY) else None


def memory(root: str = CGROUPS) -> Memory:
    import psutil

    host = psutil.virtual_memory()
    total, available = int(host.total), int(host.available)
    for limit, used in _limits(Path(root)):
        total, available = min(total, limit), min(available, max(0, limit - used))
    return Memory(total, available)


def _limits(root: Path) -> list[tuple[int, int]]:
    """Returns (limit, used) in bytes of each control group above this process that has a limit.

    ``inactive_file`` does not count as used, because the kernel can free it at once.
    """
    found = []
    for folder, limit_file, used_file in _groups(root):
        try:
            limit, used = (folder / limit_file).read_text().strip(), int((folder / used_file).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        if limit.isdigit():
            found.append((int(limit), used - int(stat.get("total_inactive_file", stat.get("inactive_file", "0")))))
    return found


def _groups(root: Path) -> list[tuple[Path, str, str]]:
    """Returns (folder, limit file, usage file) of this process's group and its parents, in cgroup versions 1 and 2."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    groups: list[tuple[Path, str, str]] = []
    for number, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if number == "0":
            base, files = root, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            base, files = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        below = base / path.lstrip("/")
        # In a container, the path may be the host's, while the mounted folder is the container's own group.
        groups += [(folder, *files) for folder in (below, *below.parents) if folder.is_relative_to(base)]
    return groups
