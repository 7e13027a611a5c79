"""What a recipe says for a model, its data and the GPUs here: each choice with the reason for it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from launcher.init.base_model import BaseModel
from launcher.init.rows import Rows
from trainer.errors import InputError
from trainer.recipe.formats import FORMATS
from trainer.recipe.methods import METHODS

ON_A_CPU = 1_500_000_000
"""Weights up to which a model is trained on a machine without a GPU."""
USUAL_GPU = 24 << 30
HALF = 0.5
"""Fraction of a GPU's memory that frozen weights may take; the rest is for activations."""
LONGEST = 8192
UPDATES = 30
"""Optimizer steps that even a small file should give."""
TASKS = {"preference": "dpo", "unpaired_preference": "kto", "classification": "classification"}
"""The task by the format of the rows, where that is not sft."""
RATES = {"dpo": 5e-6, "kto": 5e-6, "classification": 5e-4}

WHAT = {
    "preference": "prompt, chosen and rejected",
    "unpaired_preference": "an answer and a label, true for a good one",
    "qa": "Question: … Answer: …",
}
"""What rows of a format are."""


class Choice(NamedTuple):
    """A line of the recipe: a key under its section, the value, and why."""

    path: str
    value: Any
    why: str = ""


@dataclass(frozen=True)
class Place:
    """Where the recipe is meant to run. ``here``: on the machine that `init` runs on."""

    workers: int
    gpus: int
    memory: int
    here: bool


def choices(model: BaseModel, rows: Rows, gpus: tuple[int, ...]) -> list[Choice]:
    """Raises InputError when the model cannot learn from such rows."""
    task = TASKS.get(rows.format, "sft")
    if model.encoder and task != "classification":
        raise InputError(
            f"{model.path} is an encoder, which learns to classify, and {rows.path} holds no text with a label; name a "
            "causal language model, or rows of text and label"
        )
    quantization, place = _placed(model, gpus)
    return [
        Choice("name", _name(model.path, rows.path), "the run is runs/<name>; another name starts another run"),
        *([] if task == "sft" else [Choice("task", task, f"what rows of {rows.format} are for")]),
        *_model(model, quantization, place),
        *_adapter(),
        *_data(model, rows),
        *_training(model, rows, place, task),
        *_place(model, quantization, place),
        Choice("storage", "runs", "a folder here; s3://bucket/runs for workers on several machines"),
    ]


def _placed(model: BaseModel, gpus: tuple[int, ...]) -> tuple[str, Place]:
    """Returns the quantisation and the place: the GPUs here, the CPU for a small model, or GPUs elsewhere."""
    size = model.parameters or 0
    if not gpus and 0 < size <= ON_A_CPU:
        return ("none" if model.stored not in ("nf4", "int8") else model.stored), Place(1, 0, 0, True)
    memory = min(gpus, default=USUAL_GPU)
    fits = 2 * size <= HALF * memory
    quantization = model.stored if model.stored in ("nf4", "int8") else "none" if fits else "nf4"
    needed = 1
    while _weights(size, quantization) / needed > HALF * memory and needed < 64:
        needed *= 2
    return quantization, Place(len(gpus) or needed, 1, memory, bool(gpus))


def _weights(parameters: int, quantization: str) -> float:
    return parameters * {"none": 2.0, "nf4": 0.6, "int8": 1.1}[quantization]


def _model(model: BaseModel, quantization: str, place: Place) -> list[Choice]:
    size = "of unknown size" if model.parameters is None else f"about {_short(model.parameters)} weights"
    experts = f", {model.experts} experts a layer" if model.experts else ""
    dtype = ("bfloat16", "2 bytes per weight, on any recent GPU") if place.gpus else ("float32", "exact, for a CPU")
    if quantization == "none":
        frozen = _gib(_weights(model.parameters or 0, "none") * (1 if place.gpus else 2))
        why = f"{frozen} of frozen weights fit" if model.parameters else "nf4 takes a quarter of the memory"
    else:
        why = f"{_gib(_weights(model.parameters or 0, quantization))} of frozen weights in place of "
        why += f"{_gib(2.0 * (model.parameters or 0))}; none is faster where it fits"
        why = "as its files are" if model.stored == quantization else why
    return [
        Choice("model.path", model.path, f"{model.kind}, {size}{experts}"),
        Choice("model.dtype", *dtype),
        Choice("model.quantization", quantization, why),
    ]


def _adapter() -> list[Choice]:
    row = METHODS["lora"].settings
    return [
        Choice("adapter.method", "lora", "a small adapter on the frozen model; none trains every weight"),
        Choice("adapter.rank", row["rank"], "64 for much data and a hard task"),
        Choice("adapter.alpha", row["alpha"], "keep alpha / rank when you change the rank"),
        Choice("adapter.target_modules", row["target_modules"], "every linear layer and every expert"),
    ]


