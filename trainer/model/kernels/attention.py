"""The choice of the attention kernel, and variable-length attention over packed samples for transformers' models.

A pack holds samples that must not see each other. With a mask, a kernel computes all pairs of a pack's tokens and
discards most; given the positions at which samples begin, it computes the pairs inside each sample only (Dao 2023,
arXiv:2307.08691). Tasks pass these positions as keyword arguments of the model, for packs under transformers' names
(``cu_seq_lens_q`` and so on). On a GPU the kernel is torch's variable-length FlashAttention; a CPU computes the samples
one by one (`trainer.model.kernels.varlen_cpu`).

Legend: B packs, L tokens, H query heads, G heads of keys and values, D head dimension, N samples.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from trainer.errors import InputError
from trainer.model.kernels.packing_check import FIRST_TOKENS, SECOND_TOKENS, Inputs, mode, shrunk, units_below
from trainer.model.kernels.varlen_cpu import by_sample
from trainer.recipe.sections.compute import SIXTEEN_BIT
from trainer.recipe.tasks import TASKS

if TYPE_CHECKING:
    from trainer.recipe import Recipe

log = logging.getLogger(__name__)

VARLEN = "muster_varlen"
IMPLEMENTATIONS = {"sdpa": "sdpa", "varlen": VARLEN, "flex": "flex_attention", "flash": "flash_attention_2"}
"""transformers' name for each value of ``compute.attention``."""
CONTEXT = "muster_context"
"""The name of `trainer.model.kernels.context`'s attention, which is around one of these kernels."""
MASKLESS = (CONTEXT, *(name for name in IMPLEMENTATIONS.values() if name != "sdpa"))
TOLERANCE = 0.25
"""The largest difference of logits between two kernels in 16 bits, in standard deviations of the logits: rounding moves
them by hundredths, samples that see each other by about 1."""
UNSUPPORTED = ("softcap", "s_aux", "position_bias")
"""Arguments that some models pass to attention and that this kernel lacks."""


def wanted(recipe: Recipe, device: torch.device) -> str:
    """Returns ``compute.attention``, with ``auto`` resolved for this recipe and device."""
    setting = recipe.compute.attention
    if setting != "auto":
        return setting
    segmented = TASKS[recipe.task].segments and not recipe.adapter.row.inserts_tokens
    if device.type == "cuda":
        runs = recipe.model.dtype in SIXTEEN_BIT
    else:
        runs = device.type == "cpu" and not recipe.compute.compile
    return "varlen" if segmented and runs else "sdpa"


def settle_attention(recipe: Recipe, model: Any, module: Any, inputs: Inputs, device: torch.device) -> str:
    """Sets the recipe's kernel on ``model`` (loaded, with its adapter) and returns the name of the one that is used:
    ``eager`` for models whose own code computes attention.

    ``module``: the wrapped model, whose forward is called; ``inputs``: the arguments that training calls it with. Every
    rank calls it, in the forward's precision.

    Compares the logits with those of the model's own kernel. When the kernel fails on this model or its logits differ,
    raises InputError if the recipe names the kernel; under ``auto`` it logs a warning and keeps the model's own."""
    kernel = wanted(recipe, device)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = base.config._attn_implementation
    own = next((name for name, theirs in IMPLEMENTATIONS.items() if theirs == before), str(before))
    if kernel == "sdpa":
        return own
    try:
        _check_installed(kernel)
        register()
        base.set_attn_implementation(IMPLEMENTATIONS[kernel])
        if base.config._attn_implementation != IMPLEMENTATIONS[kernel]:
            raise InputError("the model's code has attention of its own, which cannot be replaced")
        ids, positions, real = probe(recipe.data.packing)
        asked = inputs(ids, positions, device)
        with shrunk(base, units_below(base, recipe.data.sequence_length)):
            with mode(module, training=False):
                got = module(**asked).logits[real].float()
                base.set_attn_implementation(before)
                want = module(**asked).logits[real].float()
            base.set_attn_implementation(IMPLEMENTATIONS[kernel])
            with mode(module, training=True):
                module(**asked)  # with the model's dropout, which a kernel may lack
        moved = float((got - want).abs().max() / want.std())
        if not moved <= TOLERANCE:
            raise InputError(f"logits move by {moved:.2g} of their spread")
    except Exception as error:  # a kernel, or the model around it, may raise anything
        base.set_attn_implementation(before)
        if recipe.compute.attention == "auto":
            log.warning("attention by %s: %s does not work here: %s", own, kernel, error)
            return own
        raise InputError(
            f"compute.attention {kernel} does not work for {type(base).__name__} here: {error}; use sdpa"
        ) from error
    return kernel


