"""The head of a sequence classifier, which a language model's checkpoint lacks.

Missing parameters are drawn from a generator seeded by (seed, parameter name), so that every rank has the same head and
a run can be repeated. They are kept in float32 and unquantised, since all of them are trained.
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
    """A head to build: ``labels`` name its outputs, ``seed`` is the run's."""

    labels: tuple[str, ...]
    seed: int

    def settings(self) -> dict[str, Any]:
        """Returns the fields of the model's configuration that describe the head."""
        names = dict(enumerate(self.labels))
        return {"id2label": names, "label2id": {name: number for number, name in names.items()}}


def save_head_config(model: Any, folder: Path) -> None:
    """Writes the ``config.json`` with which the base has to be loaded: with the labels and the padding token, without
    the base's own quantisation."""
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    config.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str, sort_keys=True) + "\n")


def is_head(model: Any, name: str) -> bool:
    """Returns True for a parameter outside the base, or in a pooler on top of it: many checkpoints lack both."""
    base = f"{model.base_model_prefix}."
    return not name.startswith(base) or name.startswith(f"{base}{POOLER}.")


def head_modules(model: Any) -> list[str]:
    """Returns the names of the modules that a checkpoint may lack."""
    names = [name for name, _ in model.named_parameters() if is_head(model, name)]
    modules = [n.split(".")[: 2 if n.startswith(model.base_model_prefix + ".") else 1] for n in names]
    return list(dict.fromkeys(".".join(parts) for parts in modules))


def set_up_head(model: Any, head: Head, missing: Iterable[str]) -> None:
    """Draws the ``missing`` parameters, and makes them and all parameters outside the base trainable, in float32.

    Parameters on the meta device are not drawn here; see `drawn_for`."""
    drawn = set(missing)
    for name, parameter in model.named_parameters():
        if name in drawn and not parameter.is_meta:
            parameter.data = drawn_for(model, name, parameter.shape, head).to(parameter.device)
        if name in drawn or not name.startswith(f"{model.base_model_prefix}."):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    _set_padding(model.config)


def drawn_for(model: Any, name: str, shape: torch.Size, head: Head) -> torch.Tensor:
    """Returns the initial values of a parameter that the files lack."""
    std = float(getattr(model.config.get_text_config(), "initializer_range", None) or INITIAL_STD)
    return draw(name, shape, std, head.seed)


def take_tied_embeddings(model: Any, folder: Path, missing: set[str]) -> set[str]:
    """Loads tied embeddings that are stored only as ``lm_head.weight``, and returns the names that were found so."""
    from safetensors import safe_open

    # Some language models' files hold tied embeddings under the output's name, which a sequence classifier lacks.
    embeddings = model.get_input_embeddings().weight
    tied = {name for name, parameter in model.named_parameters() if parameter is embeddings} & missing
    for path in sorted(folder.glob("*.safetensors")) if tied else ():
        with safe_open(path, framework="pt") as file:
            if OUTPUT in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                embeddings.data.copy_(file.get_tensor(OUTPUT))
                return tied
    return set()


def draw(name: str, shape: torch.Size, std: float, seed: int) -> torch.Tensor:
    """Draws weights from N(0, std²); biases are 0 and norm scales 1. transformers uses the same distributions."""
    if len(shape) < 2:
        return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.empty(shape, dtype=torch.float32).normal_(0.0, std, generator=generator)


def _set_padding(config: Any) -> None:
    # A decoder's head reads the last token that is not ``pad_token_id``. If the model has none, the end of text is
    # used, as is usual; where a sample ends with it, the head reads the token before.
    text = config.get_text_config()
    if text.pad_token_id is None or text.pad_token_id < 0:
        end = text.eos_token_id
        text.pad_token_id = end[0] if isinstance(end, list) else end
