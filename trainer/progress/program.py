"""The word that starts muster in the user's shell, for commands that are printed to be copied."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path


def program() -> str:
    """Returns ``muster``, or the path of its script where the environment that it is installed in is not activated."""
    installed = Path(sys.executable).with_name("muster")
    if shutil.which("muster") or not installed.is_file():
        return "muster"
    return os.path.relpath(installed) if installed.is_relative_to(Path.cwd()) else str(installed)
