"""Learning from preferences: the losses by hand, and a reference that is the base."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.looping import Bench, bench
from tests.support.models import CPU, stir
from tests.support.tasks import task_recipe, write_task_data
from trainer.data import Batch, eval_batches
from trainer.errors import InputError, RecipeError
from trainer.recipe import Recipe, parse
from trainer.recipe.dpo_losses import DPO_LOSSES
from trainer.tasks.reference import adapter_off
from trainer.worker.start.stored_outputs import with_outputs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preferences")
    for task in ("reward", "dpo", "kto"):
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


def gains(b: Bench, batch: Batch) -> list[float]:
    """How far the model is from the base, loaded once more as a model of its own, for each answer of the batch."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(b.recipe.model.path, dtype=torch.float32)
    return [likelihood(b.model, *row) - likelihood(base, *row) for row in rows_of(batch)]


def computed(b: Bench, batch: Batch) -> tuple[float, Any]:
    b.model.eval()
    with torch.no_grad():
        b.task.prepare_step(b.model, [batch], CPU, 1)
        loss, sums = b.task.loss(b.model, batch, CPU)
    return loss.item(), sums


BETA, NOISE, TAU = 0.3, 0.2, 0.4


def by_hand(loss: str, c: float, r: float, c_tokens: int, r_tokens: int) -> float:
    """The losses from log-ratios and numbers of tokens, in the notation of their papers."""
    delta = BETA * (c - r)
    if loss == "sigmoid":
        return -(1 - NOISE) * math.log(sigmoid(delta)) - NOISE * math.log(sigmoid(-delta))
    if loss == "robust":
        return (-(1 - NOISE) * math.log(sigmoid(delta)) + NOISE * math.log(sigmoid(-delta))) / (1 - 2 * NOISE)
    if loss == "hinge":
        return max(0.0, 1 - delta)
    if loss == "ipo":
        return (c / c_tokens - r / r_tokens - 1 / (2 * BETA)) ** 2
    if loss == "sppo":
        return (c - 1 / (2 * BETA)) ** 2 + (r + 1 / (2 * BETA)) ** 2
    if loss == "apo_zero":
        return (1 - sigmoid(BETA * c)) + sigmoid(BETA * r)
    if loss == "apo_down":
        return sigmoid(BETA * c) + (1 - sigmoid(delta))
    assert loss == "discopop"
    mixed = sigmoid(delta / TAU)
    return (1 - mixed) * math.log(1 + math.exp(-delta)) + mixed * math.exp(-delta)


@pytest.mark.parametrize("loss", DPO_LOSSES.names())
def test_each_loss_of_dpo_is_its_papers(tiny_model: Path, folder: Path, loss: str) -> None:
    settings = {"label_smoothing": NOISE, "discopop_tau": TAU}
    used = {name: settings[name] for name in DPO_LOSSES[loss].uses}
    section = {"loss": loss, "beta": BETA, **used}
    with bench(task_recipe("dpo", loss, tiny_model, folder, **{"dpo.label_smoothing": 0.0, "dpo": section})) as b:
        stir(b.model, 0.1)
        batch = first_batch(b)
        got, _ = computed(b, batch)
        gained, tokens = gains(b, batch), batch.targets.sum(-1).tolist()
        wanted = sum(by_hand(loss, gained[i], gained[2 + i], tokens[i], tokens[2 + i]) for i in range(2))
        assert got == pytest.approx(wanted, rel=1e-5)


def test_the_tokens_by_which_an_answer_is_longer_weigh_less(tiny_model: Path, folder: Path) -> None:
    """LD-DPO, with the SFT term of RPO, which counts every token of the chosen answer."""
    section = {"beta": BETA, "ld_alpha": 0.25, "rpo_alpha": 0.5}
    with bench(task_recipe("dpo", "shared", tiny_model, folder, **{"dpo.label_smoothing": 0.0, "dpo": section})) as b:
        stir(b.model, 0.1)
        batch = first_batch(b)
        got, _ = computed(b, batch)
        tokens = batch.targets.sum(-1)
        assert (tokens[:2] != tokens[2:]).any()
        shared = batch.targets & (batch.targets.cumsum(-1) <= np.tile(np.minimum(tokens[:2], tokens[2:]), 2)[:, None])
        every, part = gains(b, batch), gains(b, replace(batch, targets=shared))
        weighted = [p + 0.25 * (e - p) for e, p in zip(every, part, strict=True)]
        nll = [-likelihood(b.model, *row) / n for row, n in zip(rows_of(batch), tokens, strict=True)]
        wanted = sum(-math.log(sigmoid(BETA * (weighted[i] - weighted[2 + i]))) + 0.5 * nll[i] for i in range(2))
        assert got == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("change", [{"adapter": {"method": "none"}}, {"adapter": {"method": "pissa"}}, {}])
