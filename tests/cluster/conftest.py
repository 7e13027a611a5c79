"""Real clusters on this machine (tests/support/hosts.py, slurm.py); skipped, with the reason, where they cannot run.

Each test gets a cluster of its own: a Slurm is up in a third of a second, and what a test broke needs no mending.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.hosts import Hosts
from tests.support.slurm import SlurmCluster

HERE = Path(__file__).parent
LIMIT_S = 120


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.cluster)
            if not item.get_closest_marker("timeout"):
                item.add_marker(pytest.mark.timeout(LIMIT_S))


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    """Three hosts."""
    with Hosts(3) as hosts:
        yield hosts


@pytest.fixture
def slurm() -> Iterator[SlurmCluster]:
    """Three idle nodes with two fake GPUs each."""
    with SlurmCluster(3, gpus=2) as slurm:
        yield slurm
