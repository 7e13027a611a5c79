"""LoRA and DoRA, by peft.

LoRA (Hu et al. 2021, arXiv:2106.09685): W x + (alpha / r) B A x, with A of shape [r, in] and B of shape [out, r].
DoRA (Liu et al. 2024, arXiv:2402.09353): the sum W + (alpha / r) B A is normalised per output row and scaled by a
trained magnitude m of shape [out]. B starts at zero, so that the first forward is the base's own.
"""

from __future__ import annotations

import copy
import hashlib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trainer.adapters.base import Adapter, head_modules
from trainer.errors import InputError
from trainer.recipe.tasks import AUTO_CLASSES, PEFT_TYPES

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

ADAPTER_NAME = "default"
LISTED_MODULES = 20


class Lora(Adapter):
    use_dora = False

    def attach(self, base: torch.nn.Module) -> torch.nn.Module:
        from peft import get_peft_model

        section = self.recipe.adapter
        check_targets(base, section.target_modules)
        try:
            model = get_peft_model(base, self.config(head_modules(base)))
        except ValueError as e:
            raise InputError(f"adapter.target_modules {section.target_modules!r} do not fit this model: {e}") from e
        initialise(model, self.recipe.seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        return model

    def config(self, head: list[str]) -> LoraConfig:
        from peft import LoraConfig

        section = self.recipe.adapter
        targets = section.target_modules
        return LoraConfig(
            task_type=PEFT_TYPES[AUTO_CLASSES[self.recipe.task]],
            modules_to_save=head or None,
            r=section.rank,
            lora_alpha=section.alpha,
            lora_dropout=section.dropout,
            target_modules=targets if isinstance(targets, str) else list(targets),
            bias=section.bias,
            use_dora=self.use_dora,
            revision=self.recipe.model.revision,
        )

    def saved_names(self, model: torch.nn.Module) -> dict[str, str]:
        """peft decides what is saved under which name: it is asked with a marker in the place of each tensor."""
        from peft import get_peft_model_state_dict

        trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        markers: dict[str, Any] = {name: torch.empty(0) for name in trainable}
        # Names that autograd wrappers add (checkpointing, sharding) never reach this point: the model is the inner one.
        saved = get_peft_model_state_dict(
            model, state_dict=markers, adapter_name=ADAPTER_NAME, save_embedding_layers=False
        )
        by_identity = {id(marker): name for name, marker in markers.items()}
        names = {by_identity[id(value)]: key for key, value in saved.items()}
        lost = sorted(set(trainable) - set(names))
        assert not lost, f"peft would not save {lost}"
        return names

    def save(self, model: torch.nn.Module, weights: Mapping[str, torch.Tensor], folder: Path) -> None:
        from safetensors.torch import save_file

        names = self.saved_names(model)
        save_file({names[n]: t.contiguous() for n, t in weights.items()}, folder / self.weights_file, {"format": "pt"})
        self._saved_config(model).save_pretrained(str(folder))

    def _saved_config(self, model: Any) -> LoraConfig:
        """peft's own, with the base that the recipe names (peft has put the folder here that it was loaded from), and
        with the targets in order (peft keeps a set, whose order differs from process to process)."""
        config: LoraConfig = copy.deepcopy(model.peft_config[ADAPTER_NAME])
        config.base_model_name_or_path = self.recipe.model.path
        if not isinstance(config.target_modules, str):
            config.target_modules = sorted(config.target_modules or ())
        config.inference_mode = True
        return config

    def starts_at_zero(self, saved_name: str) -> bool:
        return ".lora_B." in saved_name


class Dora(Lora):
    use_dora = True


def initialise(model: PeftModel | torch.nn.Module, seed: int) -> None:
    """Draws every lora_A from a generator seeded by (seed, parameter name): independent of ranks and of load order."""
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            value = torch.empty(parameter.shape, dtype=torch.float32)
            torch.nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator)
            parameter.data.copy_(value)


def check_targets(base: torch.nn.Module, targets: str | tuple[str, ...] | list[str]) -> None:
    """Raises InputError when a target matches no linear layer of the model; peft itself is silent about a typo in a
    list as long as another entry matches."""
    if targets == "all-linear":
        return
    names = linear_modules(base)
    wanted = [targets] if isinstance(targets, str) else list(targets)
    missing = [t for t in wanted if not any(_matches(t, n, is_pattern=isinstance(targets, str)) for n in names)]
    if missing:
        leaves = sorted({n.rsplit(".", 1)[-1] for n in names})[:LISTED_MODULES]
        raise InputError(
            f"adapter.target_modules {missing} match no linear layer of this model; there are {', '.join(leaves)} "
            "(a single string is a regular expression over whole names such as "
            f"{names[0]!r}; or say all-linear)"
        )


def linear_modules(base: torch.nn.Module) -> list[str]:
    """Full names of the linear layers, quantised ones (subclasses of ``nn.Linear``) included, and GPT-2's Conv1D."""
    return [n for n, m in base.named_modules() if isinstance(m, torch.nn.Linear) or type(m).__name__ == "Conv1D"]


def _matches(target: str, name: str, *, is_pattern: bool) -> bool:
    if is_pattern:
        return re.fullmatch(target, name) is not None
    return name == target or name.endswith(f".{target}")
