"""What Ray Train is asked for, and what its errors mean, without a Ray."""

from __future__ import annotations

import time
from inspect import signature

import pytest
import ray
from ray.train.v2.api.config import ScalingConfig
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from launcher.attempt import AttemptFailed, ResizeRequested
from launcher.raytrain.fit import outcome_of, scaling
from trainer.errors import CorruptObject, InputError
from trainer.recipe import ResourcesSection
from trainer.run.failure import WorkerError


class OldScalingConfig:
    """As in Ray 2.52."""

    def __init__(
        self,
        num_workers: int,
        use_gpu: bool,
        resources_per_worker: dict[str, float],
        placement_strategy: str,
        accelerator_type: str | None,
    ) -> None:
        self.num_workers = num_workers


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
    }
    asked = scaling(ResourcesSection.model_validate(resources), 2)
    assert (asked.num_workers, asked.use_gpu, asked.placement_strategy) == (2, True, "SPREAD")
    assert asked.resources_per_worker == {"CPU": 3, "GPU": 2}
    assert asked.accelerator_type == "A100"


@pytest.mark.skipif(
    "label_selector" not in signature(ScalingConfig).parameters, reason=f"Ray Train {ray.__version__} has no labels"
)
def test_ray_is_asked_for_the_labels_of_nodes() -> None:
    asked = scaling(ResourcesSection.model_validate({"labels": {"zone": "a"}}), 2)
    assert asked.label_selector == {"zone": "a"}


def test_labels_need_a_ray_train_that_knows_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.raytrain.fit.ScalingConfig", OldScalingConfig)
    assert scaling(ResourcesSection(), 2).num_workers == 2
    with pytest.raises(InputError, match=r"resources.labels: Ray Train .* cannot place workers by the labels"):
        scaling(ResourcesSection.model_validate({"labels": {"zone": "a"}}), 2)


def test_a_worker_that_ends_while_it_is_started_is_told_in_a_line() -> None:
    class WorkerGroupStartupFailedError(Exception):
        pass

    trace = (
        "One of the worker actors failed to initialize due to error:\nTraceback (most recent call last):\n"
        '  File "worker_group.py", line 494, in _create_workers\n'
        "ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task.\n\tpid: 15275\n"
    )
    found = outcome_of(ControllerError(WorkerGroupStartupFailedError(trace)))
    assert str(found) == (
        "a worker ended while it was started: The actor died unexpectedly before finishing this task."
    )


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
