"""The reference: transformers and peft alone, each sample by itself, in a loop of a few lines."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from tests.support.models import samples_of
from trainer.data import Batch
from trainer.recipe.sections.optimizer import OptimizerSection

NAMED = 0.01


class Text(NamedTuple):
    """A sample: its tokens, and which of them are to be predicted."""

    ids: torch.Tensor
    targets: torch.Tensor


def texts_of(batches: Sequence[Batch]) -> list[Text]:
    return [
        Text(torch.from_numpy(batch.input_ids[row, columns]), torch.from_numpy(batch.targets[row, columns]))
        for batch in batches
        for row, columns in samples_of(batch)
    ]


def load(base: Path, adapter: Path | None = None, *, trained: bool = False) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, adapter, is_trainable=trained) if adapter else model


@torch.no_grad()
def set_adapter(model: Any, folder: Path) -> None:
    """Sets the adapter's values by their names in the file: in a few architectures peft loads only some of them."""
    saved = load_file(folder / "adapter_model.safetensors")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(saved[name.replace(".default", "")])


def loss_of(model: Any, texts: Sequence[Text]) -> torch.Tensor:
    """Returns the mean over the targets of all texts."""
    losses = []
    for text in texts:
        logits = model(input_ids=text.ids[None], use_cache=False).logits[0]
        losses.append(cross_entropy(logits[:-1][text.targets[1:]].float(), text.ids[text.targets], reduction="sum"))
    return torch.stack(losses).sum() / sum(int(text.targets.sum()) for text in texts)


@torch.no_grad()
def evaluated(model: Any, texts: Sequence[Text]) -> float:
    return float(loss_of(model.eval(), texts))


def train(
    model: Any, texts: Sequence[Text], steps: int, section: OptimizerSection
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Returns the loss of each step, and the gradients of the first by their names in the adapter's file."""
    trained = {n.replace(".default", ""): p for n, p in model.named_parameters() if p.requires_grad}
    gradients: dict[str, torch.Tensor] = {}
    optimizer = torch.optim.AdamW(
        list(trained.values()), section.lr, betas=section.betas, eps=section.eps, weight_decay=section.weight_decay
    )
    losses = []
    model.train()
    for _ in range(steps):
        loss = loss_of(model, texts)
        loss.backward()
        gradients = gradients or {n: p.grad.clone() for n, p in trained.items() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, gradients


class Coverage(NamedTuple):
    """``adapted``: the share of the weights between the embeddings that have an adapter. ``left_out``: the names of
    those that have none and are more than ``NAMED`` of all, with their share; ``#`` for the numbers in them."""

    adapted: float
    left_out: dict[str, float]


def coverage(model: Any) -> Coverage:
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = model.get_base_model()
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    outer = {id(p) for module in ends if module is not None for p in module.parameters()}
    adapted = {id(p) for m in model.modules() if isinstance(m, BaseTunerLayer) for p in _weights(m)}
    body = {n: p for n, p in base.named_parameters() if not p.requires_grad and id(p) not in outer}
    total = max(1, sum(p.numel() for p in body.values()))
    left: dict[str, float] = defaultdict(float)
    for name, parameter in body.items():
        if id(parameter) not in adapted:
            left[re.sub(r"\d+", "#", name)] += parameter.numel() / total
    named = {name: round(share, 3) for name, share in left.items() if share > NAMED}
    return Coverage(round(1 - sum(left.values()), 3), named)


def _weights(module: Any) -> list[torch.Tensor]:
    name = getattr(module, "parameter_name", None)  # of a layer on a single parameter, as on an expert
    return [getattr(module.get_base_layer(), name)] if name else list(module.get_base_layer().parameters())
