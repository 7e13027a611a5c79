"""Plays a new user's first hour in a terminal, and prints what the terminal shows and how long each command takes."""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path

from tests.first_hour.hour import plain, play, quickstart, recipe, training
from tests.first_hour.inputs import make_base


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.first_hour", description=__doc__)
    parser.add_argument("--venv", type=Path, help="use the libraries of this environment, and install nothing")
    venv = parser.parse_args().venv
    with tempfile.TemporaryDirectory(prefix="hour-", dir="/tmp") as folder:  # Ray's sockets need a short path
        chapters = (quickstart, recipe, training, plain)
        user = play(Path(folder), chapters, make_base, venv, partial(print, flush=True))
    for step in user.steps:
        print(f"{step.seconds:7.1f} s  {step.command}")
    own = user.steps[-6:]
    print(f"{sum(step.seconds for step in own):7.1f} s  the last {len(own)}: from two files to an answer")


if __name__ == "__main__":
    main()
