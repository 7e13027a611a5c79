"""Weights of the sources in the loss: by hand, whatever the packs and micro-batches are, and never in an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.looping import Bench, bench
from tests.support.models import CPU, stir
from tests.support.nights import few_by_day
from tests.support.tasks import task_recipe, write_task_data
from trainer.data import Batch, eval_batches
from trainer.data.run_data import RunData
from trainer.errors import RecipeError
from trainer.recipe import Recipe, parse
from trainer.recipe.tasks import TASKS

LEARNING = [name for name, row in TASKS.items() if not row.generates]
WEIGHTS = (1.0, 0.25, 3.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    for task in TASKS.names():
        write_task_data(folder, task)
    return folder


def recipe_of(task: str, name: str, model: Path, folder: Path, weights: Any = WEIGHTS, **changes: Any) -> Recipe:
    """A run over as many sources as there are weights, which are parts of the same file."""
    plain = task_recipe(task, name, model, folder)
    (source,) = plain.model_dump(mode="json", exclude_unset=True)["data"]["train"]
    sources = [{**source, "limit": 12 + 6 * i, "loss_weight": weight} for i, weight in enumerate(weights)]
    return task_recipe(task, name, model, folder, **{"data.train": sources, "adapter.dropout": 0.0, **changes})


def gradients(b: Bench, batches: list[Batch], weights: Any = WEIGHTS) -> tuple[float, torch.Tensor]:
    """The loss of a step and its gradient, with these weights of the sources."""
    sources = [s.model_copy(update={"loss_weight": w}) for s, w in zip(b.recipe.data.train, weights, strict=True)]
    data = b.recipe.data.model_copy(update={"train": tuple(sources)})
    b.task.recipe = b.recipe.model_copy(update={"data": data})
    b.model.zero_grad(set_to_none=True)
    total = torch.zeros(())
    for batch in batches:
        if b.task.prepares_steps:
            with torch.no_grad():
                b.task.prepare_step(b.model, [batch], CPU)
        total = total + b.task.loss(b.model, batch, CPU).loss_sum
    total.backward()  # type: ignore[no-untyped-call]
    return total.item(), torch.cat([p.grad.flatten() for p in b.strategy.trainable().values() if p.grad is not None])


@pytest.mark.parametrize("task", LEARNING)
def test_each_unit_counts_by_the_weight_of_its_source(task: str, tiny_model: Path, folder: Path) -> None:
    """The weighted gradient is the sum of each source's own gradient times its weight."""
    quiet = {"sft.neftune_alpha": None} if task == "sft" else {}
    with bench(recipe_of(task, "units", tiny_model, folder, **quiet)) as b:
        stir(b.model, 0.1)
        b.model.train()
        steps = b.stream.prefetch(b.stream.start(), 0, 1)
        batches = [batch for _ in range(2) for batch in next(steps).batches]
        assert {int(source) for batch in batches for source in batch.sources} == {0, 1, 2}
        for batch in batches:
            assert batch.sources.tolist() == [int(name.split(":")[0]) for name in batch.sample_ids]
            assert len(batch.target_sources) == batch.target_tokens
        loss, gradient = gradients(b, batches)
        by_hand, total = torch.zeros_like(gradient), 0.0
        for source, weight in enumerate(WEIGHTS):
            # The other sources' units have a weight of nearly 0, which leaves all else as it is.
            value, slope = gradients(b, batches, [1.0 if i == source else 1e-30 for i in range(3)])
            by_hand, total = by_hand + weight * slope, total + weight * value
        assert loss == pytest.approx(total, rel=1e-5)
        assert float((gradient - by_hand).norm() / by_hand.norm()) < 1e-5
        unweighted, other = gradients(b, batches, (1.0, 1.0, 1.0))
        assert abs(loss - unweighted) > 0.01 * unweighted
        assert float((gradient - other).norm() / other.norm()) > 0.01


