"""The installed ``muster`` command: makes the wheel's tree importable under the names that a checkout uses.

An installed muster lives in one folder, ``site-packages/muster/``, and its modules call each other ``launcher.…`` and
``trainer.…`` as in a checkout. Putting that folder on ``sys.path`` makes both true at once, and child processes
(torchrun, Ray workers) are given the same folder by the driver.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Run the command line; ends the process with the command's exit code."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from trainer.interruption import current

    current.begin()
    from launcher.cli.app import main as cli

    cli()
