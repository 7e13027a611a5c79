"""Texts before and after training: what they are, that training does not notice, and what happens when they fail."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.dying import train_until
from tests.support.tasks import task_recipe, write_task_data
from tests.support.training import adapter_bytes, losses, run_of, train_here
from trainer.errors import RecipeError
from trainer.recipe import Recipe
from trainer.recipe.sections.samples import SamplesSection
from trainer.run import layout
from trainer.run.jsonl import read_rows
from trainer.strategies.ddp import DDP
from trainer.tasks.lm_head_loss import TargetHead
from trainer.tasks.sampling import SamplingPrompt
from trainer.worker.texts.sample_texts import SampleTexts, fitting

Make = Callable[..., Recipe]
SOME = {"count": 3, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    for task in ("sft", "dpo"):
        write_task_data(folder, task)
    return folder


@pytest.fixture
def make(tiny_model: Path, folder: Path, request: pytest.FixtureRequest) -> Make:
    def recipe(suffix: str = "", task: str = "sft", **changes: Any) -> Recipe:
        name = "".join(c if c.isalnum() else "-" for c in request.node.name).strip("-").lower()[-50:] + suffix
        given = {"training.steps": 3, "training.eval_every": None, "samples": SOME, **changes}
        return task_recipe(task, name.strip("-"), tiny_model, folder, **given)

    return recipe


def told(recipe: Recipe, kind: str = "texts") -> list[dict[str, Any]]:
    return [event for event in read_rows(run_of(recipe), layout.EVENTS) if event["event"] == kind]


def greedy(model: Any, tokenizer: Any, prompt: str, count: int) -> str:
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        out = model.eval().generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=0,
        )
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def test_they_are_the_likeliest_texts_of_the_base_and_of_the_adapter(make: Make, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    recipe = make(**{"training.steps": 12})
    assert train_here(recipe) == "succeeded"
    before, after = told(recipe)
    assert (before["step"], before["when"], after["step"], after["when"]) == (0, "before", 12, "after")
    samples = [[text["sample"] for text in event["texts"]] for event in (before, after)]
    assert samples[0] == samples[1]
    assert (samples[0][0], len(samples[0])) == ("0:0/0", 3)
    assert before["texts"][1]["prompt"] == "Q1: a ferry crosses the sound?"
    assert before["texts"][1]["reference"] == " the baker sells bread a ferry crosses the sound 1."
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.path)
    base = AutoModelForCausalLM.from_pretrained(recipe.model.path, dtype=torch.float32)
    assert [t["text"] for t in before["texts"]] == [greedy(base, tokenizer, t["prompt"], 8) for t in before["texts"]]
    for info in run_of(recipe).list(layout.ADAPTER):
        (tmp_path / Path(info.key).name).write_bytes(run_of(recipe).read(info.key))
    tuned = PeftModel.from_pretrained(base, tmp_path)
    assert [t["text"] for t in after["texts"]] == [greedy(tuned, tokenizer, t["prompt"], 8) for t in after["texts"]]
    assert [t["text"] for t in after["texts"]] != [t["text"] for t in before["texts"]]


@pytest.mark.parametrize(
    ("task", "changes"),
    [
        ("sft", {}),
        ("sft", {"model.dtype": "bfloat16"}),
        ("dpo", {"adapter.dropout": 0.0}),
        ("sft", {"strategy.kind": "fsdp", "model.quantization": "nf4"}),
        ("sft", {"adapter": {"method": "none"}, "training.gradient_checkpointing": True}),
    ],
)
def test_training_does_not_notice(make: Make, task: str, changes: dict[str, Any]) -> None:
    """To the last bit, under the attention kernel that is told where samples begin, with dropout, and with an
    evaluation between."""
    with_, without = (make(f"-{n}", task, **changes, **{"samples.count": n}) for n in (3, 0))
    assert train_here(with_) == train_here(without) == "succeeded"
    assert losses(with_) == losses(without)
    assert adapter_bytes(with_) == adapter_bytes(without)
    assert [e["when"] for e in told(with_)] == ["before", "after"]
    assert [len(e["texts"]) for e in told(with_)] == [3, 3]
    assert told(without) == []
    spent = told(with_, "startup")[0]["seconds"]
    assert spent["samples"] >= told(with_)[0]["seconds"] > 0


@pytest.mark.night
def test_compiled_layers_write_them_uncompiled(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    programs: list[int] = []

    def backend(graph: Any, example: Any) -> Any:
        programs.append(1)
        return graph.forward

    monkeypatch.setattr("trainer.layers.compiling.BACKEND", backend)
    write, made = SampleTexts.write, []

    def seen(self: SampleTexts, step: int) -> None:
        before = len(programs)
        write(self, step)
        made.append(len(programs) - before)

    monkeypatch.setattr(SampleTexts, "write", seen)
    recipe = make(**{"compute.compile": True, "training.steps": 1})
    assert train_here(recipe) == "succeeded"
    assert programs
    assert made == [0, 0]
    assert [len(e["texts"]) for e in told(recipe)] == [3, 3]


def test_a_step_draws_and_computes_the_same_whatever_was_drawn_for_them(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Generators, mode and kernel are what they were."""
    plain, states = TargetHead.last_logits, []

    def drawing(self: TargetHead, module: torch.nn.Module, **inputs: Any) -> Any:
        torch.rand(3)
        assert not module.training
        return plain(self, module, **inputs)

    def seen(self: Any, step: int) -> None:
        model: Any = self.strategy.model
        before = torch.get_rng_state()
        write(self, step)
        kernel = model.get_base_model().config._attn_implementation
        states.append((torch.equal(before, torch.get_rng_state()), self.strategy.module.training, kernel))

    write = SampleTexts.write
    monkeypatch.setattr(TargetHead, "last_logits", drawing)
    monkeypatch.setattr(SampleTexts, "write", seen)
    recipe = make()
    assert train_here(recipe) == "succeeded"
    assert len(told(recipe)) == 2
    assert states == [(True, True, "muster_varlen")] * 2


