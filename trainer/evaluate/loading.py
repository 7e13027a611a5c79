"""The model to evaluate: the base as training holds it, with the saved adapter on it.

Plain peft puts it there, as it would anywhere else. But pissa and olora were trained on what is left of the base, and
quantising that is another thing than quantising the base; so they are put back as training does on a quantised one.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trainer.adapters import make_adapter
from trainer.adapters.in_packs import before_embeddings, before_keys
from trainer.adapters.residual import Residual
from trainer.errors import InputError
from trainer.evaluate.subject import ADAPTER_CONFIG, Subject
from trainer.model import Head, build, fetch_model
from trainer.recipe import Recipe
from trainer.recipe.tasks import AUTO_CLASSES, CAUSAL

INSERTED: dict[str, Callable[[Any], None]] = {
    "PROMPT_TUNING": before_embeddings,
    "P_TUNING": before_embeddings,
    "PREFIX_TUNING": before_keys,
}


def load(recipe: Recipe, subject: Subject, labels: tuple[str, ...] | None, device: torch.device) -> Any:
    """In evaluation mode on ``device``. ``labels``: of a classifier's outputs.

    Raises InputError when the adapter does not fit the base."""
    files = fetch_model(subject.section)
    head = Head(labels, recipe.seed) if labels else None

    def base(quantization: str, place: torch.device) -> Any:
        section = subject.section.model_copy(update={"quantization": quantization})
        return build(section, files.folder, place, full=False, checkpointing=False, head=head).model

    model = base(subject.section.quantization, device)
    if subject.adapter is None:
        return model.eval()
    try:
        adapted = _adapted(recipe, model, subject.adapter, device, lambda: base("none", torch.device("cpu")))
    except (ValueError, RuntimeError, KeyError) as error:
        said = " ".join(str(error).split())[:400]
        raise InputError(f"the adapter does not fit the base {subject.section.path}: {said}") from error
    return adapted.eval()


def _adapted(recipe: Recipe, base: Any, folder: Path, device: torch.device, plain: Callable[[], Any]) -> Any:
    if recipe.adapter.kind in ("pissa", "olora") and recipe.model.quantization != "none":
        return _as_trained(recipe, base, folder, plain)
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys")
        try:
            model = PeftModel.from_pretrained(base, str(folder), torch_device=str(device))
        except UserWarning as lacking:
            raise ValueError(str(lacking)) from None
    kind = json.loads((folder / ADAPTER_CONFIG).read_text())["peft_type"]
    if AUTO_CLASSES[recipe.task] == CAUSAL and kind in INSERTED:
        INSERTED[kind](model)
    return model


def _as_trained(recipe: Recipe, base: Any, folder: Path, plain: Callable[[], Any]) -> Any:
    from safetensors import safe_open

    adapter = make_adapter(recipe)
    assert isinstance(adapter, Residual)
    model = adapter.attach(base, plain)
    with safe_open(folder / adapter.weights_file, framework="pt") as file, torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(adapter.trained(model, name, file.get_tensor))
        adapter.restored(model, file.get_tensor)
    return model


def reads_a_prompt(model: Any) -> bool:
    """Whether trained vectors stand before the text, for which generation in padded batches is not made."""
    config = getattr(model, "peft_config", {}).get("default")
    return config is not None and (config.is_prompt_learning or config.peft_type == "ADAPTION_PROMPT")
