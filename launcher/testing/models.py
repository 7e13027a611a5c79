"""A small untrained model, and models that are built from recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from launcher.quickstart.corpus import pretraining_texts
from launcher.quickstart.model import LlamaShape, make_model
from trainer.adapters import Adapter, make_adapter
from trainer.model import Head, build
from trainer.recipe import Recipe

CPU = torch.device("cpu")


def make_tiny_model(folder: Path) -> Path:
    """Makes an untrained Llama (hidden 64, 2 layers, 384 tokens) and its tokenizer in ``folder``."""
    shape = LlamaShape(hidden=64, layers=2, heads=4, kv_heads=2, intermediate=128, vocabulary=384, positions=512)
    return make_model(folder, shape, pretraining_texts(seed=3, count=200), seed=3)


def built(recipe: Recipe, labels: tuple[str, ...] | None = None) -> tuple[Any, Adapter]:
    """The recipe's base with its adapter attached, in training mode, and the adapter. ``labels``: those of the head of
    a sequence classifier."""
    torch.set_num_threads(1)  # models this small lose time by sharing their work out
    adapter = make_adapter(recipe)
    folder = Path(recipe.model.path)
    checkpointing = recipe.training.gradient_checkpointing
    head = Head(labels, recipe.seed) if labels else None
    base = build(recipe.model, folder, CPU, full=adapter.full, checkpointing=checkpointing, head=head).model
    return adapter.attach(base, lambda: plain_base_of(recipe)).train(), adapter


def base_of(recipe: Recipe) -> Any:
    return build(recipe.model, Path(recipe.model.path), CPU, full=False, checkpointing=False).model


def plain_base_of(recipe: Recipe) -> Any:
    """The base as it lies in its files, whatever the recipe quantises it to."""
    section = recipe.model.model_copy(update={"quantization": "none"})
    return build(section, Path(recipe.model.path), CPU, full=False, checkpointing=False).model


def stir(model: torch.nn.Module, scale: float = 0.05) -> None:
    """Moves what is trained away from where it begins, so that an adapter changes what its base says."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def logits_of(model: torch.nn.Module, seed: int = 1, vocabulary: int = 384) -> torch.Tensor:
    """The logits of one fixed text, in evaluation mode."""
    tokens = torch.randint(4, vocabulary, (1, 20), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=tokens, use_cache=False).logits.float()
    return logits
