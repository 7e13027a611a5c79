"""`muster evaluate --lm-eval`: tasks of lm-evaluation-harness on local files, compared with plain transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.cli.evaluate import evaluate as command
from tests.support.tasks import task_recipe, write_task_data
from tests.support.training import run_of, train_here
from trainer.artifacts import ArtifactRef
from trainer.errors import InputError, UsageError
from trainer.evaluate import HarnessTasks, evaluate_tasks, harness
from trainer.recipe import Recipe
from trainer.run import layout

lm_eval_tasks = pytest.importorskip("lm_eval.tasks")

ROOT = Path(__file__).resolve().parents[4]
PHRASES = ("the baker sells bread", "a ferry crosses the sound", "rain fell on the hills", "who keeps the lighthouse")
DOCUMENTS = [
    {"question": f"Q{n}: {PHRASES[n % 4]}?", "choices": ["the baker", "a ferry", "no idea", "hills"], "label": n % 4}
    for n in range(8)
]
CHOICE, TEXT = "muster_choice", "muster_text"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harness")
    for task in ("sft", "classification"):
        write_task_data(folder, task)
    (folder / "tasks").mkdir()
    (folder / "documents.json").write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    data = {"data_files": {"test": str(folder / "documents.json")}, "cache_dir": str(folder / "cache")}
    common = {
        "dataset_path": "json",
        "dataset_kwargs": data,
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "metadata": {"version": 1},
    }
    choice = {
        "task": CHOICE,
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    text = {
        "task": TEXT,
        "output_type": "generate_until",
        "doc_to_target": "{{choices[label]}}",
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    for one in (choice, text):
        (folder / "tasks" / f"{one['task']}.yaml").write_text(json.dumps(common | one))
    return folder


@pytest.fixture(scope="module")
def trained(tiny_model: Path, folder: Path) -> Recipe:
    changes = {"training.steps": 6, "training.eval_every": None, "optimizer.lr": 2e-2}
    recipe = task_recipe("sft", "harness", tiny_model, folder, **changes)
    assert train_here(recipe) == "succeeded"
    return recipe


@pytest.fixture
def own_tasks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's own tasks are thousands of files, which take seconds to read."""
    monkeypatch.setattr(lm_eval_tasks, "TaskManager", partial(lm_eval_tasks.TaskManager, include_defaults=False))


def tasks_of(folder: Path, *names: str, **changes: Any) -> HarnessTasks:
    return HarnessTasks(names, str(folder / "tasks"), **{"frame": "plain", **changes})


