"""A kind of cluster that is played: what was submitted, what the jobs say, how they end."""

from __future__ import annotations

from typing import ClassVar

from cluster import ClusterError, ClusterJob
from cluster.job import Say


class Played:
    """Stands in the table of kinds; what it did is kept by the class, since each use makes a new one."""

    submitted: ClassVar[list[tuple[ClusterJob, str]]] = []
    cancelled: ClassVar[list[str]] = []
    lines: ClassVar[list[str]] = []
    code = 0
    refusal: ClusterError | None = None
    interrupted = False

    @classmethod
    def reset(cls) -> None:
        cls.submitted, cls.cancelled, cls.lines = [], [], []
        cls.code, cls.refusal, cls.interrupted = 0, None, False

    def render(self, job: ClusterJob) -> str:
        return f"{job.name} {' '.join(job.arguments)}\n"

    def address(self, job: ClusterJob) -> str | None:
        return None

    def submit(self, job: ClusterJob, recipe_path: str) -> str:
        if self.refusal:
            raise self.refusal
        self.submitted.append((job, recipe_path))
        return "42"

    def follow(self, job_id: str, say: Say) -> int:
        for line in self.lines:
            say(line)
        if self.interrupted:
            raise KeyboardInterrupt
        return self.code

    def state(self, job_id: str) -> str | None:
        return "RUNNING"

    def cancel(self, job_id: str, run_uri: str) -> None:
        if self.refusal:
            raise self.refusal
        self.cancelled.append(job_id)
