"""A clone of this repository, as a new user has it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NOT_THE_USERS = (
    "CI",
    "OMP_NUM_THREADS",
    "PYTHONPATH",
    "PYTHONDONTWRITEBYTECODE",
    "RAY_",
    "MUSTER_",
    "AWS_",
    "VIRTUAL_ENV",
)
"""Variables, by their beginnings, that come from who plays the hour."""
COMMAND = """\
#!{python}
import sys
from launcher.entry import main
if __name__ == "__main__":
    sys.exit(main())
"""


def clone(folder: Path) -> Path:
    """Clones the repository into ``folder``, with what is changed here and not committed; returns the checkout."""
    checkout = folder / "muster"
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", ROOT, checkout], check=True)
    changes = ["git", "-C", ROOT, "--no-optional-locks", "diff", "--binary", "HEAD"]
    patch = subprocess.run(changes, check=True, capture_output=True).stdout
    subprocess.run(["git", "-C", checkout, "apply", "--allow-empty"], input=patch, check=True)
    return checkout


def reuse(venv: Path, checkout: Path) -> None:
    """Makes the checkout's .venv of another environment's libraries, so that `make` finds everything installed."""
    own = checkout / ".venv"
    subprocess.run([venv / "bin" / "python", "-m", "venv", "--without-pip", own], check=True)
    (packages,) = own.glob("lib/python*/site-packages")
    libraries = venv.absolute() / packages.relative_to(own)
    # Paths alone: the files in it that lead to another checkout are not read.
    (packages / "reused.pth").write_text(f"{checkout}\n{libraries}\n")
    command = own / "bin" / "muster"
    command.write_text(COMMAND.format(python=own / "bin" / "python"))
    command.chmod(0o755)
    (own / ".installed").touch()


def environment(home: Path) -> dict[str, str]:
    """The variables of a user without any settings, whose home is empty, and whose shell finds no muster yet."""
    home.mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(NOT_THE_USERS)}
    path = (entry for entry in kept["PATH"].split(":") if not Path(entry, "muster").exists())
    changed = {"HOME": str(home), "PATH": ":".join(path), "LANG": "C.UTF-8", "VIRTUAL_ENV_DISABLE_PROMPT": "1"}
    return kept | changed
