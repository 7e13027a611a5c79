"""The loss of the routers is the model's own, pack by pack, and however the packs are divided."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.support.models import CPU, packed, random_model
from tests.support.training import run_of, small_recipe, train_here, write_pairs
from trainer.data import Batch
from trainer.errors import InputError, RecipeError
from trainer.run import layout
from trainer.run.jsonl import read_rows
from trainer.tasks import make_task
from trainer.tasks.router_loss import RouterLoss, router_metrics

SIZES: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 16, "vocab_size": 384},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2, "initializer_range": 0.3},
    **{"pad_token_id": 0, "router_aux_loss_coef": 0.05},
}
MIXTURES = {
    "mixtral": transformers.MixtralConfig(**SIZES, num_local_experts=4),
    "qwen3_moe": transformers.Qwen3MoeConfig(**SIZES, num_experts=8, moe_intermediate_size=16),
    "gpt_oss": transformers.GptOssConfig(**SIZES, num_local_experts=4),
    "granitemoe": transformers.GraniteMoeConfig(**SIZES, num_local_experts=4),
}

WITHOUT_EXPERTS: dict[str, Any] = {"num_local_experts": 0, "mamba_n_heads": 2, "layer_types": ["attention"] * 2}


def model_of(config: transformers.PreTrainedConfig) -> Any:
    torch.manual_seed(2)
    return transformers.AutoModelForCausalLM.from_config(config).train()


def task_of(model: Any, coefficient: float | str | None) -> Any:
    task = make_task(small_recipe("r", Path("m"), Path("d"), **{"training.router_aux_loss_coef": coefficient}))
    task.attach(model)
    return task


@pytest.mark.parametrize("name", MIXTURES)
def test_it_is_the_one_that_the_model_adds_to_its_own_loss(name: str) -> None:
    model, batch = model_of(MIXTURES[name]), packed([[30]], prompt=1)
    ids = torch.from_numpy(batch.input_ids)
    theirs = model(input_ids=ids, labels=ids, output_router_logits=True, use_cache=False)
    alone = model(input_ids=ids, labels=ids, use_cache=False)
    loss, sums = task_of(model, "auto").loss(model, batch, CPU)
    assert loss.item() / batch.target_tokens == pytest.approx(theirs.loss.item(), rel=1e-5)
    assert theirs.loss.item() > alone.loss.item() + 0.02
    assert router_metrics(sums)["router_aux_loss"] == pytest.approx(theirs.aux_loss.item(), rel=1e-5)


def gradients(task: Any, model: Any, batches: list[Batch]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Of a step with these micro-batches, and its sums."""
    model.zero_grad()
    units, total = sum(batch.target_tokens for batch in batches), {}
    for batch in batches:
        loss, sums = task.loss(model, batch, CPU)
        (loss / units).backward()
        total = {name: total.get(name, 0) + value for name, value in sums.items()}
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), total


def test_it_depends_neither_on_micro_batches_nor_on_padding() -> None:
    packs = [[20, 9], [16], [3, 4]]
    model = model_of(MIXTURES["mixtral"])
    task = task_of(model, 1.0)
    whole = packed(packs)
    widths = [sum(pack) for pack in packs]
    assert len(set(widths)) > 1
    apart = [
        Batch(
            *(0, whole.input_ids[i : i + 1, :n], whole.position_ids[i : i + 1, :n], whole.targets[i : i + 1, :n]),
            target_tokens=int(whole.targets[i].sum()),
        )
        for i, n in enumerate(widths)
    ]
    together, sums = gradients(task, model, [whole])
    split, others = gradients(task, model, [*apart, Batch.empty()])
    assert torch.allclose(together, split, atol=1e-6)
    assert router_metrics(sums) == pytest.approx(router_metrics(others), rel=1e-5)
    assert sums["expert_tokens"].sum(-1).tolist() == [2.0 * sum(widths)] * 2
    without, _ = gradients(task_of(model_of(MIXTURES["mixtral"]), None), model, [whole])
    assert not torch.allclose(together, without, atol=1e-3)


def test_evaluations_are_without_it() -> None:
    model, batch = model_of(MIXTURES["mixtral"]).eval(), packed([[12]])
    task = task_of(model, 5.0)
    loss, sums = task.eval_loss(model, batch, CPU)
    assert loss.item() == pytest.approx(task.loss_sum(model, batch, CPU).item())
    assert sums == {}


def test_the_balance_of_the_experts() -> None:
    tokens = torch.tensor([[6.0, 2.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0]])
    one = torch.tensor(1.0)
    found = router_metrics({"expert_tokens": tokens, "router_aux_loss": 3 * one, "router_weight": 2 * one})
    assert found == {"router_aux_loss": 1.5, "expert_load_max": 3.0, "experts_unused": 0.25}


@pytest.mark.parametrize(
    ("config", "coefficient", "says"),
    [
        (transformers.LlamaConfig(**SIZES), 0.1, "needs a mixture of experts .* and LlamaForCausalLM is none; leave"),
        (
            transformers.GraniteMoeHybridConfig(
                **SIZES, mamba_n_heads=2, num_local_experts=0, layer_types=["attention"] * 2
            ),
            *(0.1, "needs a mixture of experts"),
        ),
        (
            transformers.MixtralConfig(**{**SIZES, "router_aux_loss_coef": 0.0}, num_local_experts=4),
            *("auto", "auto takes the model's own coefficient, and MixtralForCausalLM names 0.0; give a number"),
        ),
    ],
    ids=["dense", "no-experts", "no-coefficient"],
)
def test_what_has_none_is_refused(config: Any, coefficient: Any, says: str) -> None:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(InputError, match=f"training.router_aux_loss_coef {says}"):
        RouterLoss(model, coefficient)


def test_tasks_without_it_refuse_it(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be added to the loss of task dpo, only to that of sft"):
        small_recipe("r", tmp_path, tmp_path, **{"task": "dpo", "training.router_aux_loss_coef": "auto"})
    with pytest.raises(RecipeError, match="takes auto, a number above 0, or null, got 0"):
        small_recipe("r", tmp_path, tmp_path, **{"training.router_aux_loss_coef": 0})


def test_a_runs_rows_show_the_balance(tiny_model: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path / "data" / "a.jsonl", 24)
    model = random_model(MIXTURES["mixtral"], tmp_path / "model", tiny_model)
    settings = {"training.steps": 2, "adapter.target_modules": ["q_proj", "v_proj"], "checkpoint.every_steps": 2}
    plain = small_recipe("plain", model, tmp_path, **settings)
    balanced = small_recipe("balanced", model, tmp_path, **settings, **{"training.router_aux_loss_coef": 0.5})
    rows = {}
    for recipe in (plain, balanced):
        assert train_here(recipe) == "succeeded"
        rows[recipe.name] = next(row for row in read_rows(run_of(recipe), layout.METRICS) if row["step"] == 1)
    row = rows["balanced"]
    assert row["loss"] == pytest.approx(rows["plain"]["loss"] + 0.5 * row["router_aux_loss"], rel=1e-5)
    assert 1.0 <= row["expert_load_max"] <= 2.0
    assert 0.0 <= row["experts_unused"] < 1.0
    assert "router_aux_loss" not in rows["plain"]
