"""Folders that runs share, next to the runs: prepared data (``_data/…``) and copies of models (``_models/…``).

A run that exists names in its own records what it uses. A run that begins does so only later, so it announces its use
in the shared folder. `muster gc` deletes a folder that no run names and that is older than a day. Both sides write
first and look afterwards:

    the run    U1 writes ``used``         U2 looks for ``condemned``; if it is there, the folder counts as missing
    gc         G1 writes ``condemned``    G2 lists the folder, then reads the records of all runs    G3 deletes

A store shows what was written before. So if U1 comes before the listing of G2, gc sees a ``used`` of this day and
spares the folder. Otherwise U2 comes after G1, and the run sees ``condemned``. The day covers the time from U1 to the
record in the run. A preparation that takes longer writes windows all the time, and each makes the folder young again.
Ages are differences between times that the store itself gave to objects of one folder, so no clocks are compared.

gc deletes the object that completes a folder first (``manifest.json``, ``config.json``), then what it names, and
``condemned`` last. A deletion that was interrupted therefore leaves an incomplete folder, never a wrong one; the next
`muster gc` continues it. Another gc leaves the folder alone for ten minutes, for two must not delete in turns.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from trainer.errors import InputError
from trainer.storage import ObjectInfo, Storage

USED, CONDEMNED = "used", "condemned"
YOUNG_S = 86400.0
BUSY_S = 600.0
"""A ``condemned`` of this age may be that of a gc which still deletes."""
COMPLETING = ("manifest.json", "config.json")


def announce_use(folder: Storage) -> bool:
    """Does U1 and U2 for a run or a preparation that begins to use ``folder``. Returns False while gc deletes it.

    A folder that this user may only read is used without a word. Until the run names it, its owner's gc may delete it.
    """
    with suppress(InputError):
        folder.write_json(USED, {})
    return folder.info(CONDEMNED) is None


def delete_unless_used(folder: Storage, is_named: Callable[[], bool]) -> bool:
    """Does G1 to G3. ``is_named``: reads the records of all runs, and returns True if one of them names the folder.
    Returns False if the folder is in use, and stays."""
    folder.write_json(CONDEMNED, {})
    try:
        found = folder.list(containing=[CONDEMNED])
        if age_s(found) < YOUNG_S or is_named():
            folder.delete([CONDEMNED])
            return False
    except BaseException:
        folder.delete([CONDEMNED])  # nothing is deleted yet
        raise
    keys = [info.key for info in found if info.key != CONDEMNED]
    folder.delete(key for key in keys if key in COMPLETING)
    folder.delete(key for key in keys if key.endswith(".index"))
    folder.delete(key for key in keys if key not in COMPLETING and not key.endswith(".index"))
    folder.delete([CONDEMNED])
    return True


def age_s(condemned: list[ObjectInfo]) -> float:
    """Returns the seconds between the newest object of a folder's listing and its ``condemned``."""
    at = max(info.modified for info in condemned if info.key == CONDEMNED)
    return at - max((info.modified for info in condemned if info.key != CONDEMNED), default=0.0)
