"""A program of its own, ``python -I sandbox_start.py PROGRAM``: limits its process, and becomes the program's.

It is run by its path and imports the standard library only.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
from contextlib import suppress

CPU_S, MEMORY, FILE, PROCESSES, OPEN_FILES = 5, 2 << 30, 16 << 20, 64, 64
"""Seconds of a core, bytes of address space, bytes of a file, processes and threads, open files."""
PR_SET_PDEATHSIG = 1
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000


def main(program: str) -> None:
    isolated = _isolate()
    _limit(isolated)
    _end_with_parent()
    if isolated and (first := os.fork()):  # the new process is the first of its namespace, which ends with it
        _, status = os.waitpid(first, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    if isolated:
        _end_with_parent()
    os.execv(sys.executable, [sys.executable, "-I", program])


def _isolate() -> bool:
    """Moves this process into namespaces without a network, where the kernel allows it. In the one of processes, none
    outlives the first. Returns True if it worked."""
    user, group = os.getuid(), os.getgid()
    try:
        library = ctypes.CDLL(None, use_errno=True)
        if library.unshare(CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWPID) != 0:
            return False
    except AttributeError:  # not Linux
        return False
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with suppress(OSError), open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    return True


def _limit(isolated: bool) -> None:
    # The kernel counts all processes of the user, unless the user's namespace is new; those of root it never counts.
    limits = {resource.RLIMIT_NPROC: PROCESSES} if isolated else {resource.RLIMIT_NPROC: PROCESSES + _threads()}
    limits |= {
        resource.RLIMIT_CPU: CPU_S,
        resource.RLIMIT_AS: MEMORY,
        resource.RLIMIT_FSIZE: FILE,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_CORE: 0,
    }
    for name, most in limits.items():
        with suppress(ValueError, OSError):  # a lower limit is there already, or the system has none of the kind
            resource.setrlimit(name, (most, most))


def _threads() -> int:
    """Returns the number of threads of this user."""
    count = 0
    for process in filter(str.isdecimal, os.listdir("/proc")) if os.path.isdir("/proc/self") else ():
        with suppress(OSError):  # it has ended
            if os.stat(f"/proc/{process}").st_uid == os.getuid():
                count += len(os.listdir(f"/proc/{process}/task"))
    return count


def _end_with_parent() -> None:
    """Has the kernel kill this process when its parent ends. Call it after the last change of namespaces, which would
    undo it."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1])