def log_likelihood(model: Any, tokenizer: Any, question: str, choice: str) -> float:
    start = len(tokenizer(question)["input_ids"])
    ids = tokenizer(f"{question} {choice}", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logps = model(input_ids=ids).logits.log_softmax(-1)[0, :-1]
    return float(logps.gather(-1, ids[0, 1:, None])[start - 1 :].sum())


def by_hand(model: Any, tokenizer: Any) -> float:
    """The share of the documents whose likeliest choice is right."""
    right = 0
    for document in DOCUMENTS:
        found = [log_likelihood(model, tokenizer, str(document["question"]), c) for c in document["choices"]]  # type: ignore[attr-defined]
        right += found.index(max(found)) == document["label"]
    return right / len(DOCUMENTS)


def test_accuracy_is_that_of_the_log_likelihoods_with_and_without_an_adapter(
    own_tasks_only: None, trained: Recipe, tiny_model: Path, folder: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model).eval(), AutoTokenizer.from_pretrained(tiny_model)
    without = evaluate_tasks(tasks_of(folder, CHOICE), ArtifactRef(model=str(tiny_model)))
    assert without["lm_eval"][CHOICE]["acc,none"] == by_hand(base, tokenizer)
    assert (without["lm_eval"][CHOICE]["samples"], without["lm_eval"][CHOICE]["fewshot"]) == (8, 0)
    tuned = PeftModel.from_pretrained(base, f"{run_of(trained).url}/{layout.ADAPTER}").eval()
    found = evaluate_tasks(tasks_of(folder, "muster_*"), ArtifactRef(run=run_of(trained).url))
    assert found["lm_eval"][CHOICE]["acc,none"] == by_hand(tuned, tokenizer)
    assert found["lm_eval"][CHOICE]["acc_stderr,none"] > 0
    assert 0 <= found["lm_eval"][TEXT]["exact_match,none"] <= 1


def test_limit_and_frame(
    own_tasks_only: None, trained: Recipe, tiny_model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The frame is that of training: here, prompts as they are; a model of unknown training has a chat template."""
    asked: list[Any] = []
    results = harness._results

    def seen(manager: Any, names: Any, model: Any, limit: Any, framed: bool) -> Any:
        asked.append((limit, framed))
        return results(manager, names, model, limit, framed)

    monkeypatch.setattr(harness, "_results", seen)
    run, model = ArtifactRef(run=run_of(trained).url), ArtifactRef(model=str(tiny_model))
    found = evaluate_tasks(tasks_of(folder, CHOICE, limit=3, frame=None), run)
    assert (found["lm_eval"][CHOICE]["samples"], found["chat_template"]) == (3, False)
    assert evaluate_tasks(tasks_of(folder, CHOICE, limit=1, frame="chat"), run, trained)["chat_template"] is True
    assert evaluate_tasks(tasks_of(folder, CHOICE, limit=1, frame=None), model)["chat_template"] is True
    assert asked == [(3, False), (1, True), (1, True)]


def test_what_is_wrong_is_said_before_the_model_is_loaded(
    own_tasks_only: None, tiny_model: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ArtifactRef(model=str(tiny_model))
    monkeypatch.setattr(harness, "load", lambda *given, **named: pytest.fail("loaded"))
    with pytest.raises(UsageError, match=r"lm_eval knows no task 'muster_choise'; close names are muster_choice"):
        evaluate_tasks(tasks_of(folder, CHOICE, "muster_choise"), model)
    with pytest.raises(UsageError, match="is no folder"):
        evaluate_tasks(HarnessTasks((CHOICE,), str(folder / "none")), model)
    with pytest.raises(UsageError, match="names no task"):
        evaluate_tasks(HarnessTasks(()), model)
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match="--lm-eval needs lm_eval, which is not installed: pip install lm_eval"):
        evaluate_tasks(tasks_of(folder, CHOICE), model)


def test_a_task_that_cannot_run_is_said(own_tasks_only: None, tiny_model: Path, folder: Path, tmp_path: Path) -> None:
    task = json.loads((folder / "tasks" / f"{CHOICE}.yaml").read_text())
    task["dataset_kwargs"]["data_files"]["test"] = str(folder / "gone.json")
    (tmp_path / "gone.yaml").write_text(json.dumps(task))
    with pytest.raises(InputError, match=rf"lm_eval cannot evaluate {CHOICE}: .*gone\.json"):
        evaluate_tasks(HarnessTasks((CHOICE,), str(tmp_path), frame="plain"), ArtifactRef(model=str(tiny_model)))


def test_a_classifier_and_virtual_tokens_are_refused(own_tasks_only: None, tiny_model: Path, folder: Path) -> None:
    few = {"training.steps": 1, "training.eval_every": None}
    classifier = task_recipe("classification", "refused", tiny_model, folder, **few)
    prompt = task_recipe("sft", "prompt", tiny_model, folder, adapter={"method": "prompt"}, **few)
    for recipe, said in ((classifier, "measures language models"), (prompt, "adapter.method prompt puts vectors")):
        assert train_here(recipe) == "succeeded"
        with pytest.raises((UsageError, InputError), match=said):
            evaluate_tasks(tasks_of(folder, CHOICE), ArtifactRef(run=run_of(recipe).url))


@pytest.mark.night
@pytest.mark.timeout(120)
def test_the_command_prints_json_alone(trained: Recipe, folder: Path) -> None:
    done = muster("--run", run_of(trained).url, "--lm-eval", CHOICE, "--lm-eval-tasks", folder / "tasks", "--limit", 2)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["lm_eval"][CHOICE]["samples"] == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lm_eval": CHOICE, "output": "x"}, "--output has no effect with --lm-eval"),
        ({"lm_eval": CHOICE, "metric": "number"}, "--metric has no effect with --lm-eval"),
        ({"lm_eval_tasks": "x"}, "--lm-eval-tasks has no effect without --lm-eval"),
        ({"frame": "chat"}, "--frame has no effect without --lm-eval"),
        ({"metric": "numbers"}, "--metric 'numbers' is not one of: auto, exact_match, number; did you mean 'number'"),
    ],
)
def test_options_without_effect_are_said(trained: Recipe, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        command(run=run_of(trained).url, **options)


def muster(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launcher", "evaluate", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env={**os.environ, "CI": "1"})