@contextmanager
def by_mask(model: Any) -> Iterator[None]:
    """Uses ``sdpa``, which accepts masks and key-value caches, instead of a variable-length kernel."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = base.config._attn_implementation
    if before not in MASKLESS:
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
            raise InputError(
                "the package flash-attn is not installed: pip install flash-attn --no-build-isolation"
            ) from None


def probe(packed: bool) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], torch.Tensor]:
    """Returns token ids and position ids of two samples, in one pack or in a row each, with padding at the end, and the
    mask of the samples' tokens."""
    samples = [np.arange(FIRST_TOKENS), np.arange(SECOND_TOKENS)]
    rows = [np.concatenate(samples)] if packed else samples
    shape = len(rows), len(rows[0]) + 2
    positions, real = np.zeros(shape, np.int64), torch.zeros(shape, dtype=torch.bool)
    for row, tokens in enumerate(rows):
        positions[row, : len(tokens)], real[row, : len(tokens)] = tokens, True
    return np.arange(positions.size).reshape(shape), positions, real


def register() -> None:
    """Registers the kernel with transformers, under the name ``VARLEN``."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(VARLEN, varlen_forward)
    AttentionMaskInterface.register(VARLEN, _no_mask)


def _no_mask(*, attention_mask: torch.Tensor | None = None, **_: Any) -> None:
    if attention_mask is not None:
        raise InputError("variable-length attention separates samples by their position ids, and takes no mask")


def computing_dtype(query: torch.Tensor) -> torch.dtype:
    """Returns the dtype in which attention computes: autocast's, if it is on."""
    device = query.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype


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
    sample_bounds: tuple[torch.Tensor, int] | None = None,
    by_loop: bool = False,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Implements transformers' attention interface: ``query`` [B, H, L, D], ``key`` and ``value`` [B, G, L, D]; returns
    [B, L, H, D].

    ``cu_seq_lens_q`` int32 [N + 1]: the position in the flattened packs at which each sample begins; ``sample_bounds``:
    the same and the longest sample's length, under a name that no other layer of a model reads. Without them, a sample
    begins at each 0 of ``position_ids``, which are then copied from the device. ``by_loop``: the samples are computed
    one after the other by ``sdpa``, as on CPUs."""
    by_loop = by_loop or query.device.type == "cpu"
    lacking = [name for name in UNSUPPORTED if others.get(name) is not None]
    lacking += ["dropout"] if dropout and not by_loop else []
    if lacking:
        raise InputError(f"variable-length attention has no {', '.join(lacking)}, which this model needs")
    packs, heads, length, _ = query.shape
    if sample_bounds is not None:
        cu_seq_lens_q, max_length_q = sample_bounds
    if cu_seq_lens_q is None or max_length_q is None:
        cu_seq_lens_q, max_length_q = _segments(position_ids, packs, length, query.device)
    dtype = computing_dtype(query)
    q, k, v = (t.transpose(1, 2).reshape(packs * length, -1, t.shape[-1]).to(dtype) for t in (query, key, value))
    causal = module.is_causal if is_causal is None else is_causal
    reach = -1 if sliding_window is None else sliding_window - 1
    window = (reach, 0 if causal else reach)
    if by_loop:
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
