"""ORPO and SimPO: the losses by hand from full logits, their gradients by autograd, and answers that are certain."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.looping import bench
from tests.support.models import CPU, stir
from tests.support.tasks import task_recipe, write_task_data
from tests.unit.trainer.tasks.test_preferences import first_batch, mistakes, rows_of, sigmoid
from trainer.recipe.rules.matrix import Cell, refusal
from trainer.tasks.preference.orpo import log_odds

ORPO_SETTINGS = [{"orpo.beta": 0.1}, {"orpo.beta": 1.5}]
SIMPO_SETTINGS = [
    {"simpo": {}},
    {"simpo": {"beta": 2.5, "gamma": 1.4, "label_smoothing": 0.2}},
    {"simpo": {"beta": 10.0, "gamma": 0.0, "cpo_alpha": 0.7}},
]
CASES = [("orpo", settings) for settings in ORPO_SETTINGS] + [("simpo", settings) for settings in SIMPO_SETTINGS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference-free")
    for task in ("orpo", "simpo"):
        write_task_data(folder, task)
    return folder


def mean_likelihood(model: Any, ids: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Of the answer's tokens, from all logits of one sequence alone."""
    log_p = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    at = torch.nonzero(target)[:, 0]
    return log_p[at - 1, ids[0, at]].mean()


def orpo_by_hand(chosen: float, rejected: float, beta: float) -> float:
    odds = [math.exp(mean) / (1 - math.exp(mean)) for mean in (chosen, rejected)]
    return -chosen - beta * math.log(sigmoid(math.log(odds[0] / odds[1])))


def simpo_by_hand(chosen: float, rejected: float, s: Any) -> float:
    over = s.beta * chosen - s.beta * rejected - s.gamma
    kept, swapped = (1 - s.label_smoothing), s.label_smoothing
    return -kept * math.log(sigmoid(over)) - swapped * math.log(sigmoid(-over)) - s.cpo_alpha * chosen


@pytest.mark.parametrize(("task", "settings"), CASES)
def test_the_loss_is_the_papers(task: str, settings: dict[str, Any], tiny_model: Path, folder: Path) -> None:
    with bench(task_recipe(task, "hand", tiny_model, folder, **{"adapter.dropout": 0.0, **settings})) as b:
        stir(b.model, 0.1)
        batch = first_batch(b)
        section = getattr(b.recipe, task)
        loss, sums = b.task.loss(b.model, batch, CPU)
        with torch.no_grad():
            means = [float(mean_likelihood(b.model, *row)) for row in rows_of(batch)]
        pairs = list(zip(means[:2], means[2:], strict=True))
        if task == "orpo":
            wanted = sum(orpo_by_hand(*pair, section.beta) for pair in pairs)
            log_ratio = sum(math.log(math.exp(c - r) * (1 - math.exp(r)) / (1 - math.exp(c))) for c, r in pairs)
            assert b.task.step_metrics(sums)["log_odds"] == pytest.approx(log_ratio / 2, abs=1e-5)
        else:
            wanted = sum(simpo_by_hand(*pair, section) for pair in pairs)
        assert loss.item() == pytest.approx(wanted, rel=1e-5)
        said = b.task.step_metrics(sums)
        assert said["nll"] == pytest.approx(-sum(means[:2]) / 2, rel=1e-5)
        assert said["reward_chosen"] == pytest.approx(section.beta * sum(means[:2]) / 2, rel=1e-5)
        assert said["reward_rejected"] == pytest.approx(section.beta * sum(means[2:]) / 2, rel=1e-5)
        assert said["pair_accuracy"] == sum(c > r for c, r in pairs) / 2


@pytest.mark.parametrize("task", ["orpo", "simpo"])
@pytest.mark.parametrize("method", ["lora", "none"])
def test_the_gradient_is_autograds_of_full_logits(task: str, method: str, tiny_model: Path, folder: Path) -> None:
    with bench(task_recipe(task, "slope", tiny_model, folder, **{"adapter": {"method": method}})) as b:
        stir(b.model, 0.05)
        b.model.eval()
        batch, found = first_batch(b), []
        for loss in (
            lambda: b.task.loss(b.model, batch, CPU).loss_sum,
            lambda: b.task.pair_losses(  # type: ignore[attr-defined]
                *torch.stack([mean_likelihood(b.model, *row) for row in rows_of(batch)]).split(2)
            )[0].sum(),
        ):
            b.model.zero_grad(set_to_none=True)
            loss().backward()
            found.append({n: p.grad.clone() for n, p in b.strategy.trainable().items() if p.grad is not None})
        got, want = found
        assert got.keys() == want.keys()
        for name in want:
            assert float((got[name] - want[name]).norm()) <= 1e-6 + 1e-5 * float(want[name].norm()), name


def test_odds_are_exact_from_certain_to_impossible() -> None:
    means = torch.tensor([-1e-6, -0.01, -0.6931472, -3.0, -60.0, -1e4])
    wanted = means.double() - torch.log(-torch.expm1(means.double()))
    torch.testing.assert_close(log_odds(means).double(), wanted, rtol=1e-6, atol=1e-6)
    certain = torch.zeros(1, requires_grad=True)
    log_odds(certain).sum().backward()
    assert log_odds(certain).isfinite().all()
    assert certain.grad is not None
    assert certain.grad.isfinite().all()


def test_neither_needs_a_reference(tiny_model: Path, folder: Path) -> None:
    for task in ("orpo", "simpo"):
        for method in ("none", "pissa", "lora"):
            assert refusal(Cell(method, "none", "ddp", task)) is None
        recipe = task_recipe(task, "refused", tiny_model, folder)
        source = {"path": "x.jsonl", "format": "preference", "columns": {"margin": "by"}}
        assert f"with task {task}, whose loss knows no margin" in mistakes(recipe, data__train=[source])
        assert "cannot be used with format preference" in mistakes(recipe, data__packing=True)


def test_the_settings_of_one_are_refused_for_the_other(tiny_model: Path, folder: Path) -> None:
    recipe = task_recipe("orpo", "other", tiny_model, folder)
    assert "simpo.gamma: has no effect with task orpo" in mistakes(recipe, simpo__gamma=1.0)
