"""Tasks of lm-evaluation-harness on a saved language model, through the library's own interface.

The library reads the model as training holds it: base model, quantisation and adapter. Its tasks decide prompts and
metrics; muster decides only if the chat template frames the prompts.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import logging
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.artifacts import Artifact, ArtifactRef, base_files, find, load, tokenizer_of
from trainer.artifacts.chat import CHAT, frame_for
from trainer.artifacts.load import reads_a_prompt
from trainer.errors import InputError, MusterError, UsageError
from trainer.model.placement import placement_for
from trainer.recipe import Recipe
from trainer.recipe.trust import Trust
from trainer.registry import close_names

LIBRARY = "lm_eval"
BATCH = 8
"""Requests in a forward pass."""
SHOWN_CHARACTERS = 300


@dataclass(frozen=True)
class HarnessTasks:
    """``names``: tasks, groups and tags, or patterns of them (``mmlu_*``). ``folder``: one with task files (YAML) of
    your own. ``limit``: the number of documents of each task, from the first. ``frame``: `trainer.artifacts.chat`'s
    ``chat`` frames the prompts by the chat template, any other leaves them; None does as in training."""

    names: tuple[str, ...]
    folder: str | None = None
    limit: int | None = None
    frame: str | None = None

    def check(self) -> None:
        """Raises UsageError for what is wrong before a model is loaded."""
        if importlib.util.find_spec(LIBRARY) is None:
            raise UsageError(f"--lm-eval needs {LIBRARY}, which is not installed: pip install {LIBRARY}")
        if not self.names:
            raise UsageError("--lm-eval names no task; name one, or several with commas between them")
        if self.folder is not None and not Path(self.folder).is_dir():
            raise UsageError(f"--lm-eval-tasks {self.folder} is no folder; name one that holds YAML files of tasks")


def evaluate_tasks(
    tasks: HarnessTasks,
    address: ArtifactRef,
    recipe: Recipe | None = None,
    *,
    say: Callable[[str], None] = lambda phase: None,
    trust: bool = False,
) -> dict[str, Any]:
    """Returns the results by task, group and metric. ``recipe``: the user's own, if there is one: its base model holds
    the adapter. ``trust``: allows code that comes with the evaluated artifact.

    Raises UsageError for tasks that do not exist, and InputError for those that cannot be loaded or run."""
    address.check()
    tasks.check()
    if len(address.adapters) > 1:
        raise UsageError("one adapter is evaluated at a time: name a single --adapter")
    say("reading the tasks")
    manager, names = _known(tasks)
    with tempfile.TemporaryDirectory(prefix="muster-evaluate-") as folder:
        say("fetching what is evaluated")
        subject = find(address, Path(folder), recipe, trust=Trust(trust, recipe.model if recipe else None))
        if subject.classes:
            raise UsageError(f"task {subject.task} trains a classifier, and --lm-eval measures language models")
        with placement_for(subject.section, base_files(subject)) as placement:
            say("loading the model")
            model, tokenizer = load(subject, placement, None), tokenizer_of(subject)
            if reads_a_prompt(model):
                raise InputError(
                    f"adapter.method {subject.method} puts vectors before the text, which {LIBRARY} takes for text"
                )
            origin = subject.origin
            format, template = (origin.format, origin.template) if origin else (None, None)
            framed = frame_for(tokenizer, tasks.frame, format, template) == CHAT
            say(f"evaluating on {placement.device}, {'with' if framed else 'without'} the chat template")
            found = _results(manager, names, _language_model(subject, model, tokenizer), tasks.limit, framed)
    return {"lm_eval": {name: _plain(found, name) for name in found["results"]}, "chat_template": framed}


def _known(tasks: HarnessTasks) -> tuple[Any, list[str]]:
    """Returns the library's index of tasks, and the names in it."""
    logging.getLogger(LIBRARY).setLevel(logging.ERROR)
    from lm_eval.tasks import TaskManager

    try:
        manager = TaskManager(include_path=tasks.folder)
    except Exception as error:  # a file of the user's folder, of any content
        raise InputError(f"--lm-eval-tasks {tasks.folder} cannot be read: {_cause(error)}") from error
    for name in tasks.names:
        if not fnmatch.filter(manager.all_tasks, name):
            close = close_names(name, manager.all_tasks)
            hint = f"; close names are {', '.join(close)}" if close else ""
            raise UsageError(f"{LIBRARY} knows no task {name!r}{hint} (`lm_eval ls tasks` lists all)")
    return manager, list(dict.fromkeys(n for name in tasks.names for n in fnmatch.filter(manager.all_tasks, name)))


def _language_model(subject: Artifact, model: Any, tokenizer: Any) -> Any:
    from lm_eval.models.huggingface import HFLM

    dtype = getattr(torch, subject.section.dtype)
    # Trained parameters may be in float32 on a base in 16 bits.
    mixed = None if dtype == torch.float32 else dtype
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH, mixed_precision_dtype=mixed)


def _results(manager: Any, names: Sequence[str], model: Any, limit: int | None, framed: bool) -> Mapping[str, Any]:
    import lm_eval

    try:
        found = lm_eval.simple_evaluate(
            model=model,
            tasks=list(names),
            task_manager=manager,
            limit=limit,
            apply_chat_template=framed,
            log_samples=False,
        )
    except (MusterError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a task's own code and data
        raise InputError(f"{LIBRARY} cannot evaluate {', '.join(names)}: {_cause(error)}"[:1000]) from error
    assert found is not None
    results: Mapping[str, Any] = found
    return results


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:SHOWN_CHARACTERS]


def _plain(found: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns a task's numbers by the library's names (``acc,none``), with its few-shot examples and documents. A
    number that is not known is None."""
    numbers = {
        metric: float(value) if isinstance(value, int | float) and math.isfinite(value) else None
        for metric, value in found["results"][name].items()
        if "," in metric
    }
    documents = found.get("n-samples", {}).get(name, {})
    return {**numbers, "fewshot": found.get("n-shot", {}).get(name), "samples": documents.get("effective")}
