"""The servers that write the texts of a recipe."""

from __future__ import annotations

import os
from pathlib import Path

from trainer.errors import InputError
from trainer.inference.host import ADDRESSES
from trainer.inference.server import LOOPBACK, VLLMServer
from trainer.recipe import Recipe


def vllm_server(
    recipe: Recipe,
    model_folder: Path,
    positions: int | None,
    *,
    log: Path,
    device: str,
    host: str = LOOPBACK,
    api_key: str | None = None,
    temporary: Path | None = None,
) -> VLLMServer:
    """Returns a server that was not started. ``positions``: the longest text that the model was made for, in tokens;
    the others: see `VLLMServer`."""
    section, task = recipe.rollout.vllm, recipe.rollout_section
    assert section.python is not None
    assert task is not None
    longest = recipe.data.sequence_length + task.longest
    return VLLMServer(
        section.python,
        model_folder,
        lora_rank=(recipe.adapter.rank or 0) * recipe.adapter.row.plain_lora,
        dtype=recipe.model.dtype,
        max_model_len=min(longest, positions or longest),
        log=log,
        device=device,
        gpu_memory_utilization=section.memory_share,
        tensor_parallel=section.tensor_parallel,
        adapters=recipe.rollout.max_staleness + 2,
        host=host,
        api_key=api_key,
        temporary=temporary,
        arguments=section.arguments,
    )


def shared_servers(recipe: Recipe) -> tuple[str, ...]:
    """Returns the addresses of servers that all ranks share; none if each node gets its own. Raises InputError where
    there is no Ray to place those that the recipe asks for."""
    if not recipe.rollout.servers_beside:
        return recipe.rollout.addresses
    if not (placed := os.environ.get(ADDRESSES)):
        raise InputError(
            f"rollout.vllm.servers is {recipe.rollout.vllm.servers}: Ray places them, and torchrun runs without it; "
            "train with `muster run`, start servers with `python -m trainer.inference.host` and name them under "
            "rollout.addresses, or set rollout.vllm.servers=null for a server on each node's training GPUs"
        )
    return tuple(placed.split(","))
