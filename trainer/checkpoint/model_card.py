"""The model card next to the final adapter: what it is, how it was made, how to load it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from trainer.recipe import ModelSection, Recipe, dump
from trainer.recipe.tasks import CAUSAL, SEQUENCE, TASKS
from trainer.redact import redact
from trainer.run.best import chosen_by

LOAD_ADAPTER = """\
from peft import PeftModel
from transformers import {auto}, AutoTokenizer

base = {auto}.from_pretrained({base!r})
model = PeftModel.from_pretrained(base, "path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
"""
LOAD_HEAD = """\
from peft import PeftModel
from transformers import AutoConfig, {auto}, AutoTokenizer

config = AutoConfig.from_pretrained("path/to/this/folder")  # with the labels
base = {auto}.from_pretrained({base!r}, config=config, ignore_mismatched_sizes=True)
model = PeftModel.from_pretrained(base, "path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
"""
LOAD_MODEL = """\
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
"""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
PIPELINES = {CAUSAL: "text-generation", SEQUENCE: "text-classification"}


def model_card(recipe: Recipe, state: Mapping[str, Any], provenance: Mapping[str, Any]) -> str:
    """Returns Markdown with the Hub's front matter. ``state``: of the commit record, with the metrics of the last step
    and evaluation as ``facts``."""
    full = recipe.adapter.method == "none"
    auto = TASKS[recipe.task].auto_class
    front = {
        **_base_of(recipe.model.path),
        "library_name": "transformers" if full else "peft",
        "pipeline_tag": PIPELINES[auto],
        "tags": ["muster", recipe.task, *([] if full else [recipe.adapter.label])],
    }
    load = LOAD_MODEL if full else LOAD_HEAD if auto == SEQUENCE else LOAD_ADAPTER
    return "\n".join(
        [
            "---",
            yaml.safe_dump(front, sort_keys=False).strip(),
            "---",
            "",
            f"# {recipe.name}",
            "",
            _summary(recipe, full),
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in _figures(state).items()),
            "",
            "## Load it",
            "",
            "```python",
            load.format(auto=auto, base=recipe.model.path).strip(),
            "```",
            "",
            "## Recipe",
            "",
            "```yaml",
            redact(dump(recipe)).strip(),
            "```",
            "",
            f"Versions: muster {provenance.get('muster')}, "
            + ", ".join(f"{k} {v}" for k, v in provenance.get("packages", {}).items() if v),
            "",
        ]
    )


def plain_card(model: ModelSection, method: str) -> str:
    """Returns the card of an artifact without a known recipe: an adapter for ``model``, or with method ``none`` the
    model itself."""
    full = method == "none"
    base = {} if full else _base_of(model.path)
    front = {
        **base,
        "library_name": "transformers" if full else "peft",
        "tags": ["muster", *([] if full else [method])],
    }
    what = "A model" if full else f"A {method} adapter for `{model.path}`"
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n{what}, made with muster.\n"


def merged_card(model: ModelSection, method: str, difference: float) -> str:
    """Returns the card of a merged model. ``difference``: the norm of its logits' difference from those of base model
    and adapter, relative to the norm of the latter."""
    front = {**_base_of(model.path), "library_name": "transformers", "tags": ["muster", method]}
    text = (
        f"A {method} adapter merged into `{model.path}`, in {model.dtype}. Its logits differ from those of base and "
        f"adapter by {difference:.1e} of their norm."
    )
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n{text}\n"


def _base_of(path: str) -> dict[str, str]:
    # The Hub accepts only its own names as a base model.
    on_hub = HUB_ID.fullmatch(path) is not None and not Path(path).exists()
    return {"base_model": path} if on_hub else {}


def _summary(recipe: Recipe, full: bool) -> str:
    rank = f" of rank {recipe.adapter.rank}" if recipe.adapter.uses("rank") else ""
    what = "Full fine-tuning" if full else f"A {recipe.adapter.label} adapter{rank}"
    base = f"`{recipe.model.path}`"
    packed = "" if recipe.model.quantization == "none" else f", trained on the base in {recipe.model.quantization}"
    return f"{what} for {base}{packed}."


def _figures(state: Mapping[str, Any]) -> dict[str, str]:
    facts, best, begins_from = state["facts"], chosen_by(state), state.get("begins_from")
    shown = {
        "step": "steps",
        "samples": "samples",
        "loss": "loss of the last step",
        "eval_loss": "evaluation loss",
        "eval_accuracy": "evaluation accuracy",
        "eval_exact_match": "exact match of generated answers",
        "eval_score": "score of generated answers",
        "eval_pair_accuracy": "evaluation pair accuracy",
        "world_size": "ranks",
    }
    values = {label: facts[key] for key, label in shown.items() if facts.get(key) is not None}
    found = {label: f"{v:,}" if isinstance(v, int) else f"{v:.4f}" for label, v in values.items()}
    if best:
        found["chosen as the best evaluation"] = f"{best.metric} {best.value:.4f} after step {best.step:,}"
    if begins_from:
        found["began from"] = begun_text(begins_from)
    return found


def begun_text(begins_from: Mapping[str, Any]) -> str:
    """Returns the trained adapter that a run began with, on one line."""
    step, weights = begins_from.get("step"), str(begins_from.get("sha256"))[:16]
    of_step = f", step {step:,}" if isinstance(step, int) else ""
    return f"{redact(str(begins_from.get('uri')))}{of_step} (sha256 {weights}…)"
