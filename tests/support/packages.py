"""Packages that are built and installed as users do it."""

from __future__ import annotations

import os
import subprocess
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("launcher", "cluster", "trainer")


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


def site_packages(home: Path) -> Path:
    return next((home / "lib").glob("python*/site-packages"))


def borrow_libraries(home: Path) -> None:
    """Adds this environment's libraries to another one by a path file, without its editable installation of muster."""
    (site_packages(home) / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
