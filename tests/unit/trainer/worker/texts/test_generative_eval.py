"""Generated answers in evaluations: what they are and how they are scored, that training does not notice them, and what
happens when they fail."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import rewards
from tests.support.nights import few_by_day
from tests.support.tasks import task_recipe, write_task_data
from tests.support.training import adapter_bytes, losses, run_of, small_recipe, train_here
from trainer.errors import InputError, RecipeError, RewardFailed
from trainer.recipe import Recipe, dump, parse
from trainer.recipe.trust import code_of, without_code
from trainer.run import layout
from trainer.run.jsonl import read_rows
from trainer.tasks.answers import exact_match, f1
from trainer.tasks.lm_head_loss import TargetHead
from trainer.worker.texts.generative_eval import GenerativeEval, batches

Make = Callable[..., Recipe]
FUNCTIONS = "tests.support.rewards"
ASKED = [
    ("what does the baker sell", ["bread"]),
    ("what is sold", ["a loaf", "bread"]),
    ("what is in the oven", ["bread"]),
    ("who crosses the sound", ["ferry"]),
]
SUMS = [{"question": f"{n} + 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(6)]


@pytest.fixture(autouse=True)
def calls_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(rewards.CALLS, str(tmp_path / "calls.jsonl"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("answered")
    for task in ("sft", "dpo", "kto"):
        write_task_data(folder, task)
    lines(folder / "qa.jsonl", [{"question": q, "answer": a} for q, a in ASKED])
    lines(folder / "sums.jsonl", SUMS)
    lines(folder / "text.jsonl", [{"text": "a ferry crosses the sound " * 3}] * 8)
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi there"}]
    more = [{"role": "user", "content": "who sells bread?"}, {"role": "assistant", "content": "the baker"}]
    lines(folder / "chat.jsonl", [{"messages": chat + more}, {"messages": chat}] * 3)
    return folder


def lines(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def make(tiny_model: Path, folder: Path, request: pytest.FixtureRequest) -> Make:
    def recipe(suffix: str = "", task: str = "sft", file: str = "", format: str = "qa", **changes: Any) -> Recipe:
        name = "".join(c if c.isalnum() else "-" for c in request.node.name).strip("-").lower()[-50:] + suffix
        few = {"training.steps": 3, "training.eval_every": None, "generative_eval": {"count": 5, "max_new_tokens": 8}}
        if not file:
            return task_recipe(task, name.strip("-"), tiny_model, folder, **{**few, **changes})
        source = [{"path": f"{folder}/{file}", "format": format}]
        data = {"data.train": source, "data.eval": source, "training.global_batch": 2}
        return small_recipe(name.strip("-"), tiny_model, folder, **{**few, **data, **changes})

    return recipe


def evaluations(recipe: Recipe) -> list[dict[str, Any]]:
    return [row for row in read_rows(run_of(recipe), layout.METRICS) if "loss" not in row]


def told(recipe: Recipe) -> list[dict[str, Any]]:
    events = read_rows(run_of(recipe), layout.EVENTS)
    return [event for event in events if event["event"] == "texts" and event.get("when") == "evaluation"]


def greedy(recipe: Recipe, prompt: str, count: int, stop: str | None = None) -> str:
    """The text by plain peft and transformers, from the files of the final adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    saved = f"{run_of(recipe).url}/{layout.ADAPTER}"
    base = AutoModelForCausalLM.from_pretrained(recipe.model.path, dtype=torch.float32)
    model, tokenizer = PeftModel.from_pretrained(base, saved).eval(), AutoTokenizer.from_pretrained(saved)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=0,
    )  # fmt: skip
    text = str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return text.split(stop)[0] if stop else text


LEARNS = {"training.steps": 40, "optimizer.lr": 2e-2, "adapter.dropout": 0.0}


