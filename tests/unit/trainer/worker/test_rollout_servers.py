"""Texts of servers in training: whose adapter writes them, that they are stored before they are learned from, and what
a kill, a server without memory and a broken object change."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.dying import train_until
from tests.support.fake_vllm import FakeVLLM, serving
from tests.support.tasks import task_recipe, write_task_data
from tests.support.training import adapter_bytes, run_of, train_here
from trainer.errors import EngineFailed, InputError, RecipeError
from trainer.inference.host import API_KEY, HostState
from trainer.inference.receiver import AdapterFolder, AdapterReceiver
from trainer.recipe import Recipe
from trainer.run import layout
from trainer.run.jsonl import read_rows
from trainer.strategies.ddp import DDP
from trainer.tasks.rollouts.task import RolloutTask

Make = Callable[..., Recipe]
STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("servers")
    for task in ("grpo", "ppo"):
        write_task_data(folder, task)
    return folder


@pytest.fixture
def fake(tiny_model: Path) -> Iterator[FakeVLLM]:
    made = FakeVLLM(tiny_model)
    with serving(made):
        yield made


@pytest.fixture
def make(tiny_model: Path, folder: Path, fake: FakeVLLM, request: pytest.FixtureRequest) -> Make:
    def recipe(suffix: str = "", task: str = "grpo", **changes: Any) -> Recipe:
        name = "".join(c if c.isalnum() else "-" for c in request.node.name).strip("-").lower()[-50:] + suffix
        settings = {
            "rollout": {"engine": "vllm", "addresses": [fake.address]},
            "training.steps": STEPS,
            "checkpoint.every_steps": 2,
            "data.eval": [],
            "training.eval_every": None,
        }
        return task_recipe(task, name.strip("-"), tiny_model, folder, **{**settings, **changes})

    return recipe


def writers(fake: FakeVLLM) -> list[int]:
    """The versions of the adapters that texts were asked of, in their order."""
    texts = [body for body in fake.completions() if body["model"] != "base"]
    return list(dict.fromkeys(int(body["model"].rpartition("-")[2]) for body in texts))


def metrics(recipe: Recipe) -> list[dict[str, Any]]:
    return [row for row in read_rows(run_of(recipe), layout.METRICS) if "loss" in row]


def stored_steps(recipe: Recipe) -> list[int]:
    steps = [layout.parse_rollouts(info.key) for info in run_of(recipe).list(layout.ROLLOUTS)]
    return sorted(step for step in steps if step)


@pytest.mark.parametrize("task", ["grpo", "ppo"])
def test_each_step_is_written_with_the_weights_before_it(make: Make, fake: FakeVLLM, task: str) -> None:
    recipe = make(task=task)
    assert train_here(recipe) == "succeeded"
    assert writers(fake) == [0, 1, 2, 3]
    assert stored_steps(recipe) == [1, 2, 3, 4]
    rows = metrics(recipe)
    assert [row["staleness_max"] for row in rows] == [0.0] * STEPS
    if task == "grpo":
        assert all(row["logp_mismatch"] < 1e-4 and abs(row["importance_weight"] - 1) < 1e-4 for row in rows)
    assert len(fake._models) == 2, "older adapters are removed"


def test_with_a_staleness_of_one_the_next_texts_are_written_meanwhile(make: Make, fake: FakeVLLM) -> None:
    recipe = make(**{"rollout.max_staleness": 1})
    assert train_here(recipe) == "succeeded"
    assert writers(fake) == [0, 1, 2]
    assert [row["staleness_max"] for row in metrics(recipe)] == [0.0, 1.0, 1.0, 1.0]
    assert stored_steps(recipe) == [1, 2, 3, 4]


@pytest.mark.parametrize("staleness", [0, pytest.param(1, marks=pytest.mark.night)])
def test_a_killed_run_learns_from_the_stored_texts(make: Make, fake: FakeVLLM, staleness: int) -> None:
    """Killed in step 3, whose texts are stored; the newest checkpoint is that of step 2."""
    more = {"rollout.max_staleness": staleness}
    whole, killed = make("-whole", **more), make("-killed", **more)
    assert train_here(whole) == "succeeded"
    train_until(killed, DDP, "step", 2 * 2 + 1)  # two updates in a step
    before = {step: run_of(killed).read(layout.rollouts(step)) for step in stored_steps(killed)}
    assert list(before) == [1, 2, 3]
    asked = len(fake.completions())
    assert train_here(killed) == "succeeded"
    assert {step: run_of(killed).read(layout.rollouts(step)) for step in before} == before
    rewritten = {body["model"] for body in fake.completions()[asked:]} - {"base"}
    assert {int(name.rpartition("-")[2]) for name in rewritten} <= {2, 3}
    if staleness == 0:  # the fake's texts depend on their seeds only, as all of the run's then do
        assert adapter_bytes(killed) == adapter_bytes(whole)


@pytest.mark.night
def test_texts_that_cannot_be_read_are_written_again(make: Make, fake: FakeVLLM) -> None:
    whole, killed = make("-whole"), make("-killed")
    assert train_here(whole) == "succeeded"
    train_until(killed, DDP, "step", 2 * 2 + 1)
    run_of(killed).write(layout.rollouts(3), b"broken")
    assert train_here(killed) == "succeeded"
    assert adapter_bytes(killed) == adapter_bytes(whole)


def test_a_server_that_forgets_its_adapters_gets_them_again(make: Make, fake: FakeVLLM) -> None:
    plain, whole = RolloutTask.prepare_step, make("-whole")
    assert train_here(whole) == "succeeded"

    def forgetting(self: Any, *given: Any) -> None:
        fake.forget()
        plain(self, *given)

    forgotten = make("-forgotten", **{"rollout.max_staleness": 0})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RolloutTask, "prepare_step", forgetting)
        assert train_here(forgotten) == "succeeded"
    assert adapter_bytes(forgotten) == adapter_bytes(whole)


def test_a_server_of_another_adapter_ends_the_attempt(make: Make, fake: FakeVLLM) -> None:
    fake.faults.model = "another"
    with pytest.raises(EngineFailed, match="was asked for a text of"):
        train_here(make())


def test_a_key_is_sent_to_given_servers(make: Make, fake: FakeVLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.api_key = "a-secret-of-this-test"
    with pytest.raises(InputError, match="401"):
        train_here(make("-without"))
    monkeypatch.setenv(API_KEY, fake.api_key)
    recipe = make("-with", **{"training.steps": 1})
    assert train_here(recipe) == "succeeded"
    run = run_of(recipe)
    assert not [info.key for info in run.list() if fake.api_key.encode() in run.read(info.key)]


def test_a_host_gets_the_adapters_and_no_folder_is_shared(
    make: Make, fake: FakeVLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server reads what the host has received, and loses its adapters in between."""
    fake.api_key = key = "a-secret-of-this-test"
    monkeypatch.setenv(API_KEY, key)
    state = HostState(port=fake.port, folder=str(tmp_path / "received"), state="ready", why="", log="")
    host = AdapterReceiver("127.0.0.1", 0, key, AdapterFolder(tmp_path / "received"), lambda: state)
    host.start()
    read: list[str] = []
    plain, shared = fake._load, make("-shared")

    def load(body: Any) -> tuple[int, Any]:
        read.append(body["lora_path"])
        fake.forget()
        return plain(body)

    monkeypatch.setattr(fake, "_load", load)
    assert train_here(shared) == "succeeded"
    read.clear()
    recipe = make("-host", **{"rollout": {"engine": "vllm", "addresses": [host.address]}})
    assert train_here(recipe) == "succeeded"
    host.close()
    assert len({Path(path) for path in read}) == STEPS
    assert {Path(path).parent for path in read} == {tmp_path / "received"}
    assert len(list((tmp_path / "received").iterdir())) == 2, "older adapters are removed"
    assert adapter_bytes(recipe) == adapter_bytes(shared)
    run = run_of(recipe)
    assert not [info.key for info in run.list() if key.encode() in run.read(info.key)]


