"""The command that serves a result with vLLM."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.inference.lora_ranks import lora_room
from trainer.progress.program import program
from trainer.recipe.tasks import CAUSAL, TASKS

if TYPE_CHECKING:
    from trainer.recipe import Recipe


def of_recipe(recipe: Recipe, adapter: str) -> list[str]:
    """Lines for a person, of a run's final adapter; none where vLLM serves nothing of the kind."""
    section, facts = recipe.adapter, recipe.adapter.row
    if TASKS[recipe.task].auto_class != CAUSAL or not facts.merges:
        return []
    if section.method == "none":
        return [_command(adapter)] if _is_local(adapter) else [_fetch(adapter, recipe.name), _command(recipe.name)]
    merged = f"{recipe.name}-merged"
    apart = [program(), "merge", "--run", recipe.run_uri, "--out", merged]
    if not section.is_plain_lora:
        return [shlex.join(apart), _command(merged)]
    rank = (section.rank or 0) * facts.plain_lora
    folder = adapter if _is_local(adapter) else recipe.name
    lines = [] if _is_local(adapter) else [_fetch(adapter, folder)]
    return [*lines, with_adapter(recipe.model.path, recipe.name, folder, rank)]


def with_adapter(base: str, name: str, folder: str, rank: int) -> str:
    room = lora_room(rank) or rank
    modules = json.dumps({"name": name, "path": folder})
    return _command(base, "--enable-lora", "--max-lora-rank", str(room), "--lora-modules", modules)


def of_model(folder: Path) -> str:
    return _command(str(folder))


def _command(*arguments: str) -> str:
    return shlex.join(["vllm", "serve", *arguments])


def _is_local(uri: str) -> bool:
    return "://" not in uri


def _fetch(uri: str, folder: str) -> str:
    """vLLM reads adapters from the disk."""
    return shlex.join(["aws", "s3", "cp", "--recursive", uri, folder]) if uri.startswith("s3://") else f"# copy {uri}"
