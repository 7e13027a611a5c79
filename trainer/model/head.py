"""The head of a sequence classifier, where the base has none: a language model's checkpoint ends before it.

What is missing is drawn from a generator seeded by (seed, parameter name), so that every rank has the same head and a
run can be repeated. It is held in float32 and unquantised, since all of it is trained.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

POOLER = "pooler"
OUTPUT = "lm_head.weight"
INITIAL_STD = 0.02


@dataclass(frozen=True)
class Head:
    """``labels``: the name of each output. ``seed``: the run's."""

    labels: tuple[str, ...]
    seed: int

    def settings(self) -> dict[str, Any]:
        """What the model's configuration says of it."""
        names = dict(enumerate(self.labels))
        return {"id2label": names, "label2id": {name: number for number, name in names.items()}}


def save_head_config(model: Any, folder: Path) -> None:
    """Writes the configuration that the base is to be loaded with: the labels are in it, and the padding token. The
    base's own quantisation is not."""
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    config.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str, sort_keys=True) + "\n")


def is_head(model: Any, name: str) -> bool:
    """Whether this parameter lies outside the base, or in a pooler on top of it, which many checkpoints lack."""
    base = f"{model.base_model_prefix}."
    return not name.startswith(base) or name.startswith(f"{base}{POOLER}.")


def head_modules(model: Any) -> list[str]:
    """The names of the modules that a checkpoint may lack."""
    names = [n.split(".")[: 2 if n.startswith(model.base_model_prefix + ".") else 1] for n in _names(model)]
    return list(dict.fromkeys(".".join(parts) for parts in names))


def _names(model: Any) -> list[str]:
    return [name for name, _ in model.named_parameters() if is_head(model, name)]


def set_up_head(model: Any, head: Head, missing: Iterable[str]) -> None:
    """Draws the ``missing`` parameters, and makes those and all that lie outside the base trainable, in float32. On the
    meta device there is nothing to draw; see `drawn_for`."""
    drawn = set(missing)
    for name, parameter in model.named_parameters():
        if name in drawn and not parameter.is_meta:
            parameter.data = drawn_for(model, name, parameter.shape, head).to(parameter.device)
        if name in drawn or not name.startswith(f"{model.base_model_prefix}."):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    _set_padding(model.config)


def drawn_for(model: Any, name: str, shape: torch.Size, head: Head) -> torch.Tensor:
    """The first values of a parameter that the files lack."""
    return draw(name, shape, _std(model.config), head.seed)


def take_tied_embeddings(model: Any, folder: Path, missing: set[str]) -> set[str]:
    """Of a language model with tied embeddings, some files hold the output's name alone, which a sequence classifier
    does not look for. Returns the parameters that were found so."""
    from safetensors import safe_open

    embeddings = model.get_input_embeddings().weight
    tied = {name for name, parameter in model.named_parameters() if parameter is embeddings} & missing
    for path in sorted(folder.glob("*.safetensors")) if tied else ():
        with safe_open(path, framework="pt") as file:
            if OUTPUT in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                embeddings.data.copy_(file.get_tensor(OUTPUT))
                return tied
    return set()


def draw(name: str, shape: torch.Size, std: float, seed: int) -> torch.Tensor:
    """Weights N(0, std²), biases 0, the scales of norms 1: as transformers draws them."""
    if len(shape) < 2:
        return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.empty(shape, dtype=torch.float32).normal_(0.0, std, generator=generator)


def _std(config: Any) -> float:
    return float(getattr(config.get_text_config(), "initializer_range", None) or INITIAL_STD)


def _set_padding(config: Any) -> None:
    """A decoder's head reads at the last token that is no padding, and finds it by ``pad_token_id``. Without one, the
    end of text serves, as is usual; it is then not read itself where a sample ends with it."""
    text = config.get_text_config()
    if text.pad_token_id is None or text.pad_token_id < 0:
        end = text.eos_token_id
        text.pad_token_id = end[0] if isinstance(end, list) else end
