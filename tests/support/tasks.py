"""Data and small models for every task: what a contract test over ``TASKS`` is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launcher.testing.data import KINDS, LABELS, write_preferences, write_rated, write_texts
from tests.support.training import PHRASES, small_recipe
from trainer.recipe import Recipe
from trainer.recipe.sections.adapter import AdapterSection
from trainer.recipe.tasks import TASKS

__all__ = [
    "FORMATS",
    "LABELS",
    "SETTINGS",
    "make_encoder",
    "make_teacher",
    "task_recipe",
    "write_preferences",
    "write_rated",
    "write_task_data",
    "write_texts",
]
FORMATS = {task: KINDS[row.learns_from[0]][0] for task, row in TASKS.items()}
SETTINGS: dict[str, dict[str, Any]] = {
    "sft": {"sft.neftune_alpha": 5.0, "sft.label_smoothing": 0.1},
    "classification": {"data.packing": False, "classification.class_weights": {"ferry": 2.0}},
    "reward": {"data.packing": False},
    "dpo": {"data.packing": False, "dpo.beta": 0.5, "dpo.label_smoothing": 0.1},
    "kto": {"data.packing": False, "kto.beta": 0.5, "kto.undesirable_weight": 1.5},
    "orpo": {"data.packing": False, "orpo.beta": 0.5},
    "simpo": {"data.packing": False, "simpo.gamma": 0.8, "simpo.cpo_alpha": 0.2, "simpo.label_smoothing": 0.1},
    "ppo": {
        "data.packing": False,
        "adapter.dropout": 0.0,
        "ppo.reward": {"function": "tests.support.rewards:share_of_vowels"},
        "ppo.max_new_tokens": 6,
        "ppo.minibatches": 2,
        "ppo.epochs": 2,
        "ppo.kl_target": 0.5,
        "ppo.kl_horizon": 20,
        "ppo.missing_eos_penalty": 0.1,
        "ppo.entropy_coef": 0.01,
    },
    "grpo": {
        "data.packing": False,
        "adapter.dropout": 0.0,
        "grpo.reward": {"function": "tests.support.rewards:share_of_vowels"},
        "grpo.group_size": 3,
        "grpo.max_new_tokens": 6,
        "grpo.minibatches": 2,
        "grpo.kl_coef": 0.1,
        "grpo.dynamic_sampling": 1,
        "grpo.overlong_buffer": 3,
        "grpo.overlong_penalty": 0.2,
        "grpo.entropy_coef": 0.01,
        "grpo.eval_answers": 2,
    },
    "distill": {"distill.loss": "jsd", "distill.beta": 0.3, "distill.temperature": 1.5, "distill.ce_coef": 0.2},
}
"""What a recipe of each task needs beside its data; settings of its own away from their defaults."""


def write_task_data(folder: Path, task: str) -> None:
    """``folder/<task>/train.jsonl`` and ``eval.jsonl``: 48 rows, and 11 that are others."""
    _, write = KINDS[TASKS[task].learns_from[0]]
    write(folder / task / "train.jsonl", 48)
    write(folder / task / "eval.jsonl", 11)


def task_recipe(task: str, name: str, model: Path, folder: Path, **changes: Any) -> Recipe:
    def source(part: str) -> list[dict[str, str]]:
        return [{"path": f"{folder}/{task}/{part}.jsonl", "format": FORMATS[task]}]

    data = {"data.train": source("train"), "data.eval": source("eval"), "task": task, "training.eval_every": 4}
    if TASKS[task].has_teacher:
        data["distill.teacher"] = str(make_teacher(folder / "teacher", model))
    settings = {**data, **SETTINGS[task], **changes}
    method = changes.get("adapter.method", changes.get("adapter", {}).get("method", "lora"))
    if task == "grpo" and "grpo.kl_coef" not in changes and AdapterSection(method=method).changes_base:
        settings["grpo.kl_coef"] = 0.0  # the model with its adapter off is no reference
    return small_recipe(f"{task}-{name}", model, folder, **settings)


def make_teacher(folder: Path, like: Path) -> Path:
    """Another untrained Llama with the tokenizer of the model ``like``, made once: wider, and with rows of padding
    after the tokens. Its predictions are far from those of a new model."""
    import transformers

    from tests.support.models import SMALL_SHAPE, random_model

    if not (folder / "config.json").is_file():
        shape = {**SMALL_SHAPE, "hidden_size": 96, "num_hidden_layers": 3, "vocab_size": 392}
        random_model(transformers.LlamaConfig(**shape, max_position_embeddings=512), folder, like)
    return folder


def make_encoder(folder: Path, architecture: str = "ForSequenceClassification", **settings: Any) -> Path:
    """A tiny untrained BERT with a WordPiece tokenizer; of another ``architecture`` it lacks the head, or more."""
    import torch
    import transformers
    from tokenizers import BertWordPieceTokenizer

    tokenizer = BertWordPieceTokenizer()
    tokenizer.train_from_iterator([*PHRASES, "and so on 0 1 2 3 4 5 6 7 8 9"], vocab_size=200, show_progress=False)
    transformers.BertTokenizerFast(tokenizer_object=tokenizer._tokenizer).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=200, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=64, **settings,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(4)
        getattr(transformers, f"Bert{architecture}")(config).save_pretrained(folder)
    return folder
