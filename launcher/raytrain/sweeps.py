"""Ray as the place of a sweep: `SweepServer` in the process that uses Ray, `SweepRunner` in the driver of the sweep.

Ray is imported later (`launcher.raytrain.tune`), since some of its settings are read only then.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher.child import ChildEnded
from launcher.raytrain.runner import RayRunner
from launcher.raytrain.server import RayServer
from trainer.progress.lines import ProgressLines
from trainer.recipe import Recipe
from trainer.recipe.sections.sweep import SweepSection
from trainer.run.sweep import TrialRecord

if TYPE_CHECKING:
    from launcher.raytrain.trials import Train
    from launcher.raytrain.tune import Tuning


@dataclass(frozen=True)
class SweepPlan:
    """A sweep that is to be run. ``folder``: the URL of its records; ``known``: the trials that have begun; ``mode``:
    the better direction of the metric; ``train``: trains a trial in an actor."""

    name: str
    folder: str
    section: SweepSection
    mode: str
    grace_steps: int
    parallel: int
    known: Sequence[TrialRecord]
    train: Train


class SweepServer(RayServer):
    """The process that uses Ray for a sweep."""

    _tuning: Tuning | None = None
    _stopped = False

    def prepare(self) -> None:
        super().prepare()
        import launcher.raytrain.tune  # noqa: F401

    def sweep(self, plan: SweepPlan) -> str | None:
        """Runs the trials to their ends. Returns why the sweep has to be started again, None if it need not be."""
        from launcher.raytrain.tune import Tuning

        self._tuning = Tuning(plan, tuple(self._variables), joined=self._joined)
        if self._stopped:
            self._tuning.stop()
        return self._tuning.run()

    def stop(self) -> None:
        """No further trial begins. Those that train read the sweep's lease."""
        self._stopped = True  # also for a tuning that is being made
        if self._tuning is not None:
            self._tuning.stop()


class SweepRunner(RayRunner):
    """Ray as the place of a sweep. ``progress`` says what happens to the trials."""

    server = SweepServer

    def __init__(self, recipe: Recipe, address: str | None, progress: ProgressLines) -> None:
        super().__init__(recipe, address)
        self._progress = progress

    def _told(self, text: str) -> None:
        self._progress.say(text)

    def sweep(self, plan: SweepPlan) -> Future[str | None]:
        return self._ray.submit("sweep", plan)

    def stop(self) -> None:
        self._ray.submit("stop")

    def result(self, outcome: Future[str | None]) -> str | None:
        """Returns the result of `sweep`. Raises StartAgain if Ray has gone."""
        try:
            return outcome.result()
        except ChildEnded as ended:
            raise self._gone() from ended
