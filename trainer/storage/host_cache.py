"""The folder of this host for copies of remote objects: ``$MUSTER_CACHE``, or a default for each kind of copy.

Several users may have set it to one folder. The files that a process loads from there decide what it computes, and for
a model with its own code what it runs. So no user gets another user's copies or waits for another user's locks.
"""

from __future__ import annotations

import os
from pathlib import Path


def host_cache(otherwise: Path) -> Path:
    """Returns the folder, which need not exist: for the user who owns it the folder itself, for any other user a folder
    inside."""
    given = os.environ.get("MUSTER_CACHE")
    root = Path(given).expanduser() if given else otherwise
    try:
        owner = root.stat().st_uid
    except OSError:  # it does not exist yet, or cannot be reached: making it raises the error
        return root
    return root if owner == os.geteuid() else root / f"user-{os.geteuid()}"


def make_own(folder: Path) -> None:
    """Makes the folder, and those above it, for this user alone. Raises PermissionError where it belongs to another
    user, who could put anything there."""
    for part in reversed([folder, *folder.parents]):
        if not part.exists():
            part.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.geteuid():
        raise PermissionError(f"{folder} belongs to another user; set MUSTER_CACHE to a folder of your own")
