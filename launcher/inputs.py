"""What a run needs, looked at before any worker starts: that is when a mistake costs least."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer.begin import check_rows
from trainer.errors import InputError
from trainer.recipe import Recipe
from trainer.storage import Storage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_storage(storage: Storage) -> bool:
    """Whether the storage has conditional put; InputError when it cannot be written."""
    return storage.check_writable()


def check_model(recipe: Recipe) -> None:
    """The model is there and is a causal language model, the adapter's target modules are in it, the tokenizer loads,
    and the first rows of every source become samples. Reads configuration and rows, no weights. Raises InputError."""
    from trainer.model import fetch_model

    files = fetch_model(recipe.model, weights=False)
    if recipe.adapter.method != "none":
        _check_targets(recipe, str(files.folder))
    check_rows(recipe, load_run_tokenizer(recipe))


def _check_targets(recipe: Recipe, folder: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from trainer.adapters.lora import check_targets

    trust = recipe.model.trust_remote_code
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
    except (OSError, ValueError, KeyError, ImportError) as e:
        raise InputError(f"model.path {recipe.model.path!r} is not a causal language model that loads: {e}") from e
    check_targets(model, recipe.adapter.target_modules)


def load_run_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    from trainer.model import fetch_model, load_tokenizer

    files = fetch_model(recipe.model, weights=False)
    return load_tokenizer(files.folder, trust_remote_code=recipe.model.trust_remote_code)
