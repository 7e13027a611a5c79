"""The actor of a trial: the driver of a run, on the Ray that the sweep has connected to."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from ray import tune

from cluster.job_environment import VARIABLES
from launcher.capacity import Node
from launcher.raytrain.environment import Environment
from launcher.raytrain.nodes import answering, nodes_of_cluster
from launcher.raytrain.runner import RayAttempt
from launcher.raytrain.session import DRIVER_SETTINGS
from launcher.raytrain.tasks import ray_map
from trainer.data.prepare.executor import Map
from trainer.errors import StartAgain
from trainer.recipe import Recipe
from trainer.worker.job import Job

log = logging.getLogger(__name__)

Results = Generator[dict[str, Any], None, None]
MakeRunner = Callable[[Recipe], "ConnectedRunner"]
Train = Callable[[int, MakeRunner], Results]
"""Trains a trial by its number. Gives its results, the last one with ``done``; closed, it has ended the run."""


@dataclass(frozen=True)
class Crew:
    """The things that every actor needs. ``environment``: that of the sweep's driver; ``joined``: Ray is a cluster, and
    not of this machine's own."""

    train: Train
    environment: Environment
    joined: bool


class TrialActor(tune.Trainable):
    """One trial after another, each until its run has ended."""

    def setup(self, config: dict[str, Any], crew: Crew | None = None) -> None:
        assert crew is not None, "tune.with_parameters gives it"
        self._crew = crew
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._results.close()
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        return next(self._results)

    def cleanup(self) -> None:
        self._results.close()

    def _begin(self, config: dict[str, Any]) -> None:
        for name, value in DRIVER_SETTINGS.items():
            os.environ.setdefault(name, value)
        for name in VARIABLES:
            os.environ.pop(name, None)
        self._crew.environment.apply()  # again for each trial: Tune may change the working directory
        self._results = self._crew.train(config["number"], partial(ConnectedRunner, joined=self._crew.joined))


class ConnectedRunner:
    """The Ray of this process as the place where attempts run (`launcher.driver.attempts.Runner`)."""

    def __init__(self, recipe: Recipe, *, joined: bool) -> None:
        self._resources, self._variables, self._joined = recipe.resources, recipe.cluster.env, joined
        self._environment = Environment.current(self._variables)
        self._pool = ThreadPoolExecutor(1, "fit")

    def __enter__(self) -> ConnectedRunner:
        return self

    def __exit__(self, *exc: object) -> None:
        """Ray stays connected, for the next trial."""

    def await_resources(self, expected_nodes: int, stopped: Callable[[], bool]) -> None:
        """No effect: the sweep has waited for them, and an attempt waits for nodes that are lost now."""

    def ask_for(self, workers: int) -> None:
        """No effect: the sweep has asked for the workers of all trials, and a request replaces the one before."""

    def map(self, stopped: Callable[[], bool]) -> Map:
        return ray_map(self._environment, None, stopped)

    def map_beside(self, stopped: Callable[[], bool]) -> Map:
        return ray_map(self._environment, self._resources, stopped)

    def nodes(self) -> Sequence[Node]:
        return answering(self.all_nodes())

    def all_nodes(self) -> Sequence[Node]:
        try:
            return nodes_of_cluster()
        except Exception:
            log.exception("the cluster's nodes could not be looked at")
            return []

    def start(self, job: Job, workers: int) -> RayAttempt:
        from launcher.raytrain.fit import fit

        variables = self._variables if self._joined else {}
        return RayAttempt(self._pool.submit(fit, job, workers, self._environment, variables), _gone)


def _gone() -> StartAgain:
    return StartAgain("Ray has gone; the same command resumes from the newest checkpoint once it is up")


def environment_of_trials(variables: Sequence[str]) -> Environment:
    """Returns this process's environment for the actors: as for workers, and in which job it runs."""
    return Environment.current((*variables, *VARIABLES))
