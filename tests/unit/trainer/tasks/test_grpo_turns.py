"""Texts of several turns in one process: what the model has written and what it was given, and what is learned."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launcher.driver.preflight import check_model
from tests.support.dying import train_until
from tests.support.fake_vllm import FakeVLLM, serving
from tests.support.looping import bench
from tests.support.models import CPU
from tests.support.tasks import task_recipe, write_task_data
from tests.support.training import adapter_bytes, run_of, train_here
from tests.unit.trainer.tasks.test_grpo import QUIET
from trainer.errors import InputError, RecipeError, RewardFailed
from trainer.recipe import Recipe
from trainer.recipe.trust import code_of, without_code
from trainer.run import layout
from trainer.run.jsonl import read_rows
from trainer.strategies.ddp import DDP
from trainer.tasks.rollouts.rollout import PromptCompletionBatch, Rollout
from trainer.tasks.rollouts.store import RolloutStore
from trainer.tasks.sampling import Completion, PolicySampler

Make = Callable[..., Recipe]
ENVIRONMENTS = "tests.support.environments"
ASKING = f"{ENVIRONMENTS}:Asking"
CALCULATOR = "trainer.tasks.environments.calculator:Calculator"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("turns")
    write_task_data(folder, "grpo")
    write_task_data(folder, "ppo")
    return folder


@pytest.fixture
def make(tiny_model: Path, folder: Path, request: pytest.FixtureRequest) -> Make:
    def recipe(
        suffix: str = "", environment: str = f"{ENVIRONMENTS}:Asking", task: str = "grpo", **more: Any
    ) -> Recipe:
        name = "".join(c if c.isalnum() else "-" for c in request.node.name).strip("-").lower()[-50:] + suffix
        settings = {"environment": environment, "reward": {}, "stop": ["e", "a", "t", "o"], "max_text_tokens": 60}
        changes = {"training.steps": 2, **QUIET, **{f"{task}.{key}": value for key, value in settings.items()}}
        return task_recipe(task, name.strip("-"), tiny_model, folder, **{**changes, **more})

    return recipe


def rollouts_of(b: Any) -> list[Rollout]:
    return b.task._experience.rollouts  # type: ignore[no-any-return]


def words(b: Any, ids: Any) -> str:
    return str(b.task.generation.tokenizer.decode(list(ids), skip_special_tokens=True))


def scripted(turns: list[str]) -> Any:
    """A sampler that writes these turns, in order, whatever it is asked."""

    def write(self: PolicySampler, module: Any, prompts: Any, keys: Any, device: Any, answers: int = 1) -> Any:
        self.check_room(prompts)
        turn = turns.pop(0)
        ids = self.tokenizer(turn, add_special_tokens=False)["input_ids"]
        return [Completion(ids, True, self.words(ids)) for _ in keys]

    return write


def test_a_text_that_computes_with_the_calculator(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model reads the values and does not learn them; the rewards of several sources are added."""
    turns = ["now <<3*4>>", "and <<12+1>>", "so #### 13"]
    monkeypatch.setattr(PolicySampler, "write", scripted([*turns]))
    rows = [{"prompt": f"{n} times 4 and 1?", "completion": f"#### {4 * n + 1}"} for n in (2, 3)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {
        "data.train": [{"path": f"{tmp_path}/sums.jsonl", "format": "completion"}],
        "grpo": {
            "environment": CALCULATOR,
            "environment_weight": 2.0,
            "reward": {"functions": [{"function": "tests.support.rewards:share_of_vowels", "weight": 10.0}]},
            "stop": [">>"],
            "kl_coef": 0.1,
            "minibatches": 2,
            "group_size": 2,
            "max_new_tokens": 24,
            "max_text_tokens": 200,
        },
        "training": {"steps": 1, "global_batch": 2, "micro_batch": 2},
    }
    with bench(make(**settings)) as b:
        b.run()
        written = "now <<3*4>>12and <<12+1>>13so #### 13"
        vowels = sum(written.count(v) for v in "aeiou") / len(written)
        lengths = [len(b.task.generation.tokenizer(turn, add_special_tokens=False)["input_ids"]) for turn in turns]
        for rollout in rollouts_of(b):
            assert [words(b, rollout.tokens[start:end]) for start, end in rollout.given] == ["12", "13"]
            assert rollout.words == words(b, rollout.tokens) == written
            assert rollout.length == sum(lengths) < len(rollout.tokens)
            assert len(rollout.logps) == len(rollout.reference) == rollout.length
            right = float("13" in words(b, rollout.prompt.answer))
            assert rollout.rewards == {"environment": right, "share_of_vowels": pytest.approx(vowels)}
            assert rollout.reward == pytest.approx(2 * right + 10 * vowels)
        (row,) = b.rows
        assert (row["turns"], row["reward_environment"], row["ended"]) == (3.0, 0.5, 1.0)
        assert row["response_length"] == sum(lengths)
        assert row["response_tokens"] == 4 * sum(lengths)


def test_a_chat_goes_on_as_its_template_writes_it(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PolicySampler, "write", scripted(["<<3*4>></s>", "#### 12</s>"]))
    messages = [{"role": "user", "content": "3 times 4?"}, {"role": "assistant", "content": "#### 12"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": messages}))
    settings = {
        "data.train": [{"path": f"{tmp_path}/chats.jsonl", "format": "messages"}],
        "grpo": {"environment": CALCULATOR, "group_size": 2, "max_new_tokens": 24, "max_text_tokens": 90},
        "training": {"steps": 1, "global_batch": 1, "micro_batch": 1},
    }
    with bench(make(**settings)) as b:
        b.run()
        said = [
            *messages[:1],
            {"role": "assistant", "content": "<<3*4>>"},
            {"role": "tool", "content": "12"},
            messages[1],
        ]
        whole = b.task.generation.tokenizer.apply_chat_template(said, return_dict=False)
        for rollout in rollouts_of(b):
            ids = [*rollout.prompt.tokens, *rollout.tokens]
            assert ids == whole[: len(ids)]
            assert rollout.rewards == {"environment": 1.0}
            ((start, end),) = rollout.given
            assert (
                b.task.generation.tokenizer.decode(rollout.tokens[start:end]) == "\n<|tool|>\n12</s>\n<|assistant|>\n"
            )


def test_only_the_tokens_of_the_model_are_targets(make: Make) -> None:
    """Their log-probabilities are those of a plain forward pass, behind everything that was written before."""
    with bench(make(**{"grpo.minibatches": 1, "training.steps": 1})) as b:
        b.run()
        some = [r for r in rollouts_of(b) if r.given][:5]
        assert {len(r.given) for r in some} - {1}, "some have two answers"
        batch = PromptCompletionBatch.of_rollouts(some, 0)
        with torch.no_grad():
            found = b.task._policy.score_tokens(b.strategy.module, batch, CPU).logps
            rows = []
            for row, rollout in enumerate(some):
                ids = torch.tensor([[*rollout.prompt.tokens, *rollout.tokens]])
                logps = b.model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
                start = len(rollout.prompt.tokens)
                answers = {n for a, e in rollout.given for n in range(a, e)}
                own = [n for n in range(len(rollout.tokens)) if n not in answers]
                rows += [logps[start + n - 1, rollout.tokens[n]] for n in own]
                assert batch.targets[row].nonzero()[0].tolist() == [start + n for n in own]
                assert all(
                    "[" in words(b, rollout.tokens[a:e]) and "]" in words(b, rollout.tokens[a:e])
                    for a, e in rollout.given
                )
        torch.testing.assert_close(found, torch.stack(rows), rtol=1e-4, atol=1e-5)


def test_a_turn_is_written_behind_all_before_it_with_numbers_of_its_own(make: Make) -> None:
    asked: list[tuple[list[int], str]] = []
    plain = PolicySampler.write

    def write(self: Any, module: Any, prompts: Any, keys: Any, device: Any, answers: int = 1) -> Any:
        asked.extend(zip([p for p in prompts for _ in range(answers)], keys, strict=True))
        return plain(self, module, prompts, keys, device, answers)

    with pytest.MonkeyPatch.context() as patch, bench(make(**{"training.steps": 1})) as b:
        patch.setattr(PolicySampler, "write", write)
        b.run()
        by_key = {key: list(prompt) for prompt, key in asked}
        assert len(by_key) == len(asked) > len(rollouts_of(b))
        later = [(key, prompt) for key, prompt in by_key.items() if ":turn" in key]
        assert later
        for key, prompt in later:
            first = by_key[key.partition(":turn")[0]]
            assert prompt[: len(first)] == first
            assert len(prompt) > len(first)


@pytest.mark.parametrize(
    ("limits", "turns"),
    [({"grpo.max_turns": 2}, 2), ({"grpo.max_turns": 9, "grpo.max_text_tokens": 15}, 3), ({"grpo.max_turns": 1}, 1)],
)
def test_a_limit_cuts_a_text_off(make: Make, limits: dict[str, int], turns: int) -> None:
    changes = {"grpo.overlong_filter": True, "grpo.missing_eos_penalty": 0.5, "training.steps": 1, **limits}
    with bench(make(environment=f"{ENVIRONMENTS}:Patient", **{"grpo.dynamic_sampling": 0, **changes})) as b:
        b.run()
        longest = b.recipe.grpo.longest
        for rollout in rollouts_of(b):
            assert not rollout.ended
            assert len(rollout.tokens) <= longest
            assert 1 <= len(rollout.given) + 1 <= turns
            assert rollout.rewards["environment"] == 1.0 + len(rollout.given)
        assert max(len(r.given) for r in rollouts_of(b)) == turns - 1
        assert (b.rows[0]["left_out"], b.rows[0]["ended"]) == (1.0, 0.0)


def test_one_turn_with_an_environment_is_a_text_without_one(make: Make, tiny_model: Path, folder: Path) -> None:
    """The same texts, rewards and updates as with a reward function."""
    with_one = make("-with", environment=f"{ENVIRONMENTS}:Silent", **{"grpo.max_text_tokens": 6})
    function = {"functions": [{"function": f"{__name__}:by_length"}]}
    changes = {**QUIET, "training.steps": 2, "grpo.reward": function, "grpo.stop": ["e", "a", "t", "o"]}
    without = task_recipe("grpo", "turns-without", tiny_model, folder, **changes)
    assert train_here(with_one) == train_here(without) == "succeeded"
    assert adapter_bytes(with_one) == adapter_bytes(without)
    assert any(row["reward_std"] for row in read_rows(run_of(with_one), layout.METRICS) if "reward_std" in row)


def by_length(prompts: list[str], completions: list[str], references: list[str]) -> list[float]:
    return [len(text) % 7 / 10 for text in completions]


def test_a_kill_between_two_turns_leaves_no_trace(make: Make) -> None:
    often = {"checkpoint.every_steps": 1, "training.steps": 3}
    whole, killed = make("-whole", **often), make("-killed", **often)
    assert train_here(whole) == "succeeded"
    for owner, name, call in ((PolicySampler, "write", 11), (DDP, "step", 3)):
        train_until(killed, owner, name, call)
    assert train_here(killed) == "succeeded"
    assert adapter_bytes(killed) == adapter_bytes(whole)
    rows = {r["step"]: r for r in read_rows(run_of(killed), layout.METRICS)}
    for want in read_rows(run_of(whole), layout.METRICS):
        assert all(rows[want["step"]][name] == want[name] for name in ("reward", "loss", "turns"))
        assert want["turns"] > 1.2


def test_ppo_writes_several_turns_too(make: Make) -> None:
    with bench(make(task="ppo")) as b:
        b.run()
        assert all(np.isfinite(row["loss"]) and row["turns"] > 1.2 for row in b.rows)
        for rollout in rollouts_of(b):
            assert len(rollout.values) == len(rollout.logps) == rollout.length


def test_held_out_prompts_have_several_turns(make: Make, folder: Path) -> None:
    source = [{"path": f"{folder}/grpo/eval.jsonl", "format": "completion"}]
    with bench(make(**{"data.eval": source, "training.eval_every": 1})) as b:
        loop = b.loop()
        found, again = (loop.evaluate(1).task for _ in range(2))
        assert found == again
        assert found["eval_reward"] > 0


def test_servers_write_the_turns_and_they_are_stored(make: Make, tiny_model: Path) -> None:
    """The first turns of a step are written while the policy learns, the others when the step is due. A run that is
    killed learns from the stored texts."""
    fake = FakeVLLM(tiny_model)
    rollout = {"engine": "vllm", "addresses": [fake.address], "max_staleness": 1}
    recipe = make(rollout=rollout, **{"training.steps": 3, "checkpoint.every_steps": 1, "grpo.dynamic_sampling": 0})
    with serving(fake):
        train_until(recipe, DDP, "step", 3)
        store = RolloutStore(run_of(recipe), 10)
        stored = store._read(2)
        before = len(fake.completions())
        assert train_here(recipe) == "succeeded"
        assert before < len(fake.completions())
        assert [(r.tokens, r.given) for r in store._read(2)] == [(r.tokens, r.given) for r in stored]
        assert any(len(text.given) == 2 for text in stored)
        for text in stored:
            assert len(text.sampled) == text.length
            assert text.rewards.keys() == {"environment"}
        writers: dict[tuple[int, ...], set[str]] = {}
        for body in fake.completions():
            writers.setdefault(tuple(body["prompt"]), set()).add(body["model"])
        for text in (text for text in stored if text.given):
            before_last = (*text.prompt.tokens, *text.tokens[: text.given[-1][1]])
            assert writers[before_last] == writers[tuple(text.prompt.tokens)], "by the weights of the first turn"
    first, *others = [row for row in read_rows(run_of(recipe), layout.METRICS) if "turns" in row]
    assert first["logp_mismatch"] < 1e-3, "the log-probabilities are those of the model's tokens"
    assert {row["staleness"] for row in others} == {1.0}


def test_a_failure_ends_the_run_and_names_step_and_environment(make: Make) -> None:
    with (
        bench(make(environment=f"{ENVIRONMENTS}:Broken")) as b,
        pytest.raises(RewardFailed, match=r"step 1, rank 0: tests\.support\.environments:Broken\.step raised KeyError"),
    ):
        b.run()


REWRITES = "{% for m in messages %}{{ m.content if loop.last or m.role == 'user' else '' }}</s>{% endfor %}"


def test_the_driver_finds_out_before_anything_is_submitted(make: Make, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"grpo\.environment '.*:NoSteps' has no method step"):
        check_model(make(environment=f"{ENVIRONMENTS}:NoSteps"), pytest.fail)
    messages = [{"role": "user", "content": "3 times 4?"}, {"role": "assistant", "content": "#### 12"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": messages}))
    chats = {"data.train": [{"path": f"{tmp_path}/chats.jsonl", "format": "messages"}]}
    check_model(make(**chats), print)
    with pytest.raises(InputError, match="writes an assistant's turn differently"):
        check_model(make(**chats, **{"data.chat_template": REWRITES}), print)


MISTAKES = [
    ({"grpo.environment": "nothing"}, "names no function"),
    ({"grpo.environment": None}, "task grpo needs a reward"),
    ({"grpo.environment": None, "grpo.max_text_tokens": None, "grpo.max_turns": 3}, "no effect without environment"),
    ({"grpo.max_text_tokens": 5}, "5 has no room for one turn of 6"),
    ({"grpo.reward": {"functions": [{"function": "a:b", "name": "environment"}]}}, "that of the environment"),
    ({"grpo.overlong_buffer": 60}, "60 is not less than 60"),
]


@pytest.mark.parametrize(("change", "said"), MISTAKES)
def test_what_a_recipe_cannot_ask_for(make: Make, change: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as found:
        make(**change)
    assert said in str(found.value)


def test_a_stored_recipe_imports_no_environment(make: Make) -> None:
    recipe, shipped = make(), make(environment=CALCULATOR)
    assert code_of(recipe) == [f"grpo.environment {ENVIRONMENTS}:Asking"]
    assert without_code(recipe).grpo.environment is None
    assert (code_of(shipped), without_code(shipped)) == ([], shipped)
