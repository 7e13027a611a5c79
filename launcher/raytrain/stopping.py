"""The rules that stop trials early: Ray Tune's schedulers, whose decisions are recorded before anything acts on them.

A trial that is to stop goes on for Tune: its record says that it stops (`trainer.run.sweep`), its workers commit, and
then it ends by itself. Tune's own way kills a process that needs more than ten seconds for that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from trainer.recipe.sections.sweep import SweepSection

VALUE, STEP, REPLAYED = "value", "step", "replayed"
"""Keys of a trial's results: the metric, the optimizer step, and True for a result of which was decided before."""
LAST_STEP = 10**12

Stop = Callable[[int, int], None]
"""Gets the number of a trial that is to stop, and the step."""


class Decides(FIFOScheduler):
    """A scheduler of Tune that gives its decisions to ``stop``, and learns from replayed results without a decision."""

    stop: Stop

    def record(self, controller: Any, trial: Any, result: Mapping[str, Any]) -> None:
        """Learns from a result. Its decision has no effect."""

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if result.get(REPLAYED):
            self.record(controller, trial, result)
        elif super().on_trial_result(controller, trial, result) == TrialScheduler.STOP:  # and not for PAUSE
            self.stop(trial.config["number"], result[STEP])
        return str(TrialScheduler.CONTINUE)

    def on_trial_complete(self, controller: Any, trial: Any, result: dict[str, Any]) -> None:
        if VALUE in result:  # not of a trial that failed
            super().on_trial_complete(controller, trial, result)


class Never(Decides):
    pass


class Asha(Decides, ASHAScheduler):
    def record(self, controller: Any, trial: Any, result: Mapping[str, Any]) -> None:
        ASHAScheduler.on_trial_result(self, controller, trial, dict(result))


class Median(Decides, MedianStoppingRule):
    def record(self, controller: Any, trial: Any, result: Mapping[str, Any]) -> None:
        MedianStoppingRule.on_trial_complete(self, controller, trial, dict(result))


def never(section: SweepSection, mode: str, grace_steps: int) -> Decides:
    return Never()  # type: ignore[no-untyped-call]


def asha(section: SweepSection, mode: str, grace_steps: int) -> Decides:
    return Asha(
        time_attr=STEP,
        metric=VALUE,
        mode=mode,
        max_t=max(LAST_STEP, grace_steps),  # trials end by themselves
        grace_period=grace_steps,
        reduction_factor=section.reduction_factor,
    )


def median(section: SweepSection, mode: str, grace_steps: int) -> Decides:
    return Median(time_attr=STEP, metric=VALUE, mode=mode, grace_period=grace_steps)
