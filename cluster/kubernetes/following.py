"""Follows a job: reads its state every few seconds, and prints the lines of the pod that has the run's output."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack

from cluster.job import ClusterError, Say
from cluster.kubernetes.kinds import KINDS
from cluster.kubernetes.kubectl import Kubectl, ProcessLines
from cluster.kubernetes.reading import INTERRUPTED, Fields, newest_started, waits_for

POLL_S = 3.0
PATIENCE_S = 600.0
"""Time for which the cluster may not answer before `follow` raises an error; the job continues."""


class Follower:
    """Follows one job, once. ``sleep`` waits while no pod has output."""

    def __init__(
        self, kubectl: Kubectl, resource: str, name: str, say: Say, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._kubectl, self._resource, self._name, self._say, self._sleep = kubectl, resource, name, say, sleep
        self._kind = KINDS[resource]
        self._said: dict[str, object] = {}
        self._away_s = 0.0
        self._pod: str | None = None
        self._last = ""
        self._lines: ProcessLines | None = None
        self._streams = ExitStack()

    def follow(self) -> int:
        """Returns muster's exit code. Raises ClusterError if the cluster did not answer for ten minutes."""
        with self._streams:
            while (code := self._look()) is None:
                self._pass_on()
            return code

    def _look(self) -> int | None:
        try:
            made = self._kubectl.get(self._resource, self._name)
            if made is None:
                self._say(
                    f"{self._resource} {self._name} no longer exists: it was deleted, or its time to live was over"
                )
                return INTERRUPTED
            reading = self._kind.reading(made)
            self._once("state", reading.state, f"{self._resource} {self._name}: {reading.state}")
            if reading.exit_code is None:
                self._watch_pods(made)
                self._away_s = 0.0
                return None
        except ClusterError as error:
            if error.usage or self._away_s >= PATIENCE_S:
                raise
            self._once("away", str(error), f"{error}; trying again")
            self._away_s += POLL_S
            return None
        self._finish()
        if reading.detail:
            self._say(reading.detail)
        return reading.exit_code

    def _once(self, about: str, value: object, text: str) -> None:
        if self._said.get(about) != value:
            self._said[about] = value
            self._say(text)

    def _watch_pods(self, made: Fields) -> None:
        mine, speaking = self._kind.selectors(self._name, made)
        if self._lines is None and mine:
            reasons = waits_for(self._kubectl.list("pods", mine))
            self._said.setdefault("reasons", [])
            if reasons:
                self._once("reasons", reasons, "waiting for " + "; ".join(reasons))
        if self._lines is None:
            self._open(newest_started(self._kubectl.list("pods", speaking)))

    def _open(self, pod: str | None) -> None:
        if pod is None:
            return
        if pod != self._pod:
            self._pod, self._last = pod, ""
        self._lines = self._streams.enter_context(self._kubectl.logs(pod, self._kind.container, self._last or None))

    def _pass_on(self) -> None:
        """Prints new lines for one interval. A stream that broke is opened again in the next one."""
        if self._lines is None:
            self._sleep(POLL_S)
            return
        until = time.monotonic() + POLL_S
        while (left := until - time.monotonic()) > 0:
            line = self._lines.next(left)
            if line is None and self._lines.ended:
                self._streams.close()
                self._lines = None
                self._sleep(min(left, POLL_S))
                return
            if line is not None:
                self._say_line(line)

    def _say_line(self, line: str) -> None:
        """Prints a line unless it was printed before: a new stream repeats the lines of its first second."""
        moment, _, text = line.partition(" ")
        if moment > self._last:
            self._last = moment
            self._say(text)

    def _finish(self) -> None:
        """Prints the rest of the ended job's lines; its pod ends the stream."""
        if self._lines is None:
            try:
                self._open(newest_started(self._kubectl.list("pods", self._kind.selectors(self._name, {})[1])))
            except ClusterError:
                return
        until = time.monotonic() + POLL_S
        while self._lines is not None and not self._lines.ended and (left := until - time.monotonic()) > 0:
            if (line := self._lines.next(left)) is not None:
                self._say_line(line)