@pytest.mark.parametrize("task", ["dpo", "kto"])
def test_a_stored_reference_is_the_model_before_the_first_step(
    tiny_model: Path, folder: Path, task: str, change: dict[str, Any]
) -> None:
    changes = {f"{task}.precompute_reference": not change, "training.steps": 2, **change}
    with bench(task_recipe(task, "stored", tiny_model, folder, **changes)) as b:
        b.model.eval()
        batch = next(b.stream.prefetch(b.stream.start(), 0, 1)).batches[0]
        before = likelihoods(b, batch)
        stir(b.model, 0.1)
        with torch.no_grad():
            b.task.prepare_step(b.model, [batch], CPU, 1)
        torch.testing.assert_close(b.task._reference.of(batch)[0 if task == "kto" else slice(2)].flatten(), before)
        assert (likelihoods(b, batch) - before).abs().max() > 0.1
        # Another run of the same model and data computes nothing.
        b.task.outputs = None
        with_outputs(b.parts, replace(b.data, train=replace(b.data.train, outputs=None)))


def likelihoods(b: Bench, batch: Batch) -> torch.Tensor:
    return torch.tensor([likelihood(b.model, *row) for row in rows_of(batch)])


def test_the_kto_loss_is_the_papers(tiny_model: Path, folder: Path) -> None:
    with bench(task_recipe("kto", "hand", tiny_model, folder, **{"training.micro_batch": 4})) as b:
        stir(b.model, 0.1)
        batch = next(b.stream.prefetch(b.stream.start(), 0, 1)).batches[0]
        assert batch.unrelated is not None
        assert set(batch.desirable.tolist()) == {True, False}
        got, sums = computed(b, batch)
        gained, unrelated = gains(b, batch), gains(b, batch.unrelated)
        z = max(0.0, sum(unrelated) / len(unrelated))
        wanted = 0.0
        for gain, good in zip(gained, batch.desirable.tolist(), strict=True):
            wanted += 1 - sigmoid(0.5 * (gain - z)) if good else 1.5 * (1 - sigmoid(0.5 * (z - gain)))
        assert got == pytest.approx(wanted, rel=1e-5)
        assert b.task.step_metrics(sums)["kl"] == pytest.approx(z, rel=1e-4, abs=1e-6)


def test_an_unrelated_answer_is_the_next_one_to_another_prompt(tiny_model: Path, folder: Path, tmp_path: Path) -> None:
    rows = [("a: ", "one", True), ("a: ", "two", False), ("b: ", "three", True)]
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps(dict(zip(("prompt", "completion", "label"), r, strict=True))) + "\n" for r in rows)
    )
    source = [{"path": str(path), "format": "unpaired_preference"}]
    with bench(
        task_recipe(
            "kto", "next", tiny_model, folder, **{"data.train": source, "data.eval": [], "training.eval_every": None}
        )
    ) as b:
        tokenizer = b.parts.tokenizer()
        (batch,) = eval_batches(b.data.train, 4, 0, 1)
        assert batch.unrelated is not None
        read = [tokenizer.decode(ids, skip_special_tokens=True).rstrip() for ids in batch.unrelated.input_ids]
        assert read == ["a: three", "a: three", "b: one"]
    path.write_text(json.dumps({"prompt": "a", "completion": "b", "label": True}) + "\n")
    with (
        pytest.raises(InputError, match="have the same prompt"),
        bench(
            task_recipe(
                "kto",
                "alone",
                tiny_model,
                tmp_path,
                **{"data.train": source, "data.eval": [], "training.eval_every": None},
            )
        ) as b,
    ):
        list(eval_batches(b.data.train, 4, 0, 1))


def test_kto_learns_from_pairs_as_two_answers(tiny_model: Path, folder: Path) -> None:
    source = [{"path": f"{folder}/dpo/train.jsonl", "format": "preference"}]
    with bench(task_recipe("kto", "pairs", tiny_model, folder, **{"data.train": source})) as b:
        (batch,) = eval_batches(b.data.train, 96, 0, 1)
        assert batch.samples == 96
        assert batch.desirable.tolist() == [True, False] * 48
        assert batch.sample_ids[:2] == ["0:0/0#1", "0:0/0#2"]


def test_what_dpo_cannot_take_is_refused(tiny_model: Path, folder: Path) -> None:
    recipe = task_recipe("dpo", "refused", tiny_model, folder)
    assert "has no effect with dpo.loss ipo" in mistakes(recipe, dpo__loss="ipo")
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
