"""Where this host keeps copies of what lies elsewhere: ``$MUSTER_CACHE``, or a place of each kind's own.

Several users may have set it to one folder. What a process loads from there decides what it computes, and of a model
with code of its own what it runs; so nobody is given another user's copies, and nobody waits for another's locks.
"""

from __future__ import annotations

import os
from pathlib import Path


def host_cache(otherwise: Path) -> Path:
    """The folder, which need not be there: of the user who made it as it is, of any other one a folder inside."""
    given = os.environ.get("MUSTER_CACHE")
    root = Path(given).expanduser() if given else otherwise
    try:
        owner = root.stat().st_uid
    except OSError:  # not there yet, or not to be reached: whoever makes it says so
        return root
    return root if owner == os.geteuid() else root / f"user-{os.geteuid()}"


def make_own(folder: Path) -> None:
    """Makes the folder, and those above it, for this user alone. Raises PermissionError where it is another user's, who
    could put anything there."""
    for part in reversed([folder, *folder.parents]):
        if not part.exists():
            part.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.geteuid():
        raise PermissionError(f"{folder} belongs to another user; set MUSTER_CACHE to a folder of your own")
