"""Locks between the processes of one host: those of the operating system (``flock``), which end with their process, so
that a killed one leaves nothing that anybody waits for."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

_IN_USE = "in-use"


def lock_file(path: Path, *, shared: bool = False, wait: bool = True) -> int:
    """A descriptor whose closing gives the lock back. BlockingIOError when it is held and ``wait`` is False."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def hold_folder(folder: Path) -> int:
    """Makes the folder; the descriptor says, until it is closed or this process ends, that the folder is in use."""
    while True:
        folder.mkdir(mode=0o700, exist_ok=True)
        try:
            descriptor = lock_file(folder / _IN_USE, shared=True)
        except FileNotFoundError:
            continue
        if _same(descriptor, folder / _IN_USE):
            return descriptor
        os.close(descriptor)  # removed between making and locking


def remove_unused(folder: Path) -> None:
    """Removes the folder unless a process holds it, or it never was one that is held."""
    if not (folder / _IN_USE).exists():
        return
    try:
        descriptor = lock_file(folder / _IN_USE, wait=False)
    except (BlockingIOError, FileNotFoundError):
        return
    shutil.rmtree(folder, ignore_errors=True)
    os.close(descriptor)


def _same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
