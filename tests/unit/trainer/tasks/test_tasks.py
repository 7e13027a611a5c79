"""Every task: it trains, goes on in the middle as if nothing had been, and leaves what plain peft loads."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from launcher.testing.tasks import CHECKS, Make, continues_in_the_middle_as_if_it_had_not_stopped
from tests.support.looping import Bench, bench
from tests.support.models import stir
from tests.support.nights import few_by_day
from tests.support.tasks import make_encoder, task_recipe, write_task_data
from tests.support.training import losses
from trainer.data import Batch, eval_batches
from trainer.recipe import Recipe
from trainer.recipe.rules.matrix import Cell, refusal
from trainer.recipe.tasks import SEQUENCE, TASKS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    for task in TASKS.names():
        write_task_data(folder, task)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.mark.parametrize("task", TASKS.names())
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check: Callable[[Make], None], task: str, tiny_model: Path, folder: Path) -> None:
    made: dict[str, Recipe] = {}

    def make(name: str) -> Recipe:
        return made.setdefault(name, task_recipe(task, name, tiny_model, folder))

    check(make)
    # The loss of texts that the model writes is another one in every step: test_ppo.py and test_grpo.py have what it
    # learns.
    if check is continues_in_the_middle_as_if_it_had_not_stopped and not TASKS[task].generates:
        curve = losses(made["whole"])
        assert curve[10] < curve[1] - 0.02


def saved_by(b: Bench, target: Path) -> Path:
    target.mkdir()
    snapshot = b.state.snapshot(1, {}, final=True)
    assert snapshot is not None
    b.state.write(snapshot, target)
    return target


def plain_base(recipe: Recipe, labels: tuple[str, ...] | None) -> Any:
    if labels is None:
        return transformers.AutoModelForCausalLM.from_pretrained(recipe.model.path, dtype="float32")
    torch.manual_seed(999)  # a head drawn otherwise than muster draws it, which the adapter has to replace
    return transformers.AutoModelForSequenceClassification.from_pretrained(
        recipe.model.path, num_labels=len(labels), dtype="float32"
    )


def logits(model: Any, batch: Batch) -> torch.Tensor:
    """Of every row by itself, without its pads."""
    rows = []
    with torch.no_grad():
        for ids, positions in zip(batch.input_ids, batch.position_ids, strict=True):
            length = int(positions.max()) + 1
            rows.append(model.eval()(input_ids=torch.from_numpy(ids[None, :length]), use_cache=False).logits[0])
    return torch.cat([row.reshape(-1) for row in rows])


def _peft_runs(method: str, task: str) -> bool:
    """False for keys and values of a classifier whose class takes none, which the inputs' check refuses."""
    takes = inspect.signature(transformers.LlamaForSequenceClassification.forward).parameters
    return not (method == "prefix" and TASKS[task].auto_class == SEQUENCE and "past_key_values" not in takes)


@pytest.mark.parametrize(
    ("task", "method"),
    few_by_day(
        [*product(TASKS.names(), ["lora"]), *product(TASKS.names(), ["dora", "prefix", "none"])], len(TASKS.names())
    ),
)
def test_what_is_saved_gives_the_same_outputs_by_plain_peft(
    task: str, method: str, tiny_model: Path, folder: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    if refusal(Cell(method, "none", "ddp", task)):
        pytest.skip("the recipe refuses it")
    if not _peft_runs(method, task):
        pytest.skip("peft cannot run it with this transformers, and the inputs' check says so")
    with bench(
        task_recipe(task, "reloaded", tiny_model, folder, **{"data.packing": False, "adapter": {"method": method}})
    ) as b:
        stir(b.model)
        target = saved_by(b, tmp_path / "out")
        assert b.data.eval is not None
        batch = next(eval_batches(b.data.eval, 4, 0, 1))
        if b.recipe.adapter.method == "none":
            here = b.recipe.model_copy(update={"model": b.recipe.model.model_copy(update={"path": str(target)})})
            plain = plain_base(here, b.task.labels)
        else:
            plain = PeftModel.from_pretrained(plain_base(b.recipe, b.task.labels), target)
        torch.testing.assert_close(logits(plain, batch), logits(b.model, batch), rtol=0, atol=1e-5)


@pytest.mark.parametrize("task", TASKS.names())
def test_a_checkpoint_is_written_without_touching_the_model(
    task: str, tiny_model: Path, folder: Path, tmp_path: Path
) -> None:
    """It is written by another thread, in the middle of a forward that has gathered the weights."""
    with bench(task_recipe(task, "written", tiny_model, folder, **{"strategy.kind": "fsdp"})) as b:
        snapshot = b.state.snapshot(1, {}, final=True)
        assert snapshot is not None
        for module in b.model.modules():
            if isinstance(module, FSDPModule):
                module.unshard()
        b.state.write(snapshot, tmp_path)
        sharded = [n for n, p in b.model.named_parameters() if isinstance(p, DTensor)]
        assert not sharded