def test_servers_beside_the_training_need_ray(make: Make) -> None:
    recipe = make(**{"rollout": {"engine": "vllm", "vllm": {"python": "/opt/vllm/bin/python", "servers": 2}}})
    with pytest.raises(InputError, match=r"Ray places them, and torchrun runs without it; train with `muster run`"):
        train_here(recipe)


MISTAKES = [
    ({"rollout": {"engine": "vllm", "vllm": {"servers": 2}}}, "engine vllm needs servers: give addresses"),
    ({"rollout.vllm": {"servers": 2}}, "has no effect on servers that run already"),
    ({"rollout": {"engine": "vllm", "vllm": {"python": "p", "servers": 0}}}, "must be at least 1, got 0"),
    ({"rollout": {"engine": "vllm"}}, "engine vllm needs servers: give addresses, or vllm.python to start some"),
    ({"rollout": {"engine": "openai"}}, "engine openai needs servers: give addresses"),
    ({"rollout": {"addresses": ["http://h:1"]}}, "has no effect with engine transformers"),
    ({"adapter.method": "dora"}, "takes LoRA's matrices only, and method dora"),
    ({"rollout.vllm": {"tensor_parallel": 2}}, "has no effect on servers that run already"),
]


@pytest.mark.parametrize(("change", "said"), MISTAKES)
def test_what_a_recipe_cannot_ask_for(make: Make, change: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as found:
        make(**change)
    assert said in str(found.value)


def test_a_run_that_ends_early_does_not_wait_for_the_texts_in_work(make: Make, fake: FakeVLLM) -> None:
    """The texts of the next step are asked for, and the server never answers."""
    recipe = make(**{"rollout.max_staleness": 1})
    plain, calls = RolloutTask.prepare_ahead, [0]

    def ahead(self: Any, *given: Any) -> None:
        calls[0] += 1
        fake.faults.hang = threading.Event()
        plain(self, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RolloutTask, "prepare_ahead", ahead)
        assert train_here(recipe, lambda: calls[0] > 0) == "interrupted"
    alive = [thread for thread in threading.enumerate() if thread.name == "rollouts"]
    assert alive
    assert all(thread.daemon for thread in alive)
    assert metrics(recipe)[-1]["step"] == 1
