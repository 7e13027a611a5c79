"""What a failure is told with: where, the lines that matter, what it probably means, and what to try."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from launcher.driver.failure_advice import advise
from tests.support.planning import plan_recipe
from trainer.errors import NonFiniteLoss, StorageError, note_where, where_of
from trainer.recipe import Recipe, load
from trainer.run.failure import Failure, WorkerError, useful_stack
from trainer.run.symptoms import SYMPTOMS

RUN = "/runs/x"
OOM = (
    "rank 1 on a: step 3, forward of micro-batch 1: OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. "
    "GPU 0 has a total capacity of {} GiB of which 1.00 GiB is free."
)


@pytest.fixture
def recipe(tmp_path) -> Recipe:
    return plan_recipe(tmp_path)


@pytest.mark.parametrize(
    ("message", "likely", "then"),
    [
        (
            "rank 0 on a: RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory",
            "host's memory",
            "plan",
        ),
        ("rank 1 died: RuntimeError: The worker was killed: out of memory.", "host's memory", "muster plan"),
        ("rank 0 on a: OSError: [Errno 28] No space left on device: '/tmp/x'", "disk is full", "TMPDIR"),
        ("rank 0 on a: OSError: [Errno 24] Too many open files", "open files", "ulimit -n"),
        ("rank 0 on a: RuntimeError: CUDA error: device-side assert triggered", "kernel", "CUDA_LAUNCH_BLOCKING=1"),
        ("rank 2 on a: RuntimeError: NCCL error: unhandled system error", "network", "muster doctor RECIPE"),
        ("rank 1 on b died (after step 3): RuntimeError: killed: out of memory.", "host's memory", "muster plan"),
        ("rank 2 on b died (step 3, optimizer): ActorDiedError", "killed", f"muster logs {RUN} --rank 2"),
        ("rank 2 died: ActorDiedError: The actor died unexpectedly", "killed", f"muster logs {RUN} --rank 2"),
    ],
)
def test_each_symptom_is_told_apart(recipe, message, likely, then):
    said = advise(Failure(message, 2), recipe, RUN)
    assert likely in said.splitlines()[0]
    assert then in said.splitlines()[1]


def test_every_symptom_has_a_case_above_or_below():
    messages = [case[0] for case in test_each_symptom_is_told_apart.pytestmark[0].args[1]] + [OOM.format(1)]
    firsts = {next(i for i, symptom in enumerate(SYMPTOMS) if symptom.sign.search(text)) for text in messages}
    assert firsts == set(range(len(SYMPTOMS)))


def test_a_full_gpu_is_answered_with_what_the_plan_says_would_fit(recipe, monkeypatch):
    asked = []

    def make(recipe, device, *others):
        asked.append(device)
        fits = [] if device > 100 << 30 else [SimpleNamespace(overrides=("strategy.kind=fsdp", "resources.workers=8"))]
        return SimpleNamespace(suggestions=fits)

    monkeypatch.setattr("launcher.plan.estimate.make", make)
    said = advise(Failure(OOM.format("23.50"), 1), recipe, RUN)
    assert "the GPU's memory is full" in said
    assert said.endswith("according to the plan, one of these fits: strategy.kind=fsdp resources.workers=8")
    roomy = advise(Failure(OOM.format("500.00"), 1), recipe, RUN)
    assert "muster plan RECIPE --gpu-memory 500GiB" in roomy
    assert asked == [int(23.5 * (1 << 30)), 500 << 30]


def test_a_plan_that_cannot_be_made_leaves_the_command(recipe, monkeypatch):
    monkeypatch.setattr("launcher.plan.estimate.make", lambda *given: 1 / 0)
    assert "--gpu-memory 3GiB" in advise(Failure(OOM.format("3.00"), 1), recipe, RUN)


def test_what_explains_itself_gets_no_advice(recipe):
    assert advise(Failure("rank 0 on a: step 3: the loss is not finite (rank 0: samples 0:7)", 0), recipe, RUN) == ""
    assert advise(Failure("rank 0 on a: KeyError: 'x'", 0, trace="line"), recipe, RUN).endswith("has all of it")


def test_a_storage_whose_connection_is_reset_says_itself_what_to_do(recipe):
    away = WorkerError.of(StorageError("could not write s3://b/x: connection reset"), 1.0, 1, "a", "").cause
    assert advise(away, recipe, RUN) == ""


def test_where_it_came_up_is_told_and_the_nearest_stays():
    error = ValueError("bad shape")
    note_where(error, "step 3, optimizer")
    note_where(error, "loading the model")
    assert where_of(error) == "step 3, optimizer"
    assert str(WorkerError.of(error, 1.0, 1, "a", "")) == "rank 1 on a: step 3, optimizer: ValueError: bad shape"
    assert str(WorkerError.of(NonFiniteLoss("step 3: no"), 1.0, 1, "a", "")) == "rank 1 on a: step 3: no"


def test_of_the_stack_the_own_lines_and_the_last_are_shown():
    def outer(text):
        return json.loads(text)

    try:
        try:
            outer("{")
        except ValueError as error:
            raise RuntimeError("later") from error
    except RuntimeError as error:
        shown = useful_stack(error)
    assert "decoder.py" in shown.splitlines()[0]
    assert "scan_once" in shown
    assert "later" not in shown
    try:
        load("/nowhere/recipe.yaml")
    except Exception as error:
        own = useful_stack(error)
    assert "trainer/recipe" in own


def test_an_error_that_was_never_raised_has_no_stack():
    assert useful_stack(ValueError("x")) == ""
