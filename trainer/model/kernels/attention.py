"""Which kernel computes attention, and attention over samples of different lengths for the models of transformers.

A pack holds samples that must not see each other. By a mask, a kernel computes all pairs of a pack's tokens and throws
most away; told where the samples begin, it computes their own pairs only (Dao 2023, arXiv:2307.08691). Tasks tell it in
the model's keyword arguments, by the names that transformers has for them (``cu_seq_lens_q`` and so on). On a GPU that
is torch's variable-length FlashAttention; a CPU takes the samples one by one (`trainer.model.kernels.varlen_cpu`).

Legend: B packs, L tokens, H query heads, G heads of keys and values, D head dimension, N samples.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from trainer.errors import InputError
from trainer.model.kernels.packing_check import FIRST_TOKENS, SECOND_TOKENS
from trainer.model.kernels.varlen_cpu import by_sample
from trainer.recipe.sections.compute import SEGMENTING_TASKS, SIXTEEN_BIT, VIRTUAL

if TYPE_CHECKING:
    from trainer.recipe import Recipe

log = logging.getLogger(__name__)

VARLEN = "muster_varlen"
IMPLEMENTATIONS = {"sdpa": "sdpa", "varlen": VARLEN, "flex": "flex_attention", "flash": "flash_attention_2"}
"""What transformers calls the kernels that ``compute.attention`` names."""
TOLD = tuple(name for name in IMPLEMENTATIONS.values() if name != "sdpa")
TOLERANCE = 0.25
"""Of the logits' standard deviation, between two kernels in 16 bits: rounding moves them by hundredths, samples that
see each other by about 1."""
UNKNOWN = ("softcap", "s_aux", "position_bias")
"""What some models ask of attention, and this kernel has not."""


def wanted(recipe: Recipe, device: torch.device) -> str:
    """``compute.attention``, with ``auto`` decided."""
    setting = recipe.compute.attention
    if setting != "auto":
        return setting
    told = recipe.task in SEGMENTING_TASKS and recipe.adapter.method not in VIRTUAL
    if device.type == "cuda":
        runs = recipe.model.dtype in SIXTEEN_BIT
    else:
        runs = device.type == "cpu" and not recipe.compute.compile
    return "varlen" if told and runs else "sdpa"


def settle_attention(recipe: Recipe, model: Any, module: Any, device: torch.device) -> str:
    """Gives ``model``, loaded and with its adapter, the kernel that the recipe wants, and returns its name; ``module``
    is the same as it is called. Every rank calls it, in the forward's precision.

    Raises InputError when a kernel that was asked for does not run on this model, or computes something else; where it
    was muster's choice, that is a warning, and ``sdpa`` stays."""
    kernel = wanted(recipe, device)
    if kernel == "sdpa":
        return kernel
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = base.config._attn_implementation
    try:
        _check_installed(kernel)
        with _mode(module, training=False):
            want = _logits(module, device)
            _switch(base, kernel)
            got = _logits(module, device)
        with _mode(module, training=True):
            _logits(module, device)  # with the model's dropout, which a kernel may lack
        moved = float((got - want).abs().max() / want.std())
        if not moved <= TOLERANCE:
            raise InputError(f"logits move by {moved:.2g} of their spread")
    except Exception as error:  # a kernel, or the model around it, may raise anything
        base.set_attn_implementation(before)
        if recipe.compute.attention == "auto":
            log.warning("attention by sdpa: %s does not work here: %s", kernel, error)
            return "sdpa"
        raise InputError(
            f"compute.attention {kernel} does not work for {type(base).__name__} here: {error}; use sdpa"
        ) from error
    return kernel


