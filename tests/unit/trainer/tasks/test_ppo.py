"""The task ppo in one process: what it writes, what it learns, and that a kill in the middle leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.dying import train_until
from tests.support.looping import Bench, bench
from tests.support.models import CPU, stir
from tests.support.tasks import task_recipe, write_task_data
from tests.support.training import adapter_bytes, run_of, train_here
from trainer.checkpoint import list_commits
from trainer.data import Batch
from trainer.errors import InputError, RewardFailed
from trainer.recipe import Recipe
from trainer.run import layout
from trainer.run.jsonl import read_rows
from trainer.strategies.ddp import DDP
from trainer.tasks.rollouts.policy import PolicyHead
from trainer.tasks.rollouts.rollout import PromptCompletionBatch
from trainer.tasks.sampling import PolicySampler

Make = Callable[..., Recipe]
QUIET: dict[str, Any] = {"data.eval": [], "training.eval_every": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ppo")
    write_task_data(folder, "ppo")
    return folder


@pytest.fixture
def make(tiny_model: Path, folder: Path, request: pytest.FixtureRequest) -> Make:
    def recipe(suffix: str = "", **changes: Any) -> Recipe:
        name = "".join(c if c.isalnum() else "-" for c in request.node.name).strip("-").lower()[-50:] + suffix
        return task_recipe("ppo", name.strip("-"), tiny_model, folder, **{"training.steps": 4, **QUIET, **changes})

    return recipe


def author(b: Bench, **settings: Any) -> PolicySampler:
    given: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0, "top_p": 1.0, "stop": (), "agree": bool}
    policy: Any = b.task
    return PolicySampler(b.model.eval(), policy._policy, b.task.generation.tokenizer, **{**given, **settings})


def prompts(b: Bench) -> list[list[int]]:
    tokenizer: Any = b.task.generation.tokenizer
    return [tokenizer(text)["input_ids"] for text in ("the baker sells", "a", "who keeps the lighthouse on the hill")]


KEYS = ["1", "2", "3"]


def test_texts_are_those_of_transformers(make: Make) -> None:
    """The likeliest tokens, row by row without a pad."""
    with bench(make()) as b:
        stir(b.model)
        mine = author(b, temperature=1e-4)
        texts = mine.write(b.model, prompts(b), KEYS, CPU)
        for prompt, text in zip(prompts(b), texts, strict=True):
            out = b.model.generate(
                input_ids=torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=12,
                do_sample=False,
                eos_token_id=sorted(mine.ends),
                pad_token_id=0,
            )
            assert text.tokens == out[0, len(prompt) :].tolist()


def test_a_text_depends_on_its_random_numbers_alone(make: Make) -> None:
    with bench(make()) as b:
        writer = author(b)
        first, again, other = (writer.write(b.model, prompts(b), keys, CPU) for keys in (KEYS, KEYS, ["1", "2", "x"]))
        assert first == again
        assert [t.tokens for t in other[:2]] == [t.tokens for t in first[:2]]
        assert other[2].tokens != first[2].tokens
        assert author(b).write(b.model, prompts(b)[2:], KEYS[2:], CPU)[0].tokens == first[2].tokens


def test_a_text_ends_with_the_end_of_text_or_a_stop_string(make: Make) -> None:
    with bench(make()) as b:
        plain = author(b).write(b.model, prompts(b), KEYS, CPU)
        assert [(len(t.tokens), t.ended) for t in plain] == [(12, False)] * 3
        writer = author(b)
        writer.ends = {plain[1].tokens[4]}
        ended = writer.write(b.model, prompts(b), KEYS, CPU)[1]
        assert (ended.tokens, ended.ended) == (plain[1].tokens[:5], True)
        words = plain[0].words
        stop = words[len(words) // 2 : len(words) // 2 + 2]
        assert stop
        stopped = author(b, stop=("never", stop)).write(b.model, prompts(b), KEYS, CPU)[0]
        assert stopped.ended
        assert stopped.words == words[: words.index(stop)]
        assert stopped.tokens == plain[0].tokens[: len(stopped.tokens)]
        assert len(stopped.tokens) < 12


def test_who_has_no_prompt_takes_part_until_all_have_ended(make: Make) -> None:
    with bench(make()) as b:
        answers, forwards = iter([True, True, True, False]), [0]
        b.model.register_forward_pre_hook(lambda *_: forwards.__setitem__(0, forwards[0] + 1))
        assert author(b, agree=lambda going: next(answers)).write(b.model, [], [], CPU) == []
        assert forwards == [3]


def test_a_prompt_that_leaves_no_room_is_said(make: Make) -> None:
    with bench(make()) as b, pytest.raises(InputError, match=r"a prompt of 600 tokens and max_new_tokens 12"):
        author(b).write(b.model, [[5] * 600], ["1"], CPU)


def test_what_is_said_of_a_text_is_what_the_logits_say(make: Make) -> None:
    with bench(make(**{"ppo.temperature": 0.7})) as b:
        stir(b.model)
        b.model.eval()
        head: PolicyHead = b.task._policy  # type: ignore[attr-defined]
        rows = [([5, 6, 7], [8, 9]), ([10], [11, 12, 13])]
        with torch.no_grad():
            said = head.score_tokens(b.model, PromptCompletionBatch.of(rows, 0, ["a", "b"]), CPU)
            at = 0
            for prompt, text in rows:
                out = b.model(input_ids=torch.tensor([prompt + text]), use_cache=False, output_hidden_states=True)
                logps = (out.logits[0] / 0.7).log_softmax(-1)
                for n, token in enumerate(text):
                    before = len(prompt) + n - 1
                    entropy = -(logps[before].exp() * logps[before]).sum()
                    value = b.model.value_head(out.hidden_states[-1][0, before])
                    found = [float(part[at]) for part in said]
                    wanted = [float(logps[before, token]), float(entropy), float(value)]
                    assert found == pytest.approx(wanted, rel=1e-4, abs=1e-5)
                    at += 1


def test_it_begins_at_the_reference_and_where_texts_were_written(make: Make) -> None:
    changes = {"ppo.epochs": 1, "ppo.minibatches": 1, "training.steps": 1, "ppo.entropy_coef": 0.0}
    with bench(make(**changes)) as b:
        b.run()
        (row,) = b.rows
        assert row["kl"] == pytest.approx(0.0, abs=1e-5)
        assert row["approx_kl"] == pytest.approx(0.0, abs=1e-6)
        assert row["clip_fraction"] == 0.0
        assert row["policy_loss"] == pytest.approx(0.0, abs=1e-4), "advantages are white, and every ratio is 1"
        assert row["response_length"] == pytest.approx(row["response_tokens"] / 6)
        assert row["kl_coef"] == 0.05
        assert len(b.task.example_rollouts()) == 2


def test_every_text_is_learned_from_once_per_epoch(make: Make) -> None:
    with bench(make(**{"ppo.epochs": 3, "ppo.minibatches": 2, "training.stop_after": 1})) as b:
        b.run()
        plan = b.stream.step(b.stream.start())
        task: Any = b.task
        updates = list(task.updates(1, plan, []))
        assert len(updates) == 6
        epochs = [
            [sorted(s for batch in u.batches for s in batch.sample_ids) for u in updates[n : n + 2]] for n in (0, 2, 4)
        ]
        whole = sorted(r.prompt.sample_id for r in task._experience.rollouts)
        assert all(sorted(one + two) == whole for one, two in epochs)
        assert len({str(epoch) for epoch in epochs}) > 1, "in another order"
        assert sum(u.units for u in updates) == 3 * sum(len(r.tokens) for r in task._experience.rollouts)


@pytest.mark.night
@pytest.mark.timeout(120)
def test_it_learns_to_write_one_letter(make: Make) -> None:
    """The output head is adapted too: an untrained model's logits are too flat for any hidden state to decide."""
    changes = {
        "adapter": {
            "method": "lora",
            "rank": 8,
            "alpha": 16,
            "dropout": 0.0,
            "target_modules": ["lm_head", "down_proj"],
        },
        "ppo": {"reward": {"function": "tests.support.rewards:share_of_e"}, "max_new_tokens": 8, "kl_coef": 0.0},
        "training": {"steps": 40, "global_batch": 48, "micro_batch": 48},
        "optimizer.lr": 1e-2,
    }
    with bench(make(**changes)) as b:
        b.run()
        rewards = [row["reward"] for row in b.rows]
        assert rewards[0] < 0.2
        assert sum(rewards[-5:]) / 5 >= 0.9
        assert b.rows[-1]["kl"] > 5
        assert b.rows[-1]["entropy"] < b.rows[0]["entropy"]


