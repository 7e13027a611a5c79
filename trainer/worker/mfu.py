"""Floating-point operations of a step, and how much of the devices' peak they are: MFU and HFU.

MFU is the number of operations that the mathematics of a step needs, divided by its seconds and the devices' peak; HFU
also counts what gradient checkpointing computes a second time (Chowdhery et al. 2022, arXiv:2204.02311, appendix B;
Korthikanti et al. 2022, arXiv:2205.05198, for MFU and HFU). Where that formula has 6 N per token, an adapter needs
less:

    step  = (4 F + 6 T) tokens + (4 F_head + 6 T_head) targets + 12 Σ_layers width · pairs
    again = 2 (F + T) tokens + 4 Σ_layers width · pairs           with gradient checkpointing

F: elements of frozen matrices that each token is multiplied with, 2 operations each forward and 2 for the gradient of
what went in; frozen weights have no gradient of their own. T: trained ones, which have one, for 2 more. Embeddings are
looked up, and biases, norms and other vectors cost nothing in comparison. The output head sees targets only (logits
elsewhere are neither needed nor made). Of a mixture of experts, those count that a token goes through.

width: heads · head_dim of a layer's attention; pairs: of a query and a key that it attends to in its own sample, at 4
operations per dimension forward and 8 backward. Causal attention in a sample of s tokens has s (s + 1) / 2 of them,
attention to both sides s², a sliding window fewer. Most tables elsewhere count s² for causal attention too, and the
head for all tokens: their figures are higher for the same speed.

Each forward without a gradient (a reference) adds 2 F tokens + 2 F_head targets + 4 Σ_layers width · pairs.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trainer.distributed.world import World
from trainer.experts import expert_counts, experts_per_token, packed_experts
from trainer.recipe import Recipe
from trainer.recipe.tasks import TASKS

if TYPE_CHECKING:
    from trainer.data import Batch

PEAK_TFLOPS = {
    r"B200": 2250.0,
    r"H200": 989.0,
    r"H100 PCIe": 756.0,
    r"H100 NVL": 835.0,
    r"H100": 989.0,
    r"A100": 312.0,
    r"L40S": 362.0,
    r"L4": 121.0,
    r"A40": 149.7,
    r"RTX A6000": 154.8,
    r"A10": 125.0,
    r"RTX 4090": 165.2,
    r"RTX 3090": 71.0,
}
"""TFLOP/s of the tensor cores in bfloat16 with sums in float32, by a part of the name that CUDA gives the device, the
narrower ones first. From NVIDIA's data sheets (B200: that of the DGX B200; GeForce: the white papers of Ada and GA102);
where those count sparse matrices, half of it. They hold for the default power limit."""


def peak_flops(device_name: str) -> float | None:
    """FLOP/s of the device at most; None when it is not in the table."""
    found = (tflops for name, tflops in PEAK_TFLOPS.items() if re.search(rf"\b{name}\b", device_name))
    tflops = next(found, None)
    return None if tflops is None else tflops * 1e12


@dataclass(frozen=True)
class Attention:
    """Layers that attend alike. ``width``: heads · head_dim; ``reach``: how many tokens back (and, if not ``causal``,
    forward) a token sees next to itself, None for all of its sample."""

    layers: int
    width: int
    causal: bool = True
    reach: int | None = None

    def pairs(self, positions: np.ndarray, tokens: int) -> int:
        """Returns the number of query-key pairs in one layer. ``positions`` count from 0 in each sample, and are 0 at
        pads, which ``tokens`` does not count."""
        back = positions if self.reach is None else np.minimum(positions, self.reach)
        return int(back.sum()) * (1 if self.causal else 2) + tokens


@dataclass(frozen=True)
class Operations:
    """Elements of the matrices that one token, or one target, is multiplied with."""

    frozen: float
    trained: float
    head_frozen: float = 0.0
    head_trained: float = 0.0
    attention: tuple[Attention, ...] = ()

    def scores(self, batch: Batch) -> float:
        """Σ_layers width · pairs of a micro-batch."""
        return float(
            sum(a.layers * a.width * a.pairs(batch.position_ids, batch.tokens) for a in self.attention if batch.tokens)
        )

    def step(self, tokens: float, targets: float, scores: float) -> float:
        linear = (4 * self.frozen + 6 * self.trained) * tokens
        return linear + (4 * self.head_frozen + 6 * self.head_trained) * targets + 12 * scores

    def again(self, tokens: float, scores: float) -> float:
        """Returns the operations that gradient checkpointing computes a second time: the forward of the layers."""
        return 2 * (self.frozen + self.trained) * tokens + 4 * scores

    def reference(self, tokens: float, targets: float, scores: float) -> float:
        """One forward without what is trained."""
        return 2 * self.frozen * tokens + 2 * self.head_frozen * targets + 4 * scores


@dataclass(frozen=True)
class Meter:
    """Turns a step's counts into its share of ``peak``: FLOP/s of all ranks' devices together."""

    operations: Operations
    peak: float
    recomputes: bool = False
    other_forwards: int = 0

    def utilisation(self, tokens: int, targets: int, scores: float, seconds: float) -> tuple[float, float]:
        """Returns MFU and HFU, shares of 1; ``scores`` is summed over all ranks."""
        needed = self.operations.step(tokens, targets, scores)
        needed += self.other_forwards * self.operations.reference(tokens, targets, scores)
        done = needed + (self.operations.again(tokens, scores) if self.recomputes else 0.0)
        most = self.peak * max(seconds, 1e-9)
        return needed / most, done / most


"""What configurations of transformers call the number of experts in a layer."""


def meter_of(recipe: Recipe, world: World, operations: Operations) -> Meter | None:
    """Collective. None where the peak of a rank's device is known neither from the recipe nor from its name, and for a
    task whose operations are not counted."""
    peak: float | None = None
    if recipe.compute.peak_tflops is not None:
        peak = recipe.compute.peak_tflops * 1e12
    elif world.device.type == "cuda":
        peak = peak_flops(torch.cuda.get_device_name(world.device))
    peaks = world.all_gather(peak)
    row = TASKS[recipe.task]
    if None in peaks or row.generates:
        return None
    computed = row.has_reference and not recipe.stores_outputs
    return Meter(
        operations,
        float(sum(peaks)),
        recomputes=recipe.training.gradient_checkpointing,
        other_forwards=row.extra_forwards + (1 + row.extra_forwards if computed else 0),
    )


def operations_of(model: Any) -> Operations:
    """``model``: with its adapter on, and not yet wrapped by a strategy, which may leave empty parameters behind."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    text = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    counted: dict[tuple[bool, bool], float] = defaultdict(float)
    inside = {id(m) for m in head.modules()} if head is not None else set()
    shares = _shares_of_experts(model, text)
    for module in model.modules():
        for elements, trained in _multiplied(module, shares):
            counted[id(module) in inside, trained] += elements
    return Operations(
        frozen=counted[False, False],
        trained=counted[False, True],
        head_frozen=counted[True, False],
        head_trained=counted[True, True],
        attention=tuple(_attention(model, text)),
    )


