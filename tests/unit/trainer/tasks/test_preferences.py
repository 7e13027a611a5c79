"""Learning from preferences: the losses by hand, and a reference that is the base."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.looping import Bench, bench
from tests.support.models import CPU, stir
from tests.support.tasks import task_recipe, write_task_data
from trainer.data import Batch
from trainer.errors import RecipeError
from trainer.recipe import Recipe, parse
from trainer.tasks.reference import adapter_off


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preferences")
    for task in ("reward", "dpo"):
        write_task_data(folder, task)
    return folder


def first_batch(b: Bench) -> Batch:
    batch = next(b.stream.prefetch(b.stream.start(), 0, 1)).batches[0]
    assert batch.input_ids.shape[0] == 2 * batch.pairs == 4
    return batch


def rows_of(batch: Batch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each answer with its prompt, without pads: tokens and targets. Chosen ones come first."""
    lengths = [int(positions.max()) + 1 for positions in batch.position_ids]
    return [
        (torch.from_numpy(ids[None, :n]), torch.from_numpy(targets[:n]))
        for ids, targets, n in zip(batch.input_ids, batch.targets, lengths, strict=True)
    ]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_the_reward_loss_is_bradley_and_terrys_with_margins(tiny_model: Path, folder: Path) -> None:
    with bench(task_recipe("reward", "hand", tiny_model, folder)) as b:
        stir(b.model)
        b.model.eval()
        steps = b.stream.prefetch(b.stream.start(), 0, 1)
        batch = next(batch for step in steps for batch in step.batches if batch.margins.any())
        loss, sums = b.task.loss(b.model, batch, CPU)
        with torch.no_grad():
            rewards = [float(b.model(input_ids=ids).logits[0, 0]) for ids, _ in rows_of(batch)]
        chosen, rejected = rewards[: batch.pairs], rewards[batch.pairs :]
        pairs = list(zip(chosen, rejected, batch.margins.tolist(), strict=True))
        assert loss.item() == pytest.approx(-sum(math.log(sigmoid(c - r - m)) for c, r, m in pairs), rel=1e-5)
        assert float(sums["right"]) == sum(c > r for c, r, _ in pairs)
        said = b.task.step_metrics(sums)
        assert said["reward_margin"] == pytest.approx((sum(chosen) - sum(rejected)) / batch.pairs, rel=1e-4)


def likelihood(model: Any, ids: torch.Tensor, target: torch.Tensor) -> float:
    """log p of the targets of one sequence, from all of its logits."""
    with torch.no_grad():
        log_p = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    return sum(float(log_p[at - 1, ids[0, at]]) for at in torch.nonzero(target)[:, 0].tolist())


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_dpo_loss_is_the_papers(tiny_model: Path, folder: Path, smoothing: float, method: str) -> None:
    """Against the base, loaded once more as a model of its own."""
    from transformers import AutoModelForCausalLM

    changes = {"dpo.label_smoothing": smoothing, "dpo.beta": 0.3, "adapter.method": method}
    with bench(task_recipe("dpo", "hand", tiny_model, folder, **changes)) as b:
        stir(b.model, 0.1)
        b.model.eval()
        batch = first_batch(b)
        with torch.no_grad():
            b.task.prepare_step(b.model, [batch], CPU)
        loss, sums = b.task.loss(b.model, batch, CPU)
        base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        gained = [likelihood(b.model, *row) - likelihood(base, *row) for row in rows_of(batch)]
        rewards = [0.3 * gain for gain in gained]
        wanted = 0.0
        for c, r in zip(rewards[:2], rewards[2:], strict=True):
            wanted -= (1 - smoothing) * math.log(sigmoid(c - r)) + smoothing * math.log(sigmoid(r - c))
        assert abs(wanted - 2 * math.log(2)) > 0.01
        assert loss.item() == pytest.approx(wanted, rel=1e-4)
        assert float(sums["chosen"]) == pytest.approx(sum(rewards[:2]), abs=1e-4)
        assert float(sums["rejected"]) == pytest.approx(sum(rewards[2:]), abs=1e-4)


@pytest.mark.parametrize("change", [{}, {"model.quantization": "nf4"}, {"strategy.kind": "fsdp"}])
def test_dpo_begins_at_the_reference(tiny_model: Path, folder: Path, change: dict[str, Any]) -> None:
    """The adapter begins as nothing: every reward is 0, and the loss log 2. Steps tell the metrics of pairs."""
    changes = {"adapter.dropout": 0.0, "training.steps": 2, "dpo.label_smoothing": 0.0, **change}
    with bench(task_recipe("dpo", "begins", tiny_model, folder, **changes)) as b:
        b.run()
        first, second = b.rows
        assert first["loss"] == pytest.approx(math.log(2), rel=1e-5)
        assert first["reward_chosen"] == pytest.approx(0.0, abs=1e-5)
        assert second["reward_margin"] == pytest.approx(second["reward_chosen"] - second["reward_rejected"])
        assert second["reward_margin"] > 0
        assert second["loss"] < first["loss"]
        row = b.evaluations[0]
        for name in ("loss", "pair_accuracy", "reward_chosen", "reward_rejected", "reward_margin"):
            assert f"eval_{name}" in row
        assert b.rows[0]["target_tokens"] > 6, "the metric counts tokens, whatever the loss is the mean over"


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_adapter_is_off_only_inside(tiny_model: Path, folder: Path, method: str) -> None:
    with bench(task_recipe("dpo", "off", tiny_model, folder, **{"adapter.method": method})) as b:
        stir(b.model)
        b.model.eval()
        trained = list(b.strategy.trainable())
        ids = {"input_ids": torch.arange(4, 20)[None], "use_cache": False}
        with torch.no_grad():
            on = b.model(**ids).logits
            with adapter_off(b.model):
                off = b.model(**ids).logits
                assert list(b.strategy.trainable()) == trained
            again = b.model(**ids).logits
        assert torch.equal(on, again)
        assert (on - off).abs().max() > 0.01
        assert list(b.strategy.trainable()) == trained


def mistakes(recipe: Recipe, **changes: Any) -> str:
    data = recipe.model_dump(mode="json")
    for key, value in changes.items():
        section, name = key.split("__")
        data[section][name] = value
    with pytest.raises(RecipeError) as found:
        parse(data)
    return str(found.value)


def test_what_dpo_cannot_take_is_refused(tiny_model: Path, folder: Path) -> None:
    recipe = task_recipe("dpo", "refused", tiny_model, folder)
    assert "adapter.method none has no adapter" in mistakes(recipe, adapter__method="none")
    assert "takes a part out of the base model" in mistakes(recipe, adapter__method="pissa")
    assert "trains biases of the base" in mistakes(recipe, adapter__bias="all")
    assert "cannot be used with format preference" in mistakes(recipe, data__packing=True)
    source = {"path": "x.jsonl", "format": "preference", "columns": {"margin": "by"}}
    assert "whose loss knows no margin" in mistakes(recipe, data__train=[source])
    assert "dpo does not learn from format completion" in mistakes(
        recipe, data__train=[{"path": "x.jsonl", "format": "completion"}]
    )


@pytest.mark.parametrize(("key", "value"), [("dpo__beta", 0.2), ("classification__average", "micro")])
def test_settings_of_another_task_are_refused(tiny_model: Path, folder: Path, key: str, value: Any) -> None:
    recipe = task_recipe("reward", "other", tiny_model, folder)
    assert f"{key.replace('__', '.')}: has no effect with task reward" in mistakes(recipe, **{key: value})
