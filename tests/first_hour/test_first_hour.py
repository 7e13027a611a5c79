"""A new user's first hour, in a terminal: no command shows a library's line, and every mistake is one sentence."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.first_hour.hour import plain, play, quickstart, recipe, training
from tests.first_hour.inputs import make_base
from tests.first_hour.user import LIBRARIES, plain_text


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hour-", dir="/tmp") as made:  # Ray's sockets need a short path
        yield Path(made)


def test_a_recipe_is_written_and_checked(folder: Path, tiny_model: Path) -> None:
    play(folder, (recipe,), lambda base: shutil.copytree(tiny_model, base), Path(sys.prefix))


@pytest.mark.night
@pytest.mark.timeout(5400)
def test_the_first_hour(folder: Path) -> None:
    play(folder, (quickstart, recipe, training, plain), make_base)


@pytest.mark.parametrize(
    "line",
    [
        "Traceback (most recent call last):",
        '  File "/tmp/muster/launcher/entry.py", line 25, in main',
        "/usr/lib/python3/site-packages/torch/cuda/__init__.py:61: a message",
        "FutureWarning: `torch.distributed.reduce_op` is deprecated",
        "[2026-11-30 03:39:49,121] [WARNING] [real_accelerator.py:213:get_accelerator] Setting accelerator to CPU.",
        "2026-11-28 23:25:49,498 ERROR controller.py:925 -- Error in control loop iteration:",
        "W1130 03:39:49.121000 7919 torch/distributed/run.py:774] a message",
        "\x1b[36m(RayTrainWorker pid=7919)\x1b[0m a message",
        "[rank0]: a message",
        "step 1/45\rLoading weights: 100%|████| 30/30 [00:00<00:00, 3872.26it/s]",
    ],
)
def test_a_librarys_line_is_seen_as_one(line: str) -> None:
    assert LIBRARIES.search(plain_text(f"muster: error: a sentence\r\n{line}\r\n"))
