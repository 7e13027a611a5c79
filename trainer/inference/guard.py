"""``python -m trainer.inference.guard``: a small process between this one and a server of ours, which ends the server
and every process that it started as soon as this process has ended, however that happened.

vLLM's engine processes do not notice that their server was killed: they keep their memory, and that of the GPU. The
guard adopts them (they become its children), and asks them to end before it kills them, so that they remove their
shared memory.

Its standard input is a pipe from the process that started it. The first line is a `ServerStart` as JSON; the end of the
pipe is the order to stop. On standard output it writes the server's process id. Its exit code is that of the server,
with 128 added to the number of a signal.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from types import FrameType

from trainer.interruption import kill_tree

GRACE_S = 15.0
"""How long the server and what it started may take to end before they are killed."""
_POLL_S = 0.2
# Of <linux/prctl.h>.
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


@dataclass(frozen=True)
class ServerStart:
    """The server's command, its environment, its working folder, and the file that its output is appended to.
    ``temporary``: a folder that is removed once the server was stopped."""

    command: list[str]
    environment: dict[str, str]
    folder: str
    log: str
    temporary: str | None = None

    def line(self) -> bytes:
        return json.dumps(asdict(self)).encode() + b"\n"


class Guard:
    def __init__(self, start: ServerStart) -> None:
        self._parent, self._stopping, self._temporary = os.getppid(), False, start.temporary
        signal.signal(signal.SIGTERM, self._stop)
        _control(_PR_SET_CHILD_SUBREAPER, 1)
        with open(start.log, "ab") as log:
            self._server = subprocess.Popen(
                start.command,
                env=start.environment,
                cwd=start.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # Should the guard itself be killed. SIGTERM lets the server end its own processes.
                preexec_fn=lambda: _control(_PR_SET_PDEATHSIG, signal.SIGTERM),
            )

    @property
    def pid(self) -> int:
        return self._server.pid

    def run(self) -> int:
        """Returns the server's exit code, once nothing of it is left."""
        while self._server.returncode is None and not self._stopping:
            # The pipe's other end may be held by a process that was forked from the one that is gone.
            self._stopping = bool(select.select([0], [], [], _POLL_S)[0]) or os.getppid() != self._parent
            self._reap()
        self._signal_group(signal.SIGTERM)
        self._wait_for_all()
        kill_tree()
        self._signal_group(signal.SIGKILL)
        self._wait_for_all()
        if self._stopping and self._temporary:  # a server that ended by itself may be started again
            shutil.rmtree(self._temporary, ignore_errors=True)
        code = self._server.returncode or 0
        return code if code >= 0 else 128 - code

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopping = True

    def _wait_for_all(self) -> None:
        deadline = time.monotonic() + GRACE_S
        while self._reap() and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def _signal_group(self, number: int) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def _reap(self) -> bool:
        """Collects the processes that have ended, and returns whether any is left."""
        with suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return True
                if pid == self.pid:
                    self._server.returncode = os.waitstatus_to_exitcode(status)
        return False


def _control(option: int, value: int) -> None:
    """Calls prctl, which only Linux has."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def main() -> None:
    guard = Guard(ServerStart(**json.loads(sys.stdin.buffer.readline())))
    print(guard.pid, flush=True)
    sys.exit(guard.run())


if __name__ == "__main__":
    main()