def test_a_resumed_run_has_each_once(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make(**{"checkpoint.every_steps": 2})
    for stop in (1, 2, None):
        changed = recipe.model_copy(update={"training": recipe.training.model_copy(update={"stop_after": stop})})
        assert train_here(changed) == ("interrupted" if stop else "succeeded")
    assert [(e["attempt"], e["when"]) for e in told(recipe)] == [(1, "before"), (3, "after")]


def test_a_model_that_has_been_trained_is_not_what_was_before(make: Make) -> None:
    """The run was begun without samples, which may change."""
    recipe = make(**{"checkpoint.every_steps": 2})
    begun = {"training": recipe.training.model_copy(update={"stop_after": 1})}
    assert train_here(recipe.model_copy(update={**begun, "samples": SamplesSection(count=0)})) == "interrupted"
    assert train_here(recipe) == "succeeded"
    assert [(e["attempt"], e["when"]) for e in told(recipe)] == [(2, "after")]


def test_a_run_that_begins_anew_does_not_write_them_again(make: Make) -> None:
    """It died after its first step, and before its first checkpoint."""
    recipe = make()
    train_until(recipe, DDP, "step", 2)
    assert train_here(recipe) == "succeeded"
    starts = told(recipe, "start")
    assert [(e["attempt"], e["step"]) for e in starts] == [(1, 0), (2, 0)]
    assert [(e["attempt"], e["when"]) for e in told(recipe)] == [(1, "before"), (2, "after")]


@pytest.mark.parametrize("broken", [1, 3])
def test_a_model_that_cannot_write_trains_all_the_same(
    make: Make, broken: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain, calls = TargetHead.last_logits, []

    def failing(self: TargetHead, module: torch.nn.Module, **inputs: Any) -> Any:
        calls.append(1)
        made = plain(self, module, **inputs)
        if len(calls) == broken:
            raise AttributeError("no past_key_values here")
        return made

    monkeypatch.setattr(TargetHead, "last_logits", failing)
    recipe, without = (
        make("-with", **{"strategy.kind": "fsdp"}),
        make("-without", **{"strategy.kind": "fsdp", "samples.count": 0}),
    )
    with caplog.at_level(logging.WARNING):
        assert train_here(recipe) == train_here(without) == "succeeded"
    assert len(calls) == broken, "it is not tried again"
    assert told(recipe) == []
    assert [r.message for r in caplog.records if "sample texts" in r.message] == [
        "no more sample texts are stored: AttributeError: no past_key_values here"
    ]
    assert losses(recipe) == losses(without)


def test_an_adapter_among_keys_and_values_writes_none(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    recipe = make(**{"adapter": {"method": "prefix", "virtual_tokens": 2}})
    with caplog.at_level(logging.WARNING):
        assert train_here(recipe) == "succeeded"
    assert told(recipe) == []
    assert [r.message for r in caplog.records if "no more sample texts" in r.message and "prefix" in r.message]


def test_prompts_are_no_larger_than_a_micro_batch() -> None:
    def prompts(*lengths: int) -> list[SamplingPrompt]:
        return [SamplingPrompt(str(n), [n] * length, []) for n, length in enumerate(lengths)]

    def chosen(longest: int, room: int, *lengths: int) -> list[str]:
        return [p.sample_id for p in fitting(prompts(*lengths), longest, room, 4)]

    assert chosen(20, 1000, 3, 9, 5) == ["0", "1", "2"]
    assert chosen(8, 1000, 3, 9, 5) == ["0", "2"], "one leaves no room for its text"
    assert chosen(20, 26, 3, 9, 5, 3) == ["0", "1"], "two of 13 tokens"
    assert chosen(20, 25, 3, 9, 5, 3) == ["0", "2"], "one that is too long leaves room for two"
    assert chosen(20, 6, 3, 9) == []
    assert len(fitting([*prompts(3), *prompts(3)], 20, 1000, 4)) == 1, "the same prompt twice"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data.eval": []}, "has no effect without data.eval"),
        ({"task": "reward", "data.packing": False}, "has no effect with task reward"),
        ({"samples": {"count": -1}}, "count"),
        ({"samples": {"max_new_tokens": 0}}, "max_new_tokens"),
    ],
)
def test_settings_without_effect_are_said(make: Make, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        make(**changes)
