"""The model to train without values: built on torch's meta device, quantised, with its adapter."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import transformers

from trainer.adapters import make_adapter
from trainer.experts import compute_by_expert
from trainer.model.head import Head, set_up_head
from trainer.model.meta import from_config
from trainer.plan.fake_quantized_linear import stand_in
from trainer.recipe import Recipe
from trainer.recipe.tasks import TASKS
from trainer.tasks import make_task

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def layer_count(config: PreTrainedConfig) -> int:
    return int(config.get_text_config().num_hidden_layers)


def with_layers(config: PreTrainedConfig, count: int) -> PreTrainedConfig:
    """Returns the configuration with the first ``count`` layers only."""
    fewer = copy.deepcopy(config)
    text: Any = fewer.get_text_config()
    for name, value in list(vars(text).items()):  # the kind of each layer, under the names of several architectures
        if "layer" in name and isinstance(value, list) and len(value) == text.num_hidden_layers:
            setattr(text, name, value[:count])
    text.num_hidden_layers = count
    return fewer


def skeleton(recipe: Recipe, config: PreTrainedConfig, *, as_gathered: bool = False) -> torch.nn.Module:
    """Builds the model on the meta device, in training mode.

    ``as_gathered``: under full fine-tuning, parameters have the type in which the forward uses them instead of float32.
    Raises InputError when the configuration does not fit the task, or the adapter does not fit the model."""
    adapter, labels = make_adapter(recipe), make_task(recipe, labels_of(recipe)).labels
    head = Head(labels, recipe.seed) if labels else None
    if head:
        config = copy.deepcopy(config)
        config.update(head.settings())
    with quiet():
        model: Any = from_config(
            recipe.model,
            config,
            full=adapter.full and not as_gathered,
            checkpointing=recipe.training.gradient_checkpointing,
            auto_class=getattr(transformers, TASKS[recipe.task].auto_class),
        )
        if adapter.full:
            model.requires_grad_(True)
        if head:
            set_up_head(model, head, ())
        with torch.device("meta"):
            if recipe.model.quantization != "none":
                stand_in(model, getattr(torch, recipe.model.dtype))
            attached = adapter.attach(model).train()
        compute_by_expert(attached, planned=True)
        return attached


def labels_of(recipe: Recipe) -> tuple[str, ...]:
    """Returns the labels that the recipe names, filled up to two: a plan does not read the data, which has them all."""
    named = tuple(recipe.classification.class_weights)
    return named + tuple(f"label {i}" for i in range(len(named), 2))


@contextmanager
def quiet() -> Iterator[None]:
    """Silences the libraries' warnings about models that are built without weights."""
    level = logging.getLogger("transformers").level
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger("transformers").setLevel(level)
