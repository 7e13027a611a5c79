"""The task grpo in one process: its texts, what it learns, and that a kill in the middle leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.dying import train_until
from tests.support.looping import bench
from tests.support.models import CPU, stir
from tests.support.tasks import task_recipe, write_task_data
from tests.support.training import adapter_bytes, run_of, train_here
from trainer.recipe import Recipe
from trainer.run import layout
from trainer.run.jsonl import read_rows
from trainer.strategies.ddp import DDP
from trainer.tasks.sampling import PolicySampler, drawn, uniforms

Make = Callable[..., Recipe]
QUIET: dict[str, Any] = {"data.eval": [], "training.eval_every": None}
HEAD = {"method": "lora", "rank": 8, "alpha": 16, "dropout": 0.0, "target_modules": ["lm_head", "down_proj"]}
"""The output head is adapted too: an untrained model's logits are too flat for any hidden state to decide."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grpo")
    write_task_data(folder, "grpo")
    return folder


@pytest.fixture
def make(tiny_model: Path, folder: Path, request: pytest.FixtureRequest) -> Make:
    def recipe(suffix: str = "", **changes: Any) -> Recipe:
        name = "".join(c if c.isalnum() else "-" for c in request.node.name).strip("-").lower()[-50:] + suffix
        return task_recipe("grpo", name.strip("-"), tiny_model, folder, **{"training.steps": 4, **QUIET, **changes})

    return recipe


def test_the_answers_to_a_prompt_are_those_of_single_prompts(make: Make) -> None:
    """The prompt is computed once for all its answers, and ended texts leave the batch."""
    with bench(make()) as b:
        stir(b.model)
        task: Any = b.task
        sampler: PolicySampler = task._writer.engine._sampler
        sampler.max_new_tokens = 24
        prompts = [task.generation.tokenizer(text)["input_ids"] for text in ("the baker sells", "a")]
        keys = [f"k{n}" for n in range(8)]
        sampler.ends = set(range(50, 90))
        together = sampler.write(b.model, prompts, keys, CPU, 4)
        alone = [sampler.write(b.model, [prompts[n // 4]], [key], CPU)[0] for n, key in enumerate(keys)]
        assert [t.tokens for t in together] == [t.tokens for t in alone]
        assert len({len(t.tokens) for t in together}) > 2
        assert len({tuple(t.tokens) for t in together}) == 8


def test_drawn_tokens_are_those_of_the_distribution_at_any_temperature() -> None:
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(1)).repeat(4000, 1)
    found = drawn(logits, torch.from_numpy(uniforms("x", 4000)), 0.7, 1.0).bincount(minlength=40) / 4000
    assert (found - (logits[0] / 0.7).softmax(-1)).abs().max() < 0.03


def share_of_e(prompts: list[str], completions: list[str], references: list[str]) -> list[float]:
    return [text.count("e") / max(1, len(text)) for text in completions]


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "loss", ["dapo", *(pytest.param(loss, marks=pytest.mark.night) for loss in ("gspo", "cispo", "rloo"))]
)
def test_it_learns_to_write_one_letter(make: Make, loss: str) -> None:
    changes = {
        "adapter": HEAD,
        "grpo": {"loss": loss, "reward": {"function": f"{__name__}:share_of_e"}, "max_new_tokens": 8, "group_size": 6},
        "training": {"steps": 40, "global_batch": 8, "micro_batch": 8},
        "optimizer.lr": 1e-2,
    }
    with bench(make(**changes)) as b:
        b.run()
        rewards = [row["reward"] for row in b.rows]
        assert rewards[0] < 0.2
        assert sum(rewards[-5:]) / 5 >= 0.9


def never_better(prompts: list[str], completions: list[str], references: list[str]) -> list[float]:
    return [1.0 for _ in completions]


def test_groups_without_a_difference_are_written_again_and_then_left_out(make: Make) -> None:
    asked: list[str] = []
    plain = PolicySampler.write

    def write(self: Any, module: Any, prompts: Any, keys: Any, *rest: Any) -> Any:
        asked.extend(keys)
        return plain(self, module, prompts, keys, *rest)

    settings = {"reward": {"function": f"{__name__}:never_better"}, "group_size": 2, "max_new_tokens": 3}
    with (
        pytest.MonkeyPatch.context() as patch,
        bench(make(**{"grpo": {**settings, "dynamic_sampling": 2}, "training.steps": 1})) as b,
    ):
        patch.setattr(PolicySampler, "write", write)
        before = {name: parameter.clone() for name, parameter in b.strategy.trainable().items()}
        b.run()
        (row,) = b.rows
        assert (row["left_out"], row["groups_alike"], row["loss"]) == (1.0, 1.0, 0.0)
        assert len(asked) == len(set(asked)) == 6 * 2 * 3
        for name, parameter in b.strategy.trainable().items():
            assert torch.equal(parameter, before[name]), "nothing to learn from"


@pytest.mark.night
def test_an_update_is_the_same_without_the_texts_that_cannot_move_it(make: Make) -> None:
    """Texts without an advantage count in the mean, and are left out of the forward passes."""
    from trainer.tasks.grpo.experience import GRPOExperience
    from trainer.tasks.rollouts.rollout import Experience

    function = {"function": f"{__name__}:share_of_e"}
    settings = {"reward": function, "group_size": 2, "max_new_tokens": 3, "loss": "grpo"}

    def grown(suffix: str) -> dict[str, torch.Tensor]:
        with bench(make(suffix, grpo=settings, **{"training.steps": 2})) as b:
            b.run()
            return {name: parameter.detach().clone() for name, parameter in b.strategy.trainable().items()}

    fewer = grown("-fewer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GRPOExperience, "moving", Experience.moving)
        for name, parameter in grown("-all").items():
            torch.testing.assert_close(parameter, fewer[name], rtol=1e-5, atol=1e-7)


def test_a_kill_in_the_middle_of_a_step_leaves_no_trace(make: Make) -> None:
    """Killed while texts are written and between two updates, it ends with the same bytes."""
    often = {"checkpoint.every_steps": 2, "training.steps": 6}
    whole, killed = make("-whole", **often), make("-killed", **often)
    assert train_here(whole) == "succeeded"
    for owner, name, call in ((PolicySampler, "write", 8), (DDP, "step", 5)):
        train_until(killed, owner, name, call)
    assert train_here(killed) == "succeeded"
    assert adapter_bytes(killed) == adapter_bytes(whole)
    assert [key.key for key in run_of(whole).list(layout.ROLLOUTS)] == [], "they are written again, exactly"
    rows = {r["step"]: r for r in read_rows(run_of(killed), layout.METRICS)}
    for want in read_rows(run_of(whole), layout.METRICS):
        assert all(rows[want["step"]][name] == want[name] for name in ("reward", "loss", "kl"))


def test_held_out_prompts_are_answered_several_times(make: Make, folder: Path) -> None:
    source = [{"path": f"{folder}/grpo/eval.jsonl", "format": "completion"}]
    settings = {"reward": {"function": f"{__name__}:share_of_e"}, "group_size": 2, "max_new_tokens": 4}
    chosen = {**settings, "eval_answers": 3, "pass_reward": 0.25}
    with bench(make(**{"grpo": chosen, "data.eval": source, "training.eval_every": 1})) as b:
        loop = b.loop()
        found, again = (loop.evaluate(1).task for _ in range(2))
        assert b.evaluations[0]["eval_loss"] == -found["eval_reward"]
    assert found == again, "every evaluation draws the same random numbers"
    assert 0.0 < found["eval_pass_at_1"] < found["eval_pass_at_k"] <= 1.0
