"""Small random models of any architecture, with the tokenizer and the texts of the tests."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.families.shrink import small_config

MOST_PARAMETERS = 5_000_000
BYTES = 260
"""Entries of the tokenizer: all bytes and four special tokens, which every architecture's vocabulary holds."""
LEAST_SPREAD, MOST_SPREAD = 0.05, 20.0
SAMPLES, SHORTEST, LONGEST = 12, 9, 60


class NotMade(Exception):
    """transformers cannot use a small model of this architecture for text alone; ``str`` gives the reason."""


@dataclass(frozen=True)
class Base:
    """``kinds``: what the model has beside dense layers (experts, sliding windows, a state). ``spread``: the standard
    deviation of its logits."""

    class_name: str
    parameters: int
    kinds: list[str]
    spread: float


def architectures() -> list[str]:
    """Returns the model types of every causal language model that transformers has."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def make_base(model_type: str, folder: Path) -> Base:
    """Writes the small model with a tokenizer into ``folder``. Raises NotMade."""
    import transformers

    from launcher.quickstart.model import make_tokenizer

    try:
        config = small_config(model_type)
        with torch.device("meta"):
            size = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(config).parameters())
        if size > MOST_PARAMETERS:
            raise NotMade(f"the small model has {size:,} parameters")
        torch.manual_seed(3)
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        redraw(model)
        logits = _logits(model)
        model.save_pretrained(folder)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        moved = float((_logits(loaded) - logits).abs().max())
    except NotMade:
        raise
    except Exception as error:
        raise NotMade(f"{type(error).__name__}: {error}") from error
    if not LEAST_SPREAD < logits.std() < MOST_SPREAD:
        raise NotMade(f"its logits spread by {float(logits.std()):.2g}, so that faults would not be seen")
    if not moved < 1e-4:
        raise NotMade(f"a model that is saved and loaded again has other logits (by {moved:.1e})")
    make_tokenizer([], BYTES).save_pretrained(folder)
    return Base(type(model).__name__, size, _kinds(model), float(logits.std()))


@torch.no_grad()
def redraw(model: torch.nn.Module) -> None:
    """Draws every weight so that layers keep the scale of their inputs: logits then differ by about 1, and so does a
    sample from another that it sees."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
        else:
            parameter.add_(0.05 * torch.randn_like(parameter))


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    ids = torch.arange(4, 4 + LONGEST)[None]
    logits: torch.Tensor = model.eval()(input_ids=ids, use_cache=False).logits
    if not torch.isfinite(logits).all():
        raise NotMade("its logits are not finite")
    return logits


def _kinds(model: Any) -> list[str]:
    config = model.config.get_text_config()
    layers = getattr(config, "layer_types", None) or ["sliding_attention"]
    found = {
        "experts": any("experts" in name.split(".") for name, _ in model.named_parameters()),
        "sliding": any("sliding" in str(kind) for kind in layers) and bool(getattr(config, "sliding_window", None)),
        "state": bool(model._is_stateful) or any("linear" in str(kind) for kind in layers),
    }
    return [kind for kind, there in found.items() if there]


def write_texts(folder: Path) -> None:
    """Writes ``data/texts.jsonl``: prompts and completions of random letters, of 9 to 60 tokens with both ends."""
    draw = random.Random(5)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    with (folder / "data" / "texts.jsonl").open("w") as file:
        for i in range(SAMPLES):
            length = SHORTEST + (LONGEST - SHORTEST) * i // (SAMPLES - 1) - 2
            text = "".join(draw.choice("abcdefghijklmnopqrstuvwxyz ") for _ in range(length))
            file.write(json.dumps({"prompt": text[:4], "completion": text[4:]}) + "\n")
