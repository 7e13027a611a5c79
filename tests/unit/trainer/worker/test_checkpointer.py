"""A restore fetches a checkpoint once per host."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.distributed.world import World
from trainer.worker.checkpointer import fetched_once_per_host


class Group:
    """Ranks in threads: `gather` returns the values of all."""

    def __init__(self, hosts: Sequence[str]) -> None:
        self.hosts = hosts
        self.barrier = threading.Barrier(len(hosts))
        self.values: list[Any] = [None] * len(hosts)

    def gather(self, rank: int, value: Any) -> list[Any]:
        self.values[rank] = value
        self.barrier.wait(30)
        found = list(self.values)
        self.barrier.wait(30)
        return found


class Rank(World):
    group: Group

    @property
    def host(self) -> str:
        return self.group.hosts[self.rank]

    def all_gather(self, value: Any) -> list[Any]:
        return self.group.gather(self.rank, value)


def restored(hosts: Sequence[str], targets: Sequence[Path]) -> tuple[list[int], list[Path]]:
    """Returns which ranks have fetched, and the folder that each rank has read."""
    fetched: list[int] = []

    class OfGroup(Rank):
        group = Group(hosts)

    def restore(rank: int) -> Path:
        def fetch() -> None:
            fetched.append(rank)
            targets[rank].mkdir(parents=True)

        if rank == 0:
            targets[0].mkdir(parents=True)
        world = OfGroup(rank, len(hosts), rank, torch.device("cpu"))
        with fetched_once_per_host(world, targets[rank], fetch) as files:
            assert files.exists()
        return files

    with ThreadPoolExecutor(len(hosts)) as pool:
        read = list(pool.map(restore, range(len(hosts))))
    return sorted(fetched), read


@pytest.mark.parametrize(
    ("hosts", "fetching", "read"),
    [
        (["a"], [], [0]),
        (["a"] * 4, [], [0, 0, 0, 0]),
        (["a", "b", "c"], [1, 2], [0, 1, 2]),
        (["a", "a", "b", "b", "a", "b"], [2], [0, 0, 2, 2, 0, 2]),
    ],
)
def test_the_first_rank_of_a_host_fetches_for_the_others(
    hosts: list[str], fetching: list[int], read: list[int], tmp_path: Path
) -> None:
    targets = [tmp_path / f"{rank}" / "checkpoint" for rank in range(len(hosts))]
    assert restored(hosts, targets) == (fetching, [targets[rank] for rank in read])


def test_a_rank_that_does_not_see_the_folder_of_its_host_fetches_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Containers of one host have a temporary folder each."""
    targets = [tmp_path / f"{rank}" / "checkpoint" for rank in range(3)]
    monkeypatch.setattr("os.path.isdir", lambda path: False)
    assert restored(["a"] * 3, targets) == ([1, 2], targets)