def test_answers_are_scored_like_those_of_the_saved_adapter(make: Make) -> None:
    every = {"training.eval_every": 20, "generative_eval": {"count": 3, "max_new_tokens": 12}}
    recipe = make(file="qa.jsonl", **LEARNS, **every)
    assert train_here(recipe) == "succeeded"
    first, last = evaluations(recipe)
    assert (first["step"], last["step"], last["eval_answers"]) == (20, 40, 3)
    assert 0 < last["eval_answers_s"] <= last["eval_s"]
    event = told(recipe)[-1]
    assert (event["step"], event["seconds"], len(event["texts"])) == (40, last["eval_answers_s"], 3)
    by_sample = {text["prompt"]: text for text in event["texts"]}
    expected = []
    for question, answers in ASKED[:3]:
        prompt = f"Question: {question}\nAnswer:"
        text = greedy(recipe, prompt, 12).strip().partition("\n")[0]
        expected.append((exact_match(text, answers), f1(text, answers)))
        shown = by_sample[prompt]
        assert (shown["text"], shown["reference"], shown["score"]) == (text, answers[0], expected[-1][0])
    assert (last["eval_exact_match"], last["eval_f1"]) == tuple(sum(one) / 3 for one in zip(*expected, strict=True))
    assert last["eval_exact_match"] > 0, "it has learnt some of them"
    assert last["eval_loss"] < first["eval_loss"]


