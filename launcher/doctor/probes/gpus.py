"""The GPUs that this process may use, their health, and a test computation.

nvidia-smi reports their health; without it, torch at least lists them. Xid errors are in the kernel's log, which a user
may not read: the recovery action and remapped rows are what the driver derives from them.
"""

from __future__ import annotations

import csv
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

MIB = 2**20
SMI_TIMEOUT_S = 10.0
SIDE = 1024
_BASE = ("index", "uuid", "name", "driver_version", "memory.total", "memory.used", "temperature.gpu")
_ECC = "ecc.errors.uncorrected.volatile.total"
_THROTTLE = {
    "clocks_throttle_reasons.hw_thermal_slowdown": "slowed down by heat (hardware)",
    "clocks_throttle_reasons.sw_thermal_slowdown": "slowed down by heat (driver)",
    "clocks_throttle_reasons.hw_power_brake_slowdown": "slowed down by its power supply",
}
_REMAPPED = {
    "remapped_rows.pending": "waits for a reset to remap faulty memory rows",
    "remapped_rows.failure": "could not remap faulty memory rows",
}
_RECOVERY = "gpu_recovery_action"
_FIELDS = (
    (*_BASE, _ECC, *_THROTTLE, *_REMAPPED, _RECOVERY),
    (*_BASE, _ECC, *_THROTTLE, *_REMAPPED),
    (*_BASE, _ECC),
    _BASE,
)
"""Queries, the longest first: a driver that does not know one of the fields refuses the whole query."""


@dataclass(frozen=True)
class Gpu:
    """One GPU. ``problems``: its faults; ``slow``: why its clocks are reduced; None: nvidia-smi does not report it."""

    index: int
    uuid: str
    name: str
    total_bytes: int
    free_bytes: int
    driver: str | None = None
    temperature_c: int | None = None
    ecc_errors: int | None = None
    problems: tuple[str, ...] = ()
    slow: tuple[str, ...] = ()


@dataclass(frozen=True)
class Computed:
    """The result of one matrix product on a GPU: milliseconds, or the error."""

    uuid: str
    ms: float | None = None
    error: str | None = None


def gpus(visible: str | None, ask: Callable[[Sequence[str]], str | None] | None = None) -> tuple[Gpu, ...]:
    """Returns the GPUs of this process.

    ``visible``: comma-separated indices or UUIDs, as in ``CUDA_VISIBLE_DEVICES``; None: all GPUs of the host. ``ask``
    runs a query for the named fields, and returns None if it is refused; nvidia-smi by default.
    """
    ask = ask or _nvidia_smi
    for fields in _FIELDS:
        answer = ask(fields)
        if answer is not None:
            return _visible(parse(answer, fields), visible)
    return _by_torch() if visible != "" else ()


def parse(answer: str, fields: Sequence[str]) -> tuple[Gpu, ...]:
    """Parses nvidia-smi's ``csv,noheader,nounits``, with memory in MiB. Lines that describe no GPU are left out."""
    rows = [[cell.strip() for cell in row] for row in csv.reader(answer.splitlines())]
    named = [dict(zip(fields, row, strict=True)) for row in rows if len(row) == len(fields)]
    return tuple(_gpu(row) for row in named if row["index"].isdigit())


def _gpu(row: dict[str, str]) -> Gpu:
    total, used, ecc = (_number(row.get(name)) for name in ("memory.total", "memory.used", _ECC))
    problems = [text for name, text in _REMAPPED.items() if row.get(name, "").lower() in ("yes", "1")]
    action = row.get(_RECOVERY, "None")
    if action not in ("None", "") and not action.startswith("["):
        problems.append(f"its driver requests: {action}")
    if ecc:
        problems.append(f"{ecc} uncorrected memory errors since the driver was loaded")
    if total is None:
        problems.append("does not report its memory")
    return Gpu(
        index=int(row["index"]),
        uuid=row["uuid"],
        name=row["name"],
        total_bytes=(total or 0) * MIB,
        free_bytes=max(0, (total or 0) - (used or 0)) * MIB,
        driver=row["driver_version"],
        temperature_c=_number(row["temperature.gpu"]),
        ecc_errors=ecc,
        problems=tuple(problems),
        slow=tuple(text for name, text in _THROTTLE.items() if row.get(name) == "Active"),
    )


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None


def _visible(found: tuple[Gpu, ...], visible: str | None) -> tuple[Gpu, ...]:
    if visible is None:
        return found
    names = [name.strip() for name in visible.split(",") if name.strip()]
    chosen = [g for name in names for g in found if name == str(g.index) or g.uuid.startswith(name)]
    # A MIG instance (a part of a GPU) is not in the list, but torch knows it.
    return tuple(chosen) if len(chosen) == len(names) else _by_torch()


def _nvidia_smi(fields: Sequence[str]) -> str | None:
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=SMI_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout if found.returncode == 0 else None


def _by_torch() -> tuple[Gpu, ...]:
    import torch

    if not torch.cuda.is_available():
        return ()
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        found.append(Gpu(index, _uuid(index), properties.name, total, free))
    return tuple(found)


def _uuid(index: int) -> str:
    import torch

    found = str(getattr(torch.cuda.get_device_properties(index), "uuid", index))
    return found if found.startswith(("GPU-", "MIG-")) else f"GPU-{found}"


def compute(expected: Sequence[Gpu]) -> tuple[Computed, ...]:
    """Multiplies two matrices of ones on each GPU, and compares the product with its exact value.

    The first call takes seconds; until the process ends, it uses a few hundred MiB of each GPU.
    """
    import torch

    if not torch.cuda.is_available():
        reason = f"torch {torch.__version__} sees no CUDA device (CUDA build: {torch.version.cuda or 'none'})"
        return tuple(Computed(g.uuid, error=reason) for g in expected)
    seen = {_uuid(index): index for index in range(torch.cuda.device_count())}
    missing = "torch does not see it; CUDA_VISIBLE_DEVICES is " + repr(os.environ.get("CUDA_VISIBLE_DEVICES"))
    return tuple(
        _multiply(g.uuid, seen[g.uuid]) if g.uuid in seen else Computed(g.uuid, error=missing) for g in expected
    )


def _multiply(uuid: str, index: int) -> Computed:
    import torch

    try:
        ones = torch.ones(SIDE, SIDE, device=torch.device("cuda", index))
        product = ones @ ones
        torch.cuda.synchronize(index)
        begin = time.perf_counter()
        product = ones @ ones
        torch.cuda.synchronize(index)
        took_ms = (time.perf_counter() - begin) * 1000
        wrong = int((product != SIDE).sum())
    except RuntimeError as error:
        return Computed(uuid, error=str(error).splitlines()[0])
    return Computed(uuid, error=f"{wrong} of {SIDE * SIDE} products are wrong") if wrong else Computed(uuid, took_ms)
