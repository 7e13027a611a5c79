"""One start of a run at a time on a host.

Before the lease is taken, a start holds a Ray with its processes. Several starts in the same moment, of a script or a
service, would each start one, only to find all but one that the run is held.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from trainer.errors import RunHeld

log = logging.getLogger(__name__)


@contextmanager
def one_at_a_time(run_url: str, *, takeover: bool = False) -> Iterator[IO[str] | None]:
    """Holds the run's start on this host until the block ends or the file that it yields is closed; RunHeld when
    another process of this user does. Where no such file can be made, the lease alone decides (None)."""
    file = None if takeover else _opened(run_url)
    if file is None:
        yield None
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise RunHeld(
                f"process {file.read(20) or 'unknown'} on {os.uname().nodename} is starting {run_url}; look at it with "
                f"`muster status {run_url}`"
            ) from None
        file.truncate(0)
        print(os.getpid(), end="", file=file, flush=True)
        yield file


def _opened(run_url: str) -> IO[str] | None:
    folder = Path(tempfile.gettempdir(), f"muster-{os.getuid()}", "starting")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            return None
        path = folder / hashlib.sha256(run_url.encode()).hexdigest()[:32]
        return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+")
    except OSError as error:
        log.debug("no file keeps other starts of %s on this host apart: %s", run_url, error)
        return None
