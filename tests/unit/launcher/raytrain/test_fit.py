"""What Ray Train is asked for, and what its errors mean, without a Ray."""

from __future__ import annotations

import time

from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from launcher.attempt import AttemptFailed, ResizeRequested
from launcher.raytrain.fit import outcome_of, scaling
from trainer.errors import CorruptObject
from trainer.recipe import ResourcesSection
from trainer.run.failure import WorkerError


class Wrapped(Exception):
    """As Ray Train hands over what a training function raised."""

    def __init__(self, inner: BaseException) -> None:
        super().__init__(str(inner))
        self._base_exc = inner


def test_ray_is_asked_for_what_the_recipe_says_of_places() -> None:
    resources = {
        "workers": [1, 4],
        "gpus_per_worker": 2,
        "cpus_per_worker": 3,
        "placement": "spread",
        "accelerator_type": "A100",
        "labels": {"zone": "a"},
    }
    asked = scaling(ResourcesSection.model_validate(resources), 2)
    assert (asked.num_workers, asked.use_gpu, asked.placement_strategy) == (2, True, "SPREAD")
    assert asked.resources_per_worker == {"CPU": 3, "GPU": 2}
    assert (asked.accelerator_type, asked.label_selector) == ("A100", {"zone": "a"})


def test_a_resize_is_no_failure() -> None:
    ended = WorkerGroupError("ended", {0: Wrapped(ResizeRequested("stopped after step 3"))})
    assert isinstance(outcome_of(ended), ResizeRequested)


def test_a_failure_has_its_first_cause() -> None:
    error = WorkerError.of(CorruptObject("x"), time.time(), 0, "host-a", "trace")
    found = outcome_of(WorkerGroupError("failed", {0: Wrapped(error)}))
    assert isinstance(found, AttemptFailed)
    assert (found.cause.message, found.starting) == ("rank 0 on host-a: x", False)


def test_workers_that_could_not_be_started_are_told_apart() -> None:
    class WorkerGroupStartupTimeoutError(Exception):
        pass

    found = outcome_of(ControllerError(WorkerGroupStartupTimeoutError("placement group")))
    assert isinstance(found, AttemptFailed)
    assert found.starting
    assert "did not give the workers their CPUs" in found.cause.message
    other = outcome_of(RuntimeError("Ray has gone"))
    assert isinstance(other, AttemptFailed)
    assert (other.cause.message, other.starting) == ("RuntimeError: Ray has gone", True)
