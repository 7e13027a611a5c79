"""One start of a run at a time on a host.

Before the lease is taken, a start holds a Ray with its processes. Several starts in the same moment, of a script or a
service, would each start one, only to find all but one that the run is held.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from trainer.errors import RunHeld
from trainer.storage.host_cache import make_own
from trainer.storage.locks import lock_file

log = logging.getLogger(__name__)


@contextmanager
def one_at_a_time(run_url: str, *, takeover: bool = False) -> Iterator[IO[str] | None]:
    """Holds the run's start on this host until the block ends or the file that it yields is closed; RunHeld when
    another process of this user does. Where no such file can be made, the lease alone decides (None)."""
    name = hashlib.sha256(run_url.encode()).hexdigest()[:32]
    path = Path(tempfile.gettempdir(), f"muster-{os.getuid()}", "starting", name)
    try:
        make_own(path.parent)
        file = None if takeover else os.fdopen(lock_file(path, wait=False), "r+")
    except BlockingIOError:
        raise RunHeld(
            f"process {path.read_text() or 'unknown'} on {os.uname().nodename} is starting {run_url}; look at it with "
            f"`muster status {run_url}`"
        ) from None
    except OSError as error:
        log.debug("no file keeps other starts of %s on this host apart: %s", run_url, error)
        file = None
    if file is None:
        yield None
        return
    with file:
        file.truncate(0)
        print(os.getpid(), end="", file=file, flush=True)
        yield file
