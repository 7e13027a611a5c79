"""`muster evaluate`: what training measures on the same data, and the scores of generated answers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.tasks import LABELS, make_encoder, task_recipe, write_task_data
from tests.support.training import run_of, small_recipe, train_here
from trainer.artifacts import ArtifactRef, Generator, find, load
from trainer.errors import InputError, UsageError
from trainer.evaluate import evaluate
from trainer.model.placement import Placement
from trainer.recipe import Recipe, dump
from trainer.recipe.tasks import TASKS
from trainer.run import layout
from trainer.run.jsonl import read_rows

ROOT = Path(__file__).resolve().parents[4]
CPU = torch.device("cpu")
QUESTIONS = [
    ("what does the baker sell", ["bread", "a loaf"]),
    ("who crosses", ["ferry"]),
    ("where is rain", ["hills"]),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    for task in TASKS.names():
        write_task_data(folder, task)
    rows = [{"question": f"{q} {i}?", "answer": a} for i in range(4) for q, a in QUESTIONS]
    write_lines(folder / "qa.jsonl", rows)
    return folder


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def small(task: str, name: str, model: Path, folder: Path, **changes: Any) -> Recipe:
    few = {"training.steps": 3, "checkpoint.every_steps": 3, "training.eval_every": None, "optimizer.lr": 1e-2}
    return task_recipe(task, name, model, folder, **{**few, **changes})


def qa_recipe(name: str, model: Path, folder: Path, **changes: Any) -> Recipe:
    source = [{"path": f"{folder}/qa.jsonl", "format": "qa"}]
    few = {"data.train": source, "data.eval": source, "training.steps": 2, "checkpoint.every_steps": 2}
    return small_recipe(name, model, folder, **{**few, **changes})


def trained(recipe: Recipe) -> Recipe:
    assert train_here(recipe) == "succeeded"
    return recipe


def of_run(recipe: Recipe) -> ArtifactRef:
    return ArtifactRef(run=run_of(recipe).url)


def named(uri: str) -> tuple[tuple[str, str], ...]:
    return (("default", uri),)


def last_evaluation(recipe: Recipe) -> dict[str, float]:
    rows = [r for r in read_rows(run_of(recipe), layout.METRICS) if "eval_loss" in r]
    return {n.removeprefix("eval_"): v for n, v in rows[-1].items() if n.startswith("eval_")}


def check_agrees(recipe: Recipe, found: dict[str, Any]) -> None:
    told = last_evaluation(recipe)
    named = {n: v for n, v in found.items() if n not in ("task", "samples")}
    assert set(named) <= set(told)
    assert named == {n: pytest.approx(told[n], rel=1e-4, abs=1e-6) for n in named}


@pytest.mark.parametrize("task", TASKS.names())
def test_it_agrees_with_training_and_example_by_example_with_itself(task: str, tiny_model: Path, folder: Path) -> None:
    recipe = trained(small(task, "agrees", tiny_model, folder))
    found = evaluate(recipe, of_run(recipe))
    check_agrees(recipe, found)
    assert found["samples"] == 11
    lines: list[Any] = []
    assert evaluate(recipe, of_run(recipe), line=lines.append) == {
        n: pytest.approx(v, rel=1e-4, abs=1e-6) if isinstance(v, float) else v for n, v in found.items()
    }
    assert len({line["sample"] for line in lines}) == 11
    if task in ("reward", "dpo"):
        accuracy = sum(line["reward_chosen"] > line["reward_rejected"] for line in lines) / 11
        assert found["pair_accuracy"] == pytest.approx(accuracy)


def test_classification_is_scikit_learns(folder: Path, tmp_path: Path) -> None:
    from sklearn.metrics import accuracy_score, precision_recall_fscore_support

    encoder, changes = make_encoder(tmp_path), {"adapter": {"method": "none"}, "classification.class_weights": {}}
    recipe = trained(small("classification", "sklearn", encoder, folder, **changes))
    lines: list[Any] = []
    found = evaluate(recipe, of_run(recipe), line=lines.append)
    actual, predicted = ([line[name] for line in lines] for name in ("label", "predicted"))
    assert set(actual) == set(LABELS)
    precision, recall, f1, _ = precision_recall_fscore_support(actual, predicted, average="macro", zero_division=0)
    scores = {"accuracy": accuracy_score(actual, predicted), "f1": f1, "precision": precision, "recall": recall}
    assert {name: found[name] for name in scores} == pytest.approx(scores)
    assert found["loss"] == pytest.approx(sum(line["loss"] for line in lines) / 11)


@pytest.mark.parametrize("method", ["prefix", "prompt", "p_tuning", "adaption_prompt", "none"])
def test_other_methods_agree_with_training(method: str, tiny_model: Path, folder: Path) -> None:
    changes = {"adapter": {"method": method}, "data.sequence_length": 256}  # several samples share a pack
    recipe = trained(small("sft", f"m-{method.replace('_', '-')}", tiny_model, folder, **changes))
    check_agrees(recipe, evaluate(recipe, of_run(recipe)))


def test_pissa_on_a_quantised_base_agrees_with_training(tiny_model: Path, folder: Path) -> None:
    adapter = {"method": "pissa", "rank": 4, "alpha": 4, "dropout": 0.0}
    recipe = trained(small("sft", "qpissa", tiny_model, folder, adapter=adapter, **{"model.quantization": "nf4"}))
    check_agrees(recipe, evaluate(recipe, of_run(recipe)))


@pytest.mark.parametrize("task", ["dpo", "kto"])
def test_a_stored_reference_is_the_runs_or_is_computed_again(task: str, tiny_model: Path, folder: Path) -> None:
    recipe = trained(small(task, "full", tiny_model, folder, adapter={"method": "none"}))
    found = evaluate(recipe, of_run(recipe))
    check_agrees(recipe, found)
    elsewhere = recipe.model_copy(update={"storage": f"{folder}/elsewhere"})
    check_agrees(recipe, evaluate(elsewhere, of_run(recipe)))
    assert not Path(folder, "elsewhere").exists()


def test_an_adapter_and_a_model_by_themselves(tiny_model: Path, folder: Path) -> None:
    recipe = trained(small("classification", "apart", tiny_model, folder, adapter={"method": "none"}))
    saved = f"{run_of(recipe).url}/{layout.ADAPTER}"
    found = evaluate(recipe, of_run(recipe))
    assert evaluate(recipe, ArtifactRef(adapters=named(saved))) == found
    assert evaluate(recipe, ArtifactRef(model=saved)) == found
    base = evaluate(small("sft", "base", tiny_model, folder), ArtifactRef(model=str(tiny_model)))
    assert base["perplexity"] > 50


def test_limit_takes_the_first_examples(tiny_model: Path, folder: Path) -> None:
    recipe, base = small("sft", "limited", tiny_model, folder), ArtifactRef(model=str(tiny_model))
    lines: list[Any] = []
    evaluate(recipe, base, line=lines.append)
    found = evaluate(recipe, base, limit=3)
    assert found["samples"] == 3
    limited: list[Any] = []
    assert evaluate(recipe, base, limit=3, line=limited.append)["loss"] == pytest.approx(found["loss"], rel=1e-5)
    assert limited == lines[:3]


def test_questions_are_answered_greedily_and_scored(tiny_model: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    recipe, base = qa_recipe("asked", tiny_model, folder), ArtifactRef(model=str(tiny_model))
    lines: list[Any] = []
    found = evaluate(recipe, base, limit=5, line=lines.append, max_new_tokens=6)
    assert {"loss", "perplexity", "exact_match", "f1"} <= set(found)
    assert [set(line) for line in lines] == [{"prediction", "answers", "exact_match", "f1"}] * 5
    assert found["f1"] == pytest.approx(sum(line["f1"] for line in lines) / 5)
    assert lines[0]["answers"] == QUESTIONS[0][1]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    for n, line in enumerate(lines):
        ids = tokenizer(f"Question: {QUESTIONS[n % 3][0]} {n // 3}?\nAnswer:", return_tensors="pt")["input_ids"]
        out = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        text = tokenizer.decode(out, skip_special_tokens=True)
        assert line["prediction"] == next((part.strip() for part in text.splitlines() if part.strip()), "")


def test_gsm8k_counts_the_last_number(tiny_model: Path, folder: Path) -> None:
    write_lines(folder / "gsm.jsonl", [{"question": "1 + 1?", "answer": "1 + 1 = 2\n#### 2"}] * 2)
    write_lines(folder / "gsm_c.jsonl", [{"prompt": "Q: 1 + 1? A: ", "completion": "1 + 1 = 2\n#### 2"}] * 2)
    sources = [
        {"dataset": "gsm8k", "path": f"{folder}/gsm.jsonl"},
        {"path": f"{folder}/gsm_c.jsonl", "format": "completion"},
    ]
    recipe = qa_recipe("gsm", tiny_model, folder, **{"data.eval": sources})
    lines: list[Any] = []
    found = evaluate(recipe, ArtifactRef(model=str(tiny_model)), line=lines.append, max_new_tokens=4)
    assert [set(line) for line in lines] == [{"prediction", "answers", "accuracy"}] * 4
    assert found["accuracy"] == sum(line["accuracy"] for line in lines) / 4
    assert "exact_match" not in found


def test_a_metric_scores_answers_to_all_prompts(tiny_model: Path, folder: Path) -> None:
    recipe, base = small("sft", "asked-for", tiny_model, folder), ArtifactRef(model=str(tiny_model))
    lines: list[Any] = []
    found = evaluate(
        recipe, base, metric="tests.support.rewards:hundredths", line=lines.append, limit=3, max_new_tokens=6
    )
    assert [line["score"] for line in lines] == [len(line["prediction"]) / 100 for line in lines]
    assert lines[1]["answers"] == ["the baker sells bread a ferry crosses the sound 1."]
    assert found["score"] == pytest.approx(sum(line["score"] for line in lines) / 3)
    assert "exact_match" in evaluate(recipe, base, metric="exact_match", limit=2, max_new_tokens=2)
    assert "exact_match" not in evaluate(recipe, base, limit=2)
    with pytest.raises(UsageError, match="the model of task reward writes none"):
        evaluate(small("reward", "none", tiny_model, folder), base, metric="number")
    with pytest.raises(InputError, match=r"--metric 'own\.py:rate' cannot be loaded"):
        evaluate(recipe, base, metric="own.py:rate")


@pytest.mark.parametrize("method", ["lora", "prefix", "prompt", "p_tuning", "adaption_prompt"])
def test_a_batch_answers_as_each_prompt_alone(method: str, tiny_model: Path, folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    changes = {"adapter": {"method": method}, "optimizer.lr": 5e-2}
    recipe = trained(qa_recipe(f"batched-{method.replace('_', '-')}", tiny_model, folder, **changes))
    model = load(find(of_run(recipe), tmp_path, recipe), Placement.on(CPU), None)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    prompts = ["Question: who?\nAnswer:", "Question: who keeps the lighthouse on the hills?\nAnswer:", "Rain"]
    writer = Generator(model, tokenizer, CPU, 4)
    together = writer.answers(prompts, 8)
    assert together == [writer.answers([prompt], 8)[0] for prompt in prompts]
    if method in ("lora", "prompt"):
        ids = tokenizer(prompts[0], return_tensors="pt")["input_ids"]
        alone = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        assert tokenizer.decode(alone[0, ids.shape[1] :], skip_special_tokens=True) == together[0]


@pytest.mark.parametrize("method", ["lora", "none"])
def test_a_run_without_a_final_adapter_gives_its_newest_checkpoint(
    method: str, tiny_model: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = trained(small("sft", f"newest-{method}", tiny_model, folder, adapter={"method": method}))
    whole = evaluate(recipe, of_run(recipe))
    shutil.rmtree(f"{run_of(recipe).url}/{layout.ADAPTER}")
    assert evaluate(recipe, of_run(recipe)) == whole
    assert "its checkpoint of step 3 is used" in caplog.text
    shutil.rmtree(f"{run_of(recipe).url}/{layout.CHECKPOINTS}")
    with pytest.raises(InputError, match="neither a final adapter nor a complete checkpoint"):
        evaluate(recipe, of_run(recipe))


def test_what_does_not_go_together_is_said(tiny_model: Path, folder: Path, tmp_path: Path) -> None:
    sft, reward = trained(small("sft", "together", tiny_model, folder)), small("reward", "no", tiny_model, folder)
    adapter = f"{run_of(sft).url}/{layout.ADAPTER}"
    with pytest.raises(InputError, match="was trained for task sft, and the recipe has task reward"):
        evaluate(reward, of_run(sft))
    with pytest.raises(InputError, match="is an adapter for CAUSAL_LM, and task reward needs one for SEQ_CLS"):
        evaluate(reward, ArtifactRef(adapters=named(adapter)))
    with pytest.raises(InputError, match="without the head that task reward needs"):
        evaluate(reward, ArtifactRef(model=str(tiny_model)))
    classifier = make_encoder(tmp_path, num_labels=3)
    with pytest.raises(InputError, match="has a head with 3 outputs, and 1 are needed here: reward"):
        evaluate(small("reward", "no", classifier, folder), ArtifactRef(model=str(classifier)))
    with pytest.raises(InputError, match="3 outputs, and 4 are needed here: bread, ferry, hills, lighthouse"):
        evaluate(small("classification", "no", classifier, folder), ArtifactRef(model=str(classifier)))
    with pytest.raises(InputError, match="compares an adapter with the base under it"):
        evaluate(small("dpo", "no", tiny_model, folder), ArtifactRef(model=str(tiny_model)))
    with pytest.raises(InputError, match="there is no run at"):
        evaluate(sft, ArtifactRef(run=f"{folder}/runs/unknown"))
    with pytest.raises(InputError, match=r"holds neither adapter_config\.json nor config\.json"):
        evaluate(sft, ArtifactRef(adapters=named(f"{folder}/sft")))
    with pytest.raises(InputError, match=r"data\.eval of the recipe has no source"):
        evaluate(small("sft", "no", tiny_model, folder, **{"data.eval": []}), of_run(sft))
    with pytest.raises(UsageError, match="one of --run RUN_URI, --adapter URI, --model PATH"):
        evaluate(sft, ArtifactRef(adapters=named(adapter), model=str(tiny_model)))


def test_an_adapter_that_does_not_fit_the_base_is_said(tiny_model: Path, folder: Path, tmp_path: Path) -> None:
    recipe = trained(small("sft", "fits", tiny_model, folder))
    changed = tmp_path / "changed"
    shutil.copytree(f"{run_of(recipe).url}/{layout.ADAPTER}", changed)
    config = json.loads((changed / "adapter_config.json").read_text())
    (changed / "adapter_config.json").write_text(json.dumps({**config, "r": 2}))
    with pytest.raises(InputError, match="the adapter does not fit the base"):
        evaluate(recipe, ArtifactRef(adapters=named(str(changed))))
    (changed / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["q_proj", "lm_head"]}))
    with pytest.raises(InputError, match="the adapter does not fit the base"):
        evaluate(recipe, ArtifactRef(adapters=named(str(changed))))


def test_the_command_prints_json_alone(tiny_model: Path, folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(dump(qa_recipe("printed", tiny_model, folder)))
    done = muster("evaluate", recipe, "--model", tiny_model, "--limit", 2, "--output", tmp_path / "o.jsonl", "seed=5")
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout)
    lines = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert scores["f1"] == pytest.approx(sum(line["f1"] for line in lines) / 2)
    wrong = muster("evaluate", recipe, "--run", tmp_path / "nothing")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "there is no run at" in wrong.stderr


def muster(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launcher", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "CI": "1"},
    )
