"""Products of tokens with their experts: one expert after the other, with LoRA at the experts' inputs.

transformers calls an implementation of its interface for experts by name. This one differs from its own in two points:

- Packed experts are dequantised one at a time, in the forward and again in the backward. None is kept between them.
- A LoRA adapter of expert e adds (alpha / r) B_e A_e x to W_e x, with dropout of x. peft's own wrapper computes
  W + (alpha / r) B A of all experts, and a gradient of that shape; so do classes of experts without that interface.

Legend: N tokens, K experts for each, E experts of the layer, S = N K pairs of a token and an expert, in the order of
the experts, I input dimension, O output dimension, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn.utils import parametrize

from trainer.experts.packed import PackedExperts, packed_in

IMPLEMENTATION = "muster"
PLANNED = "muster_planned"
"""The same products under fake tensors, which have no values: the tokens are spread over a few experts."""
PLANNED_EXPERTS = 4
_WRAPPERS = "_lora_wrappers"
ALIGNED = 16
"""Bytes to which torch's grouped product wants the rows of its operands aligned."""


def compute_by_expert(model: Any, *, planned: bool = False) -> list[str]:
    """Makes each layer of experts that is packed or has a LoRA adapter compute by this implementation, if its class
    supports transformers' interface. Returns the names of the layers with an adapter that do not.

    ``model``: with its adapter. ``planned``: it will compute with fake tensors."""
    from peft.tuners.lora.layer import ParamWrapper
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts_forward)
    ALL_EXPERTS_FUNCTIONS.register(PLANNED, partial(_experts_forward, count=_evenly))
    by_sum, needed = [], False
    for name, module in model.named_modules():
        has_interface = hasattr(_experts_of(module), "is_transposed")  # transformers gives a class this attribute
        if isinstance(module, ParamWrapper):
            _experts_of(module).__dict__.setdefault(_WRAPPERS, {})[module.parameter_name] = module
            module.forward = partial(_pass_on if has_interface else _with_sums, module)  # type: ignore[method-assign]
            by_sum += [] if has_interface else [name]
        needed = needed or (has_interface and (planned or isinstance(module, ParamWrapper) or bool(packed_in(module))))
    if needed:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        base.set_experts_implementation(PLANNED if planned else IMPLEMENTATION)
    return by_sum


def expert_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Returns the layers of experts that are packed or have a LoRA adapter, each with all that is around it: such a
    layer reads the parameters of modules inside it, whose own forward does not run."""
    found: list[torch.nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():  # from the outside in
        experts = _experts_of(module)
        if id(experts) not in inside and (_WRAPPERS in experts.__dict__ or packed_in(experts)):
            found.append(module)
            inside.add(id(experts))
    return found


def _experts_of(module: Any) -> Any:
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def _pass_on(wrapper: Any, *args: Any, **kwargs: Any) -> Any:
    return wrapper.base_layer(*args, **kwargs)


def _with_sums(wrapper: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls a layer of experts of any class, with W + (alpha / r) B A in place of each of its parameters W."""
    layer = wrapper.get_base_layer()
    # All sums first: peft's own forward caches a packed parameter before its adapter is added to it.
    added = {a: _Added(delta) for a, w in layer.__dict__[_WRAPPERS].items() if (delta := _delta(w)) is not None}
    for attribute, addition in added.items():
        parametrize.register_parametrization(layer, attribute, addition, unsafe=True)
    try:
        with parametrize.cached():
            return layer(*args, **kwargs)
    finally:
        for attribute in added:
            stack = layer.parametrizations[attribute]
            if len(stack) > 1:
                del stack[-1]
            else:
                parametrize.remove_parametrizations(layer, attribute, leave_parametrized=False)


class _Added(torch.nn.Module):
    def __init__(self, delta: torch.Tensor) -> None:
        super().__init__()
        self.delta = delta

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.delta


def _delta(wrapper: Any) -> torch.Tensor | None:
    if wrapper.disable_adapters or wrapper.merged:
        return None
    names = [name for name in wrapper.active_adapters if name in wrapper.lora_A]
    return sum(wrapper.get_delta_weight(name) for name in names) if names else None


def _counted(experts_S: torch.Tensor, number: int) -> list[int]:
    counts: list[int] = torch.bincount(experts_S, minlength=number)[:number].tolist()
    return counts


def _evenly(experts_S: torch.Tensor, number: int) -> list[int]:
    share, rest = divmod(len(experts_S), min(number, PLANNED_EXPERTS))
    return [(share + (expert < rest)) * (expert < PLANNED_EXPERTS) for expert in range(number)]


