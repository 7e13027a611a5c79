"""Environments of the peers that muster is measured against, made once and kept.

A peer whose dependencies are among muster's own gets nothing but itself, and borrows the rest, so that both sides run
on the same torch, transformers and peft. One that wants other versions gets all of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

INSTALL_S = 900


@dataclass(frozen=True)
class Peer:
    """``borrows``: takes everything but itself from this environment."""

    requirement: str
    borrows: bool
    imports: str


PEERS = {
    "trl": Peer("trl==1.16.0", True, "trl"),
    "trl-ppo": Peer("trl==1.8.0", True, "trl.experimental.ppo"),  # later ones have PPO no more
    # It wants peft ≤ 0.18, transformers ≤ 5.6 and a torchaudio, which finds no library of a torch for CPUs.
    "llamafactory": Peer("llamafactory==0.9.5", False, "llamafactory.train.tuner"),
}


class NotInstalled(Exception):
    """Why a peer cannot be measured."""


def home() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "muster-benchmarks"


def python_of(name: str, where: Path) -> str:
    """The Python of a peer's environment below ``where``, which is made unless it is there. Raises NotInstalled."""
    peer, folder = PEERS[name], where / PEERS[name].requirement.replace("==", "-")
    python, whole = str(folder / "bin" / "python"), folder / "installed"
    if whole.exists():
        return python
    try:
        venv.create(folder, with_pip=False, symlinks=True, clear=True)
        without = ["--no-deps"] if peer.borrows else []
        _do([sys.executable, "-m", "pip", "--python", python, "install", "-q", *without, peer.requirement])
        if peer.borrows:
            packages = next((folder / "lib").glob("python*/site-packages"))
            (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
        _do([python, "-W", "ignore", "-c", f"import {peer.imports}"])
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotInstalled(f"{peer.requirement}: {error}") from error
    whole.touch()
    return python


def _do(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S)
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or ["no word why"]
        raise NotInstalled(f"{' '.join(command[-2:])} ended with {done.returncode}: {last[0]}")