def test_every_accepted_answer_counts(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer.tasks import answers

    seen: list[Any] = []
    plain = answers.suggested
    monkeypatch.setattr(answers, "suggested", lambda text, accepted: seen.append(accepted) or plain(text, accepted))
    recipe = make(file="qa.jsonl", **{"training.steps": 1, "generative_eval.count": 99})
    assert train_here(recipe) == "succeeded"
    assert seen == [tuple(accepted) for _, accepted in ASKED]
    assert evaluations(recipe)[0]["eval_answers"] == 4


@pytest.mark.parametrize(
    ("task", "changes"),
    few_by_day(
        [
            ("sft", {}),
            ("dpo", {}),
            ("kto", {}),
            ("sft", {"model.dtype": "bfloat16"}),
            ("sft", {"strategy.kind": "fsdp", "model.quantization": "nf4"}),
            ("sft", {"adapter": {"method": "none"}, "training.gradient_checkpointing": True}),
        ],
        2,
    ),
)
def test_training_does_not_notice(make: Make, task: str, changes: dict[str, Any]) -> None:
    """To the last bit, with dropout, packs and an evaluation between."""
    common = {"training.steps": 4, "training.eval_every": 2, **changes}
    with_, without = (make(f"-{n}", task, **common, **{"generative_eval.count": n}) for n in (5, 0))
    assert train_here(with_) == train_here(without) == "succeeded"
    assert losses(with_) == losses(without)
    assert adapter_bytes(with_) == adapter_bytes(without)
    pairs = list(zip(evaluations(with_), evaluations(without), strict=True))
    assert len(pairs) == 2
    for answered, plain in pairs:
        assert answered["eval_loss"] == plain["eval_loss"]
        assert {"eval_exact_match", "eval_f1"} <= answered.keys() - plain.keys()
        assert (answered["eval_answers"], plain.get("eval_answers")) == (5, None)
    assert [len(event["texts"]) for event in told(with_)] == [4, 4]
    assert told(without) == []


def test_answers_come_every_so_many_steps_and_after_the_last(make: Make) -> None:
    every = {"training.steps": 7, "training.eval_every": 2, "generative_eval.every": 4}
    recipe = make(**every)
    assert train_here(recipe) == "succeeded"
    assert [(row["step"], row.get("eval_answers")) for row in evaluations(recipe)] == [
        (2, None),
        (4, 5),
        (6, None),
        (7, 5),
    ]


def test_a_function_scores_all_answers_at_once(make: Make) -> None:
    recipe = make(**{"generative_eval.metric": f"{FUNCTIONS}:length"})
    assert train_here(recipe) == "succeeded"
    (call,) = rewards.calls()
    assert call["prompts"][1] == "Q1: a ferry crosses the sound?"
    assert call["references"][1] == "the baker sells bread a ferry crosses the sound 1."
    (row,) = evaluations(recipe)
    assert row["eval_score"] == sum(len(text) for text in call["completions"]) / 5
    assert "eval_exact_match" not in row
    assert [text["text"] for text in told(recipe)[0]["texts"]] == call["completions"][:4]


def test_of_answers_that_are_good_or_bad_the_good_ones_are_references(make: Make, folder: Path) -> None:
    recipe = make(task="kto", **{"generative_eval.metric": f"{FUNCTIONS}:length", "training.steps": 1})
    assert train_here(recipe) == "succeeded"
    rows = [json.loads(line) for line in (folder / "kto" / "eval.jsonl").read_text().splitlines()]
    good = [row["completion"].strip() for row in rows if row["label"]]
    assert rewards.calls()[0]["references"] == good[:5]


def test_a_run_keeps_the_best_answers_and_ends_early_by_them(make: Make) -> None:
    """Evaluations without answers do not count."""
    asked = {"count": 2, "max_new_tokens": 2, "every": 2, "metric": f"{FUNCTIONS}:declining"}
    judged = {"checkpoint.keep_best": "eval_score", "training.early_stop": {"metric": "eval_score", "patience": 2}}
    recipe = make(**{"training.steps": 20, "training.eval_every": 1, "generative_eval": asked, **judged})
    assert train_here(recipe) in ("succeeded", "interrupted")
    assert [row.get("eval_score") for row in evaluations(recipe)] == [None, -1.0, None, -2.0, None, -3.0]
    best = [event for event in read_rows(run_of(recipe), layout.EVENTS) if event["event"] == "best"]
    assert [(event["step"], event["value"]) for event in best] == [(2, -1.0)]
    with pytest.raises(RecipeError, match="'eval_accuracy' is no metric that compares evaluations"):
        make(**{"training.eval_every": 1, "checkpoint.keep_best": "eval_accuracy", "generative_eval": asked})


def test_a_function_that_gives_no_number_ends_the_run(make: Make) -> None:
    with pytest.raises(RewardFailed, match="broken returned nan for the text"):
        train_here(make(**{"generative_eval.metric": f"{FUNCTIONS}:broken"}))
    with pytest.raises(InputError, match=r"generative_eval\.metric '.*:missing' .*has no function 'missing'"):
        train_here(make("-missing", **{"generative_eval.metric": f"{FUNCTIONS}:missing"}))


def test_a_chat_is_asked_up_to_its_last_answer(make: Make) -> None:
    from transformers import AutoTokenizer

    template = {"data.chat_template": "vicuna", "generative_eval.metric": f"{FUNCTIONS}:length"}
    recipe = make(file="chat.jsonl", format="messages", **LEARNS, **template)
    assert train_here(recipe) == "succeeded"
    (call,) = rewards.calls()
    assert call["references"][:2] == ["the baker", "hi there"]
    assert call["prompts"][0].endswith("who sells bread? ASSISTANT:")
    assert "hi there" in call["prompts"][0]
    saved = f"{run_of(recipe).url}/{layout.ADAPTER}"
    chat = [{"role": "user", "content": "hello"}]
    prompt = AutoTokenizer.from_pretrained(saved).apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert call["completions"][1] == greedy(recipe, prompt, 8).strip() != ""


@pytest.mark.parametrize("metric", ["auto", "number"])
def test_solutions_are_scored_by_their_number(make: Make, metric: str) -> None:
    recipe = make(file="sums.jsonl", **{"generative_eval.metric": metric, "data.sequence_length": 64})
    assert train_here(recipe) == "succeeded"
    (row,) = evaluations(recipe)
    assert 0 <= row["eval_accuracy"] <= 1
    assert "eval_exact_match" not in row


def test_a_number_needs_one_in_every_answer(make: Make) -> None:
    with pytest.raises(InputError, match=r"metric is number, and the answer of sample 0:0/0 has no number: 'bread'"):
        train_here(make(file="qa.jsonl", **{"generative_eval.metric": "number"}))


def test_without_a_complete_answer_there_is_no_question(make: Make) -> None:
    with pytest.raises(InputError, match="no sample of the evaluation data has a prompt and a complete answer"):
        train_here(make(**{"data.sequence_length": 24, "generative_eval.count": 2}))


@pytest.mark.parametrize("failing", few_by_day([1, 3], 1))
def test_a_model_that_cannot_generate_trains_all_the_same(
    make: Make, failing: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain, calls = TargetHead.last_logits, []

    def last_logits(self: TargetHead, module: torch.nn.Module, **inputs: Any) -> Any:
        calls.append(1)
        if len(calls) == failing:
            raise AttributeError("no past_key_values here")
        return plain(self, module, **inputs)

    monkeypatch.setattr(TargetHead, "last_logits", last_logits)
    every = {"training.eval_every": 1, "strategy.kind": "fsdp"}
    recipe, without = make("-with", **every), make("-without", **every, **{"generative_eval": {}})
    with caplog.at_level(logging.WARNING):
        assert train_here(recipe) == train_here(without) == "succeeded"
    assert len(calls) == failing, "it is not tried again"
    assert [r.message for r in caplog.records if "answers" in r.message] == [
        "no more answers are generated: AttributeError: no past_key_values here"
    ]
    assert [row.get("eval_answers") for row in evaluations(recipe)] == [None] * 3
    assert losses(recipe) == losses(without)


def test_a_step_sees_the_state_that_it_had(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate, states = GenerativeEval.evaluate, []

    def seen(self: GenerativeEval, step: int) -> Any:
        before, model = torch.get_rng_state(), self.parts.strategy.model
        torch.manual_seed(7)
        made = evaluate(self, step)
        kernel = model.get_base_model().config._attn_implementation  # type: ignore[operator,union-attr]
        drawn = torch.equal(torch.get_rng_state(), torch.manual_seed(7).get_state())
        torch.set_rng_state(before)
        states.append((drawn, self.parts.strategy.module.training, kernel))
        return made

    monkeypatch.setattr(GenerativeEval, "evaluate", seen)
    assert train_here(make()) == "succeeded"
    assert states == [(True, True, "muster_varlen")]


def test_batches_fit_into_a_micro_batch() -> None:
    assert batches([3, 9, 5], 4, 100) == [[1, 2, 0]]
    assert batches([3, 9, 5], 4, 26) == [[1, 2], [0]], "two of 13 tokens"
    assert batches([30, 3, 3], 4, 20) == [[0], [1, 2]], "one that is too long is asked alone"
    assert batches([], 4, 20) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data.eval": []}, "has no effect without data.eval"),
        ({"task": "reward", "data.packing": False}, "has no effect with task reward"),
        ({"adapter": {"method": "prefix"}}, "a key-value cache, which prefix may fill itself"),
        ({"generative_eval": {"count": 2, "every": 4}}, "needs training.eval_every"),
        (
            {"generative_eval": {"count": 2, "every": 4}, "training.eval_every": 3},
            "no multiple of training.eval_every 3",
        ),
        ({"generative_eval": {"metric": "number"}}, "has no effect without generative_eval.count"),
        ({"generative_eval": {"count": 2, "metric": "numbers"}}, "did you mean 'number'"),
        ({"generative_eval": {"count": 2, "metric": "s3://b/f.py:rate"}}, "names no function"),
        ({"generative_eval": {"count": -1}}, "count"),
    ],
)
def test_settings_without_effect_are_said(make: Make, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        make(**changes)


def test_texts_ask_nothing(make: Make) -> None:
    with pytest.raises(RecipeError, match="needs questions with answers, and the evaluation data are texts only"):
        make(file="text.jsonl", format="text")


def test_the_metrics_are_known_from_the_recipe(make: Make) -> None:
    assert make(**{"generative_eval.metric": "exact_match"}).generative_eval.metrics == {
        "eval_exact_match": "max",
        "eval_f1": "max",
    }
    assert make(**{"generative_eval.metric": f"{FUNCTIONS}:length"}).generative_eval.metrics == {"eval_score": "max"}
    assert make(**{"generative_eval": {}}).generative_eval.metrics == {}


def test_a_stored_function_is_foreign_code(make: Make) -> None:
    recipe = make(**{"generative_eval.metric": "own.py:rate"})
    assert code_of(recipe) == ["generative_eval.metric own.py:rate"]
    assert without_code(recipe).generative_eval.metric == "auto"
    older = json.loads(json.dumps(recipe.model_dump(mode="json")))
    del older["generative_eval"]
    assert "generative_eval" in dump(recipe)
    assert not parse(older).generative_eval.count