def _experts_forward(
    layer: Any,
    hidden_NI: torch.Tensor,
    chosen_NK: torch.Tensor,
    weights_NK: torch.Tensor,
    *,
    count: Callable[[torch.Tensor, int], list[int]] = _counted,
) -> torch.Tensor:
    """Implements transformers' interface for experts. Returns the weighted sum of each token's experts [N, I]."""
    device = hidden_NI.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_NI.dtype
    experts_S, order_S = torch.sort(chosen_NK.reshape(-1), stable=True)
    counts = count(experts_S, layer.num_experts)
    out = hidden_NI.to(dtype)[order_S // chosen_NK.shape[1]]
    if layer.has_gate:
        out = layer._apply_gate(_product(layer, "gate_up_proj", out, counts, experts_S))
    else:
        out = layer.act_fn(_product(layer, "up_proj", out, counts, experts_S))
    out = _product(layer, "down_proj", out, counts, experts_S)
    if layer.has_post_expert_norm:
        out = layer.post_expert_norm(out)
    out = out * weights_NK.reshape(-1)[order_S, None]
    # Put back in the tokens' order and summed: adding at indices would add in another order on each run of a GPU.
    back_S = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(len(order_S), device=order_S.device))
    return out[back_S].view(*chosen_NK.shape, -1).sum(1).to(hidden_NI.dtype)


def _product(
    layer: Any, attribute: str, x_SI: torch.Tensor, counts: list[int], experts_S: torch.Tensor
) -> torch.Tensor:
    """Returns each token's product with its expert's matrix and LoRA adapters [S, O]."""
    packing = packed_in(layer).get(attribute)
    if packing is not None:
        packed = layer.parametrizations[attribute].original
        operands = (x_SI, packed, packing, counts, layer.is_transposed)
        out: torch.Tensor = _PackedProduct.apply(*operands)  # type: ignore[no-untyped-call]
    else:
        weight = getattr(layer, attribute).to(x_SI.dtype)
        out = _grouped(x_SI, weight.transpose(1, 2) if layer.is_transposed else weight, counts)
    if layer.has_bias:
        out = out + getattr(layer, f"{attribute}_bias")[experts_S].to(out.dtype)
    for a_ERI, b_EOR, scale, dropout in _adapters(layer, attribute, x_SI.dtype):
        out = out + scale * _grouped(_grouped(dropout(x_SI), a_ERI, counts), b_EOR, counts)
    return out


def _adapters(
    layer: Any, attribute: str, dtype: torch.dtype
) -> Iterator[tuple[torch.Tensor, torch.Tensor, float, torch.nn.Module]]:
    """Yields A, B, scale and dropout of each active LoRA adapter, from peft's layout: A [E R, I] and B [O, R E]."""
    wrapper = layer.__dict__.get(_WRAPPERS, {}).get(attribute)
    if wrapper is None or wrapper.disable_adapters or wrapper.merged:
        return
    for name in wrapper.active_adapters:
        if name in wrapper.lora_A:
            a, b = wrapper.lora_A[name].weight.to(dtype), wrapper.lora_B[name].weight.to(dtype)
            a_ERI = a.view(wrapper.num_experts, -1, a.shape[1])
            b_EOR = b.view(b.shape[0], -1, wrapper.num_experts).permute(2, 0, 1).contiguous()
            yield a_ERI, b_EOR, wrapper.scaling[name], wrapper.lora_dropout[name]


def _grouped(x_SI: torch.Tensor, weight_EOI: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Returns [S, O]: each row times the transposed matrix of its expert."""
    if _has_kernel(x_SI, weight_EOI):
        ends = torch.tensor(counts, device=x_SI.device).cumsum(0, dtype=torch.int32)
        return torch.nn.functional.grouped_mm(x_SI, weight_EOI.transpose(1, 2), offs=ends)
    parts = zip(x_SI.split(list(counts)), weight_EOI.unbind(0), strict=True)
    return torch.cat([x @ weight.t() for x, weight in parts if len(x)])


def _has_kernel(x_SI: torch.Tensor, weight_EOI: torch.Tensor) -> bool:
    if not x_SI.is_cuda or x_SI.dtype != torch.bfloat16 or not hasattr(torch.nn.functional, "grouped_mm"):
        return False
    aligned = all(size * x_SI.element_size() % ALIGNED == 0 for size in weight_EOI.shape[1:])
    return aligned and torch.cuda.get_device_capability(x_SI.device) >= (8, 0)


class _PackedProduct(torch.autograd.Function):
    """The product with frozen packed experts; only x has a gradient."""

    @staticmethod
    def forward(
        ctx: Any, x_SI: torch.Tensor, packed: torch.Tensor, packing: PackedExperts, counts: list[int], transposed: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(packed)
        ctx.packing, ctx.counts, ctx.transposed = packing, counts, transposed
        return _by_packed(x_SI, packed, packing, counts, transposed)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        (packed,) = ctx.saved_tensors
        product = _by_packed(gradients[0], packed, ctx.packing, ctx.counts, not ctx.transposed)
        return product, None, None, None, None


def _by_packed(
    x: torch.Tensor, packed: torch.Tensor, packing: PackedExperts, counts: list[int], transposed: bool
) -> torch.Tensor:
    """Returns each row times its expert's matrix [in, out], or its transpose [out, in] unless ``transposed``."""
    used = [number for number, tokens in enumerate(counts) if tokens]
    rows: Iterable[torch.Tensor] = (part for part in x.split(counts) if len(part))
    out = x.new_empty(len(x), packing.shape[2 if transposed else 1])
    places = (part for part in out.split(counts) if len(part))
    for row, place, weight in zip(rows, places, packing.experts(packed, used), strict=True):
        matrix = weight.to(x.dtype)
        torch.mm(row, matrix if transposed else matrix.t(), out=place)
    return out
