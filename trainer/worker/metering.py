"""What `trainer.worker.mfu` counts, read off a model and the devices that it trains on."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import torch

from trainer.distributed.world import World
from trainer.recipe import Recipe
from trainer.recipe.sections.tasks import REFERRING
from trainer.worker.mfu import Attention, Meter, Operations, peak_flops

WRITING = ("ppo",)
"""Tasks that spend most of a step on texts of their own, which no formula here counts."""

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""What configurations of transformers call the number of experts in a layer."""


def meter_of(recipe: Recipe, world: World, operations: Operations) -> Meter | None:
    """Collective. None where the peak of a rank's device is known neither from the recipe nor from its name, and for a
    task whose operations are not counted."""
    peaks = world.all_gather(_peak(recipe, world.device))
    if None in peaks or recipe.task in WRITING:
        return None
    return Meter(
        operations,
        float(sum(peaks)),
        recomputes=recipe.training.gradient_checkpointing,
        refers=recipe.task in REFERRING,
    )


def _peak(recipe: Recipe, device: torch.device) -> float | None:
    if recipe.compute.peak_tflops is not None:
        return recipe.compute.peak_tflops * 1e12
    return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def operations_of(model: Any) -> Operations:
    """``model``: with its adapter on, and not yet wrapped by a strategy, which may leave empty parameters behind."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    text = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    counted: dict[tuple[bool, bool], float] = defaultdict(float)
    inside = {id(m) for m in head.modules()} if head is not None else set()
    for module in model.modules():
        for elements, trained in _multiplied(module, text):
            counted[id(module) in inside, trained] += elements
    return Operations(
        frozen=counted[False, False],
        trained=counted[False, True],
        head_frozen=counted[True, False],
        head_trained=counted[True, True],
        attention=tuple(_attention(model, text)),
    )


def _multiplied(module: torch.nn.Module, text: Any) -> Iterator[tuple[float, bool]]:
    """(elements, trained) of each matrix of the module itself; packed ones have another shape than their layer."""
    if isinstance(module, torch.nn.Embedding):
        return
    for parameter in module._parameters.values():
        if parameter is None or parameter.ndim < 2:
            continue
        if isinstance(module, torch.nn.Linear):
            yield module.in_features * module.out_features, parameter.requires_grad
        else:
            yield parameter.numel() * _share_of_experts(parameter, text), parameter.requires_grad


def _share_of_experts(parameter: torch.nn.Parameter, text: Any) -> float:
    """transformers keeps the matrices of all experts of a layer in one parameter of three dimensions."""
    experts = next((getattr(text, name) for name in EXPERTS if getattr(text, name, None)), 0)
    chosen = getattr(text, "num_experts_per_tok", 0)
    return chosen / experts if parameter.ndim == 3 and experts and parameter.shape[0] == experts else 1.0


def _attention(model: torch.nn.Module, text: Any) -> Iterator[Attention]:
    """Modules of transformers that attend have ``is_causal``; those whose layers differ have ``sliding_window`` too."""
    heads = getattr(text, "num_attention_heads", 0)
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // max(1, heads))
    modules: list[Any] = [m for m in model.modules() if isinstance(getattr(m, "is_causal", None), bool)]
    everywhere = getattr(text, "sliding_window", None)
    seen = Counter((m.is_causal, getattr(m, "sliding_window", everywhere)) for m in modules)
    for (causal, window), layers in seen.items():
        yield Attention(layers, width, causal, None if window is None else window - 1)
