"""The job of a run on another machine, in plain values, and the interface of every kind of cluster."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


class ClusterError(Exception):
    """A scheduler or cluster is missing, refused the job, or did not answer. ``usage``: the user can fix it."""

    def __init__(self, message: str, usage: bool = True) -> None:
        super().__init__(message, usage)
        self.usage = usage

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class ClusterJob:
    """``recipe`` is the resolved recipe as YAML: nothing reads the user's file after it was made. ``workers`` is
    (min, max); ``replicas`` is the number of copies of the parameters that the largest number of workers keeps;
    ``servers`` is the number of inference servers that Ray places next to the workers (`rollout.vllm.servers`);
    ``settings`` are the recipe's for this kind of cluster; ``command`` is muster's own, with its options
    (``("run", "--takeover")``, ``("doctor",)``) and without the recipe; ``arguments`` are the user's own: the recipe's
    file and the overrides, for what is printed to be used by hand."""

    name: str
    run_uri: str
    recipe: str = field(repr=False)
    workers: tuple[int, int]
    gpus_per_worker: int
    cpus_per_worker: int
    settings: Mapping[str, Any]
    command: tuple[str, ...] = ("run",)
    arguments: tuple[str, ...] = ()
    replicas: int = 1
    servers: int = 0
    gpus_per_server: int = 0

    @property
    def places_per_server(self) -> int:
        """How many workers would have room where a server is; its CPUs are those of one."""
        return max(1, -(-self.gpus_per_server // self.gpus_per_worker)) if self.gpus_per_worker else 1

    @property
    def places(self) -> tuple[int, int]:
        """The workers (min, max) that would have room on nodes for the workers and the servers."""
        low, high = self.workers
        return low + self.servers * self.places_per_server, high + self.servers * self.places_per_server


Say = Callable[[str], None]


class Renderer(Protocol):
    """A kind of cluster whose jobs are rendered; a person submits them."""

    def render(self, job: ClusterJob) -> str:
        """Returns what would be submitted. Pure: contacts and writes nothing."""
        ...

    def address(self, job: ClusterJob) -> str | None:
        """Returns the address of the cluster if it becomes a part of the job's id, which is stored and printed."""
        ...


class Cluster(Renderer, Protocol):
    """A kind of cluster: one file, and one row in `cluster.KINDS`. No method goes through a shell, and each waits for
    a bounded time only, except `follow`, which waits for the job."""

    def submit(self, job: ClusterJob, recipe_path: str) -> str:
        """Submits; returns the job's id in this kind of cluster. ``recipe_path`` is where the job's recipe was frozen,
        a path or URL that the cluster can read. Raises ClusterError."""
        ...

    def follow(self, job_id: str, say: Say) -> int:
        """Passes on the job's output until it ends; returns muster's exit code."""
        ...

    def state(self, job_id: str) -> str | None:
        """Returns the state in the cluster's own word (``PENDING``, ``Running``); None if the job is unknown to it."""
        ...

    def cancel(self, job_id: str, run_uri: str) -> None:
        """Ends the job permanently. A job that has ended already is no error; a job of that name that belongs to
        another run than ``run_uri`` is left alone."""
        ...