def _data(model: BaseModel, rows: Rows) -> list[Choice]:
    source: dict[str, Any] = {"path": rows.path, "format": rows.format}
    why = WHAT.get(rows.format, "")
    if rows.pair and model.template:
        question, answer = _pair(rows)
        source |= {"format": "instruction", "as": "chat"}
        columns = {"instruction": question, "output": answer}
        why = "a question and its answer, framed by the model's chat template"
    else:
        columns = dict(rows.columns)
    columns = {ours: theirs for ours, theirs in columns.items() if ours != theirs}
    source |= {"columns": columns} if columns else {}
    number = f"{rows.rows:,}" if rows.exact else f"about {rows.rows:,}"
    found = [Choice("data.train", [source], f"{number} rows{': ' if why else ''}{why}")]
    chats = FORMATS[rows.format].chats or "as" in source
    if chats and not model.template:
        told = "the tokenizer has no chat template; this one's end of turn is the nearest"
        found.append(Choice("data.chat_template", model.nearest_template, told))
    elif chats:
        found.append(Choice("data.chat_template", None, "the tokenizer's own"))
    if rows.rows >= 100:
        share = 0.05 if rows.rows < 10_000 else 0.01
        found.append(Choice("data.eval_fraction", share, "held out by a hash of the row, for the loss on unseen rows"))
    length, longer = _length(model, rows)
    cut = f"; {longer:.0%} of the rows are longer and are cut" if longer else "; the longest row fits"
    found.append(Choice("data.sequence_length", length, f"tokens per pack{cut}"))
    packing = model.packs and FORMATS[rows.format].unpacked is None
    why = "several rows share a pack, and do not see each other"
    if not packing:
        why = (
            f"rows of {rows.format} share no pack"
            if model.packs
            else f"{model.kind} may not keep samples of a pack apart"
        )
    return [*found, Choice("data.packing", packing, why)]


def _pair(rows: Rows) -> tuple[str, str]:
    """Returns the columns of the question and of the answer."""
    question, answer = {
        "qa": ("question", "answer"),
        "instruction": ("instruction", "output"),
        "completion": ("prompt", "completion"),
    }[rows.format]
    return rows.columns.get(question, question), rows.columns.get(answer, answer)


def _lengths(model: BaseModel, rows: Rows) -> list[int]:
    return sorted(model.count(text) + 16 for text in rows.texts[:200])


def _length(model: BaseModel, rows: Rows) -> tuple[int, float]:
    """Returns the tokens of a pack, a power of two, and the fraction of rows that are longer."""
    lengths, most = _lengths(model, rows), min(model.positions or LONGEST, LONGEST)
    length = 256
    while length < lengths[-1] and length < most:
        length *= 2
    length = min(length, most)
    return length, sum(one > length for one in lengths) / len(lengths)


def _training(model: BaseModel, rows: Rows, place: Place, task: str) -> list[Choice]:
    epochs = 3 if rows.rows < 10_000 else 1
    packs = rows.rows
    length, _ = _length(model, rows)
    if task == "sft" and model.packs:
        lengths = _lengths(model, rows)
        packs = max(1, round(rows.rows * sum(min(one, length) for one in lengths) / len(lengths) / length))
    batch = next((size for size in (32, 16, 8, 4, 2) if packs * epochs >= size * UPDATES), 1)
    steps = max(1, packs * epochs // batch)
    micro = 1 if (model.parameters or ON_A_CPU) > 500_000_000 else min(batch, 4)
    recompute = bool(place.gpus) and (model.parameters or ON_A_CPU) > 500_000_000
    again = ("less memory for a slower step", "faster; true needs less memory")[not recompute]
    rate = RATES.get(task, METHODS["lora"].lr)
    found = [
        Choice("training.epochs", epochs, f"about {steps:,} steps in all; muster prepare counts them"),
        Choice("training.global_batch", batch, "packs per step, whatever the number of workers"),
        Choice(
            "training.micro_batch", micro, "packs at once on a worker; a larger one takes memory, and changes no result"
        ),
        Choice("training.gradient_checkpointing", recompute, again),
        *([Choice("training.eval_every", max(1, steps // 5), "five times in the run")] if rows.rows >= 100 else []),
        Choice("optimizer.name", "adamw", "adamw_8bit keeps a quarter of the state, under ddp and fsdp"),
        Choice("optimizer.lr", rate, "a usual rate for an adapter; a third of it if the loss jumps"),
        Choice("schedule.name", "cosine", "falls to 0 at the end"),
        Choice("schedule.warmup_ratio", 0.03, "rises from 0 over 3 % of the steps"),
    ]
    return found


def _place(model: BaseModel, quantization: str, place: Place) -> list[Choice]:
    shards = place.workers > 1 and _weights(model.parameters or 0, quantization) > HALF * place.memory
    if not place.gpus:
        where = "this machine has no GPU; 1 on a machine that has"
    elif place.here:
        where = f"a GPU of {_gib(place.memory)} for each worker"
    else:
        where = f"written for GPUs of {_gib(place.memory)}: this machine has none, and the model is large for a CPU"
    kind = "each worker keeps a slice of the weights" if shards else "each worker keeps all weights"
    cores = 1 if not place.gpus else max(1, min(4, (os.cpu_count() or 1) // place.workers))
    return [
        Choice("strategy.kind", "fsdp" if shards else "ddp", kind),
        Choice("resources.workers", place.workers, "one process for each GPU; the result does not depend on it"),
        Choice("resources.gpus_per_worker", place.gpus, where),
        *([Choice("resources.cpus_per_worker", cores, "for reading data")] if cores > 1 else []),
        Choice("checkpoint.every_steps", 50, "what a failure can lose; the last step always gets one"),
    ]


def _name(model: str, data: str) -> str:
    parts = (Path(model.rstrip("/")).name, re.sub(r"\.(jsonl?|csv|tsv|txt|parquet).*$", "", Path(data).name))
    named = "-".join(re.sub(r"[^a-z0-9._]+", "-", part.lower()).strip("-._") for part in parts)
    return named.strip("-._")[:80] or "my-run"


def _short(number: int) -> str:
    scale, unit = next(((s, u) for s, u in ((1e9, "B"), (1e6, "M")) if number >= s), (1e3, "k"))
    return f"{number / scale:.3g} {unit}"


def _gib(size: float) -> str:
    return f"{size / (1 << 30):.1f} GiB" if size >= 1 << 30 else f"{max(1, round(size / (1 << 20)))} MiB"
