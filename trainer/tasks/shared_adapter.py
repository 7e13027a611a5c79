"""A second, frozen LoRA adapter on the model that is trained: another model without a second copy of the base model.

The adapter is added next to the trained one, and is switched on for its own forward passes
(`trainer.tasks.reference.adapter_of`; Santacroce et al. 2023, arXiv:2309.00754, *Hydra-RLHF*).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class SharedAdapter:
    """``name``: the adapter's name in the model. ``config``: peft's configuration of a LoRA adapter. ``weights``: by
    the names that they have in the model."""

    name: str
    config: Any
    weights: Mapping[str, torch.Tensor]

    def attach(self, model: Any) -> None:
        """Adds the adapter to the model; it is not trained. On the meta device it has no values yet; `init_parameter`
        returns them."""
        marks = [(p, p.requires_grad) for p in model.parameters()]
        model.add_adapter(self.name, self.config)
        for parameter, wanted in marks:
            parameter.requires_grad_(wanted)
        place = model.get_input_embeddings().weight.device
        for name in self.weights:
            module, _, attribute = name.rpartition(".")
            values = self.init_parameter(name).to(place)
            model.get_submodule(module)._parameters[attribute] = torch.nn.Parameter(values, requires_grad=False)

    def owns_parameter(self, name: str) -> bool:
        return name in self.weights

    def init_parameter(self, name: str) -> torch.Tensor:
        return self.weights[name].float()