@pytest.mark.parametrize("task", LEARNING)
def test_evaluations_have_no_weights(task: str, tiny_model: Path, folder: Path) -> None:
    with bench(recipe_of(task, "evaluated", tiny_model, folder)) as b:
        b.model.eval()
        assert b.data.eval is not None
        batch = next(eval_batches(b.data.eval, 4, 0, 1))
        weighted = b.task.eval_loss(b.model, batch, CPU).loss_sum.item()
        b.task.recipe = recipe_of(task, "evaluated", tiny_model, folder, (1.0, 1.0, 1.0))
        assert b.task.eval_loss(b.model, batch, CPU).loss_sum.item() == weighted


def test_targets_of_a_pack_have_the_weights_of_their_samples(tiny_model: Path, folder: Path) -> None:
    """The loss by hand: each sample's mean likelihood alone, times its weight."""
    changes = {"sft.neftune_alpha": None, "sft.label_smoothing": 0.0, "data.sequence_length": 192}
    with bench(recipe_of("sft", "packs", tiny_model, folder, **changes)) as b:
        stir(b.model)
        b.model.train()
        batch = next(b.stream.prefetch(b.stream.start(), 0, 1)).batches[0]
        assert batch.samples > len(batch.input_ids), "packs hold several samples"
        losses = b.task.head.losses(b.model, batch, CPU).detach()
        starts = (batch.position_ids == 0).ravel().cumsum()[batch.targets.ravel()]
        sample = [list(dict.fromkeys(starts.tolist())).index(start) for start in starts.tolist()]
        wanted = sum(WEIGHTS[int(batch.sample_ids[s][0])] * float(x) for s, x in zip(sample, losses, strict=True))
        assert b.task.loss(b.model, batch, CPU).loss_sum.item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("task", few_by_day(["sft", "dpo"], 1))
def test_micro_batches_do_not_change_the_result(task: str, tiny_model: Path, folder: Path) -> None:
    curves = []
    for micro in (1, 2, 4):
        changes: dict[str, Any] = {"training.micro_batch": micro, "training.steps": 3}
        if task == "sft":
            changes |= {"sft.neftune_alpha": None, "sft.label_smoothing": 0.2}
        with bench(recipe_of(task, f"micro{micro}", tiny_model, folder, **changes)) as b:
            b.run()
            curves.append([(row["loss"], row["grad_norm"]) for row in b.rows])
    for curve in curves[1:]:
        assert [x for row in curve for x in row] == pytest.approx([x for row in curves[0] for x in row], rel=1e-5)


def test_the_weight_decides_neither_tokens_nor_order(tiny_model: Path, folder: Path) -> None:
    def data_of(name: str, weights: Any) -> tuple[RunData, list[list[str]]]:
        with bench(recipe_of("sft", name, tiny_model, folder, weights)) as b:
            steps = b.stream.prefetch(b.stream.start(), 0, 1)
            return b.data, [batch.sample_ids for batch in next(steps).batches]

    (one, ids), (other, other_ids) = data_of("one", (1.0, 1.0)), data_of("other", (1.0, 7.0))
    assert one.train.spec.fingerprint == other.train.spec.fingerprint
    assert ids == other_ids


def test_a_stored_recipe_without_a_weight_has_the_weight_one(tiny_model: Path, folder: Path) -> None:
    stored = recipe_of("sft", "stored", tiny_model, folder, (1.0,)).model_dump(mode="json")
    del stored["data"]["train"][0]["loss_weight"], stored["sft"]
    again = parse(stored)
    assert again.data.train[0].loss_weight == 1.0
    assert (again.sft.neftune_alpha, again.sft.label_smoothing) == (None, 0.0)


def test_weights_without_an_effect_are_refused(tiny_model: Path, folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"data.train.1.loss_weight: has no effect with task ppo"):
        recipe_of("ppo", "refused", tiny_model, folder)
    held_out = [{"path": "x.jsonl", "format": "completion", "loss_weight": 2.0}]
    with pytest.raises(RecipeError, match=r"data.eval.0.loss_weight: has no effect on an evaluation"):
        recipe_of("sft", "refused", tiny_model, folder, (1.0,), **{"data.eval": held_out})
    with pytest.raises(RecipeError, match="loss_weight"):
        recipe_of("sft", "refused", tiny_model, folder, (0.0,))
