"""Attention over packs, sample by sample, where the kernel would compute what the mask then hides.

A pack of n samples under a block-diagonal mask costs the square of its length, and torch's kernel for CPUs computes
all of it. Each sample under causal attention by itself costs the square of its own: at 1024 tokens and samples of 170,
a quarter of the time, forward and backward. The sums are the same but for the order in which they are added.

The samples are read off the mask that the model has made, and only if that mask is exactly theirs (no window, no
padding, nothing that sees ahead) are they computed one by one; any other goes to transformers' own function.

Legend: B packs, H heads, K heads of keys and values, L tokens, D size of a head.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

Spans = list[list[int]]
"""For each pack the lengths of what lies in it, in order; tokens that see nothing but themselves, as pads do, are one
span of negative length."""

KIND = "sdpa"


def install() -> None:
    """From now on, models of this process whose attention is ``sdpa`` do so. May be called again."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

    own = ALL_ATTENTION_FUNCTIONS[KIND]
    if not isinstance(own, PackAttention):
        AttentionInterface.register(KIND, PackAttention(own))


class PackAttention:
    """Takes the place of transformers' function, ``own``. The layers of a model share one mask, which is looked
    at once."""

    def __init__(self, own: Callable[..., Any]) -> None:
        self.own = own
        self._mask: Callable[[], torch.Tensor | None] = lambda: None
        self._spans: Spans | None = None

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **rest: Any,
    ) -> tuple[torch.Tensor, None]:
        plain = dropout == 0.0 and not any(rest.get(name) is not None for name in ("position_bias", "softcap", "cache"))
        if plain and query.device.type == "cpu" and attention_mask is not None and query.shape[2] == key.shape[2]:
            spans = self._spans_of(attention_mask)
            if spans is not None and attention_mask.shape[0] == query.shape[0]:
                return by_span(query, key, value, spans, scaling), None
        answer: tuple[torch.Tensor, None] = self.own(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **rest
        )
        return answer

    def _spans_of(self, mask: torch.Tensor) -> Spans | None:
        if self._mask() is not mask:
            self._spans = spans_of(mask)
            self._mask = weakref.ref(mask)
        return self._spans


def spans_of(mask_B1LL: torch.Tensor) -> Spans | None:
    """None when the mask is not that of causal samples one after the other, or when there is nothing to gain."""
    if mask_B1LL.dtype != torch.bool or mask_B1LL.shape[1] != 1 or mask_B1LL.shape[2] != mask_B1LL.shape[3]:
        return None
    mask_BLL = mask_B1LL[:, 0]
    length = mask_BLL.shape[-1]
    places = torch.arange(length, device=mask_BLL.device)
    first_BL = places + 1 - mask_BLL.sum(-1)  # of a causal sample: where it begins
    theirs_BLL = (places <= places[:, None]) & (places >= first_BL[:, :, None])
    same_sample = bool((first_BL[:, 1:] - first_BL[:, :-1] >= 0).all()) and _begin_at_themselves(first_BL, places)
    if not same_sample or not torch.equal(mask_BLL, theirs_BLL):
        return None
    spans = [_lengths(row) for row in first_BL.tolist()]
    # Without a span that is computed, queries and keys would have no gradient at all; with one per pack, no gain.
    return spans if any(n > 0 for row in spans for n in row) and any(len(row) > 1 for row in spans) else None


def _begin_at_themselves(first_BL: torch.Tensor, places: torch.Tensor) -> bool:
    """Whether every token at which a sample begins is in that sample, and not in a window of it."""
    if bool((first_BL < 0).any()) or bool((first_BL > places).any()):
        return False
    return torch.equal(first_BL.gather(1, first_BL), first_BL)


def _lengths(first: list[int]) -> list[int]:
    lengths: list[int] = []
    begins = [i for i, at in enumerate(first) if i == at]
    for begin, end in zip(begins, [*begins[1:], len(first)], strict=True):
        if end - begin > 1:
            lengths.append(end - begin)
        elif lengths and lengths[-1] < 0:
            lengths[-1] -= 1
        else:
            lengths.append(-1)
    return lengths


def by_span(
    query_BHLD: torch.Tensor, key_BKLD: torch.Tensor, value_BKLD: torch.Tensor, spans: Spans, scaling: float | None
) -> torch.Tensor:
    """[B, L, H, D]. Splitting, unlike slicing, has a backward that writes each gradient once."""
    groups = query_BHLD.shape[1] // key_BKLD.shape[1]
    parts = []
    for query, key, value, lengths in zip(query_BHLD, key_BKLD, value_BKLD, spans, strict=True):
        sizes = [abs(n) for n in lengths]
        for n, q, k, v in zip(lengths, *(t.split(sizes, 1) for t in (query, key, value)), strict=True):
            if n < 0:
                seen = v.repeat_interleave(groups, 0)
            else:
                seen = scaled_dot_product_attention(
                    q[None], k[None], v[None], is_causal=True, scale=scaling, enable_gqa=groups > 1
                )[0]
            parts.append(seen.transpose(0, 1))
    batch, heads, length, _ = query_BHLD.shape
    return torch.cat(parts).view(batch, length, heads, -1)
