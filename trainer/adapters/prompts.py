"""Methods that train vectors in front of the text, and do not change the base model.

Prompt tuning (Lester et al. 2021, arXiv:2104.08691): ``virtual_tokens`` embeddings before those of the text. They start
as the embeddings of tokens drawn from the vocabulary.
P-tuning (Liu et al. 2021, arXiv:2103.10385): such embeddings, which an MLP computes from trained ones during training.
Prefix tuning (Li & Liang 2021, arXiv:2101.00190): keys and values of ``virtual_tokens`` before the text, in each layer.
With ``encoder_hidden``, an MLP computes them during training.

Every sample of a pack has them in front of itself (`trainer.adapters.packed_prompts`). The saved file contains the
embeddings or the prefix, and only the output of an MLP; a checkpoint contains the MLP in addition.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from trainer.adapters.packed_prompts import before_embeddings, before_keys
from trainer.adapters.peft_method import ADAPTER_NAME, PeftMethod, on_host, saved_by_peft

if TYPE_CHECKING:
    from trainer.adapters.base import Read, ShapeOf

SAVED = "prompt_embeddings"
ENCODER = f"prompt_encoder.{ADAPTER_NAME}."


class PromptTuning(PeftMethod):
    peft_type = "PROMPT_TUNING"
    reads_base = True
    inserted = staticmethod(before_embeddings)

    def settings(self, base: torch.nn.Module) -> dict[str, Any]:
        return {
            "num_virtual_tokens": self.recipe.adapter.virtual_tokens,
            "prompt_tuning_init": "SAMPLE_VOCAB",
        }

    @property
    def round_trips(self) -> bool:  # type: ignore[override]
        return not self._has_mlp()

    def _has_mlp(self) -> bool:
        return False

    def initialise(self, model: Any, plain: Any) -> None:
        encoder = model.prompt_encoder[ADAPTER_NAME]
        # A copy, to compute the embeddings from a snapshot while the model itself continues training.
        self._encoder = on_host(copy.deepcopy(encoder))
        self._tokens = model.prompt_tokens[ADAPTER_NAME]
        self.inserted(model)

    def saved_layout(self, model: Any) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
        if next(model.prompt_encoder.parameters()).is_meta:
            return {}, {}  # peft computes what it would save
        return saved_by_peft(model, apart=ENCODER)

    def saved_names(self, model: torch.nn.Module) -> dict[str, str]:
        own = {} if self._has_mlp() else {f"{ENCODER}embedding.weight": SAVED}
        return {**super().saved_names(model), **own}

    def saved_shapes(self, model: torch.nn.Module, shape_of: ShapeOf) -> dict[str, tuple[int, ...]]:
        return super().saved_shapes(model, shape_of) | {SAVED: tuple(self._made({}).shape)}

    def peft_state_dict(self, model: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        inner = {n.removeprefix(ENCODER): t for n, t in weights.items() if n.startswith(ENCODER)}
        outer = {n: t for n, t in weights.items() if not n.startswith(ENCODER)}
        return super().peft_state_dict(model, outer) | {SAVED: self._made(inner)}

    @torch.no_grad()
    def _made(self, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Computes the virtual tokens' embeddings (or keys and values) from the encoder's parameters."""
        made: torch.Tensor = torch.func.functional_call(self._encoder, dict(weights), (self._tokens[None],))
        return made[0]

    def read_parameter(self, model: torch.nn.Module, name: str, read: Read) -> torch.Tensor:
        return read(self.saved_names(model)[name])


class PTuning(PromptTuning):
    peft_type = "P_TUNING"
    reads_base = False

    def settings(self, base: torch.nn.Module) -> dict[str, Any]:
        section = self.recipe.adapter
        return {"num_virtual_tokens": section.virtual_tokens, "encoder_hidden_size": section.encoder_hidden}

    def _has_mlp(self) -> bool:
        return True


class Prefix(PromptTuning):
    peft_type = "PREFIX_TUNING"
    reads_base = False
    inserted = staticmethod(before_keys)

    def settings(self, base: torch.nn.Module) -> dict[str, Any]:
        section = self.recipe.adapter
        return {
            "num_virtual_tokens": section.virtual_tokens,
            "prefix_projection": self._has_mlp(),
            "encoder_hidden_size": section.encoder_hidden,
        }

    def _has_mlp(self) -> bool:
        return self.recipe.adapter.encoder_hidden is not None


def insert_for_each_sample(model: Any, peft_type: str) -> None:
    """Makes a model that peft has loaded put its virtual tokens before each sample of a pack, as in training. No effect
    on other methods."""
    for method in (PromptTuning, PTuning, Prefix):
        if method.peft_type == peft_type:
            method.inserted(model)