def files_of(recipe: Recipe) -> dict[str, str]:
    return {n: i["sha256"] for n, i in list_commits(run_of(recipe))[0].files.items() if n.endswith(".safetensors")}


def test_a_kill_in_the_middle_of_an_iteration_leaves_no_trace(make: Make) -> None:
    """Killed while texts are written (step 3) and between two updates (step 4), it ends with the same bytes."""
    often = {"checkpoint.every_steps": 2, "training.steps": 6, "ppo.kl_target": 0.01}
    whole, killed = make("-whole", **often), make("-killed", **often)
    assert train_here(whole) == "succeeded"
    per_step = 3  # micro-batches: each is written once, and learned from in two minibatches of two epochs
    for owner, name, call in ((PolicySampler, "write", 2 * per_step + 2), (DDP, "step", 4 + 3)):
        train_until(killed, owner, name, call)
    assert train_here(killed) == "succeeded"
    assert adapter_bytes(killed) == adapter_bytes(whole)
    assert files_of(killed) == files_of(whole)
    assert "value_head.safetensors" in files_of(killed)
    coefficients = {c.step: c.state["task"]["kl_coef"] for c in list_commits(run_of(killed))}
    assert coefficients == {c.step: c.state["task"]["kl_coef"] for c in list_commits(run_of(whole))}
    assert len(set(coefficients.values())) == len(coefficients), "it is steered"
    rows = {r["step"]: r for r in read_rows(run_of(killed), layout.METRICS)}
    for want in read_rows(run_of(whole), layout.METRICS):
        assert all(rows[want["step"]][name] == want[name] for name in ("reward", "kl", "loss"))