@contextmanager
def by_mask(model: Any) -> Iterator[None]:
    """The kernel that takes masks, and caches with them, in the place of one that is told where samples begin."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = base.config._attn_implementation
    if before not in TOLD:
        yield
        return
    base.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        base.set_attn_implementation(before)


def _check_installed(kernel: str) -> None:
    if kernel == "flash":
        try:
            importlib.metadata.version("flash-attn")
        except importlib.metadata.PackageNotFoundError:
            raise InputError("the package flash-attn is not installed: pip install 'muster[flash]'") from None


def _switch(base: Any, kernel: str) -> None:
    register()
    base.set_attn_implementation(IMPLEMENTATIONS[kernel])
    if base.config._attn_implementation != IMPLEMENTATIONS[kernel]:
        raise InputError("the model's code has attention of its own, which cannot be exchanged")


@contextmanager
def _mode(module: Any, *, training: bool) -> Iterator[None]:
    was_training = module.training
    module.train(training)
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(was_training)


def _logits(module: Any, device: torch.device) -> torch.Tensor:
    """Of two samples in a pack, with two pads behind them."""
    tokens = [*range(FIRST_TOKENS), *range(SECOND_TOKENS), 0, 0]
    positions = torch.tensor([tokens], device=device)
    ids = torch.arange(len(tokens), device=device)[None]
    logits: torch.Tensor = module(input_ids=ids, position_ids=positions, use_cache=False).logits
    return logits[0, :-2].float()


def register() -> None:
    """Makes the kernel known to transformers, under ``VARLEN``."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(VARLEN, varlen_forward)
    AttentionMaskInterface.register(VARLEN, _no_mask)


def _no_mask(*, attention_mask: torch.Tensor | None = None, **told: Any) -> None:
    if attention_mask is not None:
        raise InputError("variable-length attention is told of samples by their positions, and takes no mask")


def varlen_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    position_ids: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **told: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers calls it: ``query`` [B, H, L, D], ``key`` and ``value`` [B, G, L, D]; returns [B, L, H, D].

    ``cu_seq_lens_q`` int32 [N + 1]: where each sample of the flattened packs begins; without it, at each 0 of
    ``position_ids``, which then have to come from the device."""
    on_cpu = query.device.type == "cpu"
    asked = [name for name in UNKNOWN if told.get(name) is not None] + (["dropout"] if dropout and not on_cpu else [])
    if asked:
        raise InputError(f"variable-length attention has no {', '.join(asked)}, which this model asks for")
    packs, heads, length, _ = query.shape
    if cu_seq_lens_q is None or max_length_q is None:
        cu_seq_lens_q, max_length_q = _segments(position_ids, packs, length, query.device)
    dtype = torch.get_autocast_dtype(query.device.type) if torch.is_autocast_enabled(query.device.type) else query.dtype
    q, k, v = (t.transpose(1, 2).reshape(packs * length, -1, t.shape[-1]).to(dtype) for t in (query, key, value))
    causal = module.is_causal if is_causal is None else is_causal
    reach = -1 if sliding_window is None else sliding_window - 1
    window = (reach, 0 if causal else reach)
    if on_cpu:
        out = by_sample(q, k, v, cu_seq_lens_q, window, scaling, dropout)
    else:
        out = _varlen(q, k, v, cu_seq_lens_q, max_length_q, window, scaling)
    return out.view(packs, length, heads, -1), None


def _varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    begins: torch.Tensor,
    longest: int,
    window: tuple[int, int],
    scale: float | None,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    grouped = k.shape[1] != q.shape[1]
    out = varlen_attn(q, k, v, begins, begins, longest, longest, scale=scale, window_size=window, enable_gqa=grouped)
    assert isinstance(out, torch.Tensor)
    return out


def _segments(
    position_ids: torch.Tensor | None, packs: int, length: int, device: torch.device
) -> tuple[torch.Tensor, int]:
    if position_ids is None:
        return torch.arange(0, (packs + 1) * length, length, dtype=torch.int32, device=device), length
    starts = (position_ids.expand(packs, -1).reshape(-1) == 0).nonzero().reshape(-1)
    ends = torch.tensor([packs * length], device=device)
    bounds = torch.cat([starts, ends]).to(torch.int32)
    return bounds, int(bounds.diff().max())