def _multiplied(module: Any, shares: Mapping[int, float]) -> Iterator[tuple[float, bool]]:
    """Yields (elements, trained) of each matrix of the module; packed ones have another shape than their layer."""
    if isinstance(module, torch.nn.Embedding):
        return
    for parameter in module._parameters.values():
        if parameter is None or parameter.ndim < 2:
            continue
        share = shares.get(id(parameter), 1.0)
        if id(parameter) not in shares and isinstance(module, torch.nn.Linear):
            yield module.in_features * module.out_features, parameter.requires_grad
        else:
            yield parameter.numel() * share, parameter.requires_grad


def _shares_of_experts(model: torch.nn.Module, text: Any) -> dict[int, float]:
    """Returns, for each parameter that holds a matrix of all experts, or of their adapters, the number of elements that
    a token is multiplied with over the number of elements of the parameter."""
    chosen = experts_per_token(text)
    shares = {}
    for parameter, experts in packed_experts(model):
        shares[id(parameter)] = experts.shape.numel() / parameter.numel() * chosen / experts.shape[0]
    modules: Iterable[Any] = model.modules()
    for module in modules:
        if hasattr(module, "lora_A") and getattr(module, "num_experts", 1) > 1:
            pairs = [*module.lora_A.values(), *module.lora_B.values()]
            shares |= {id(linear.weight): chosen / module.num_experts for linear in pairs}
        elif not isinstance(module, torch.nn.Conv1d):
            stacked = [p for p in module._parameters.values() if p is not None and p.ndim == 3]
            shares |= {id(p): chosen / p.shape[0] for p in stacked if p.shape[0] in expert_counts(text)}
    return shares


def _attention(model: torch.nn.Module, text: Any) -> Iterator[Attention]:
    """Modules of transformers that attend have ``is_causal``; those whose layers differ have ``sliding_window`` too."""
    heads = getattr(text, "num_attention_heads", 0)
    modules: list[Any] = [m for m in model.modules() if isinstance(getattr(m, "is_causal", None), bool)]
    everywhere = getattr(text, "sliding_window", None)
    seen = Counter((m.is_causal, getattr(m, "sliding_window", everywhere), heads * _head_dim(m, text)) for m in modules)
    for (causal, window, width), layers in seen.items():
        yield Attention(layers, width, causal, None if window is None else window - 1)


def _head_dim(module: Any, text: Any) -> int:
    own = getattr(module, "head_dim", None)  # in some models it differs between layers, and the configuration has none
    found = own if isinstance(own, int) else getattr(text, "head_dim", None)
    return int(found or text.hidden_size // max(1, getattr(text, "num_attention_heads", 0)))