def test_what_is_left_behind(make: Make) -> None:
    from safetensors.torch import load

    recipe = make(**{"training.steps": 2})
    assert train_here(recipe) == "succeeded"
    run = run_of(recipe)
    adapter = load(run.read(f"{layout.ADAPTER}/adapter_model.safetensors"))
    assert not [name for name in adapter if "value" in name and "proj" not in name], "plain peft"
    head = load(run.read(f"{layout.ADAPTER}/value_head.safetensors"))
    assert {n: tuple(t.shape) for n, t in head.items()} == {"weight": (1, 64), "bias": (1,)}
    events = [e for e in read_rows(run, layout.EVENTS) if e["event"] == "texts"]
    assert [e["step"] for e in events] == [1, 2]
    assert set(events[0]["texts"][0]) == {"sample", "prompt", "text", "reference", "reward", "kl", "ended"}
    assert events[0]["texts"][0]["prompt"].startswith("Q")


def test_a_broken_reward_stops_the_run_with_its_cause(make: Make) -> None:
    recipe = make(**{"ppo.reward": {"function": "tests.support.rewards:broken"}})
    with pytest.raises(RewardFailed, match=r"step 1, rank 0: tests\.support\.rewards:broken returned nan for the text"):
        train_here(recipe)


def test_a_text_that_did_not_end_pays_for_it(make: Make) -> None:
    found = []
    for penalty in (0.0, 0.5):
        changes = {"ppo.missing_eos_penalty": penalty, "training.stop_after": 1}
        with bench(make(f"-{penalty}", **changes)) as b:
            b.run()
            found.append(b.rows[0])
    assert found[0]["ended"] == found[1]["ended"] < 1
    assert found[0]["reward"] - found[1]["reward"] == pytest.approx(0.5 * (1 - found[0]["ended"]))


@pytest.mark.parametrize(
    "change", [{"model.quantization": "nf4"}, {"model.dtype": "bfloat16"}, {"strategy.kind": "fsdp"}]
)
def test_other_bases_train_too(make: Make, change: dict[str, Any]) -> None:
    with bench(make(**{"training.steps": 2, **change})) as b:
        before = {n: p.detach().clone() for n, p in b.strategy.weights()}
        b.run()
        assert all(torch.isfinite(torch.tensor(row["loss"])) for row in b.rows)
        moved = [n for n, p in b.strategy.weights() if not torch.equal(p, before[n])]
        assert "value_head.weight" in moved
        assert any("lora_B" in name for name in moved)
        assert {p.dtype for p in b.strategy.trainable().values()} == {torch.float32}


def test_an_iteration_without_prompts_of_its_own_learns_nothing(make: Make) -> None:
    with bench(make()) as b, torch.no_grad():
        task: Any = b.task
        assert task.evaluated(b.model, Batch.empty(), CPU, 1) == []
