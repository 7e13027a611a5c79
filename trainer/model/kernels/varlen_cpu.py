"""Attention over packs on CPUs, one sample after the other: torch has no variable-length kernel for CPUs.

With a mask, torch's kernel for CPUs computes all pairs of a pack's tokens. Computed separately, each sample costs the
square of its own length: in packs of 1024 tokens with samples of 170, a quarter of the time, forward and backward.

Legend: T tokens of all packs, H query heads, G heads of keys and values, D head dimension, N samples, n tokens of one.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention


def by_sample(
    q_THD: torch.Tensor,
    k_TGD: torch.Tensor,
    v_TGD: torch.Tensor,
    begins: torch.Tensor,
    window: tuple[int, int],
    scale: float | None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Returns [T, H, D]. ``begins`` [N + 1]: the position of each sample's first token, and T; ``window``: how many
    tokens each token sees to the left and to the right, -1 for all; ``dropout``: of the attention's weights."""
    groups = q_THD.shape[1] // k_TGD.shape[1]
    lengths = begins.diff().tolist() if dropout else _join_singles(begins.diff().tolist())
    sizes = [abs(n) for n in lengths]
    parts = []
    # Splitting, unlike slicing, has a backward that writes each gradient once.
    for n, q_nHD, k_nGD, v_nGD in zip(lengths, *(t.split(sizes) for t in (q_THD, k_TGD, v_TGD)), strict=True):
        if n < 0:
            # A token that sees only itself gets its own value; the zeros keep queries and keys in the graph.
            unused = q_nHD[..., :1] + k_nGD[..., :1].repeat_interleave(groups, 1)
            parts.append(v_nGD.repeat_interleave(groups, 1) + 0 * unused)
            continue
        q, k, v = (t.transpose(0, 1)[None] for t in (q_nHD, k_nGD, v_nGD))
        mask, causal = _mask(n, window, q.device)
        out = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=groups > 1
        )
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


def _join_singles(lengths: list[int]) -> list[int]:
    """Joins adjacent samples of one token each (padding) into one entry: their number, negated."""
    joined: list[int] = []
    for n in lengths:
        if n > 1:
            joined.append(n)
        elif joined and joined[-1] < 0:
            joined[-1] -= 1
        else:
            joined.append(-1)
    return joined


def _mask(n: int, window: tuple[int, int], device: torch.device) -> tuple[torch.Tensor | None, bool]:
    """Returns the mask [n, n] of a sample, None if it needs none, and torch's ``is_causal``."""
    left, right = (n if reach < 0 else reach for reach in window)
    if left >= n - 1 and right >= n - 1:
        return None, False
    if left >= n - 1 and right == 0:
        return None, True
    at = torch.arange(n, device=device)
    ahead = at[None] - at[:, None]
    return (ahead <= right) & (ahead >= -left), False
