"""Packages that are built and installed as users do it."""

from __future__ import annotations

import os
import subprocess
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("launcher", "cluster", "trainer")
LIBRARIES = sysconfig.get_path("purelib")
"""The libraries of this environment, which other ones borrow without its editable installation of muster."""


def run(
    *command: str | Path, cwd: Path, timeout_s: float = 120, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def site_packages(home: Path) -> Path:
    return next((home / "lib").glob("python*/site-packages"))
