"""Locks between the processes of one host. They are the operating system's (``flock``), which end with their process,
so a killed process leaves no lock behind."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

_IN_USE = "in-use"


def lock_file(path: Path, *, shared: bool = False, wait: bool = True) -> int:
    """Takes the lock, and returns a descriptor whose closing releases it. Raises BlockingIOError when it is held and
    ``wait`` is False."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock inside the context."""
    descriptor = lock_file(path)
    try:
        yield
    finally:
        os.close(descriptor)


def hold_folder(folder: Path) -> int:
    """Makes the folder, and returns a descriptor that marks it as in use until it is closed or this process ends."""
    while True:
        folder.mkdir(mode=0o700, exist_ok=True)
        try:
            descriptor = lock_file(folder / _IN_USE, shared=True)
        except FileNotFoundError:
            continue
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), (folder / _IN_USE).stat()):
                return descriptor
        os.close(descriptor)  # removed between making and locking


def remove_unused(folder: Path) -> None:
    """Removes the folder, unless a process holds it or `hold_folder` never made it."""
    if not (folder / _IN_USE).exists():
        return
    try:
        descriptor = lock_file(folder / _IN_USE, wait=False)
    except (BlockingIOError, FileNotFoundError):
        return
    shutil.rmtree(folder, ignore_errors=True)
    os.close(descriptor)
