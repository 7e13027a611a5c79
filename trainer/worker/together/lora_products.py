"""The products of several LoRA adapters, each with the tokens of its own run, added to the output of a layer that they
all adapt.

For the tokens x of run k: y + s_k B_k A_k x, with A_k of shape [r_k, D], B_k of shape [O, r_k] and the scale s_k (Hu et
al. 2021, arXiv:2106.09685). One function computes the products of all runs and their derivatives, so that no tensor of
all tokens is made for each run (the idea of *S-LoRA*'s and *Punica*'s kernels for inference, arXiv:2311.03285,
arXiv:2310.18547).

Legend: T tokens of all runs, D inputs and O outputs of the layer, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch


class LoraProduct(NamedTuple):
    """The adapter of a run, for its tokens from ``start`` to ``stop``."""

    start: int
    stop: int
    scale: float
    a_rD: torch.Tensor
    b_Or: torch.Tensor


def with_products(output: torch.Tensor, x: torch.Tensor, products: Sequence[LoraProduct]) -> torch.Tensor:
    """Returns ``output`` [..., O] with the products of ``x`` [..., D] added. Computes in the dtype of ``output``."""
    spans = [(p.start, p.stop, p.scale) for p in products]
    matrices = [matrix for p in products for matrix in (p.a_rD, p.b_Or)]
    added: torch.Tensor = _Products.apply(output, x, spans, *matrices)  # type: ignore[no-untyped-call]
    return added


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        output: torch.Tensor,
        x: torch.Tensor,
        spans: Sequence[tuple[int, int, float]],
        *matrices: torch.Tensor,
    ) -> torch.Tensor:
        dtype = output.dtype
        x_TD, y_TO = x.reshape(-1, x.shape[-1]).to(dtype), output.reshape(-1, output.shape[-1]).clone()
        inner = []
        for (start, stop, scale), a_rD, b_Or in zip(spans, matrices[::2], matrices[1::2], strict=True):
            inner_Tr = x_TD[start:stop] @ a_rD.to(dtype).t()
            y_TO[start:stop].addmm_(inner_Tr, b_Or.to(dtype).t(), alpha=scale)
            inner.append(inner_Tr)
        ctx.spans, ctx.shape, ctx.x_dtype = spans, x.shape, x.dtype
        ctx.save_for_backward(x_TD, *inner, *matrices)
        return y_TO.view(output.shape)

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> Any:
        (slope,) = slopes
        x_TD, *saved = ctx.saved_tensors
        inner, matrices = saved[: len(ctx.spans)], saved[len(ctx.spans) :]
        slope_TO = slope.reshape(-1, slope.shape[-1])
        slope_x_TD = torch.zeros_like(x_TD) if ctx.needs_input_grad[1] else None
        of_matrices: list[torch.Tensor] = []
        parts = zip(ctx.spans, inner, matrices[::2], matrices[1::2], strict=True)
        for (start, stop, scale), inner_Tr, a_rD, b_Or in parts:
            mine_TO = slope_TO[start:stop]
            slope_Tr = (mine_TO @ b_Or.to(mine_TO.dtype)).mul_(scale)
            of_matrices.append((slope_Tr.t() @ x_TD[start:stop]).to(a_rD.dtype))
            of_matrices.append((mine_TO.t() @ inner_Tr).mul_(scale).to(b_Or.dtype))
            if slope_x_TD is not None:
                torch.mm(slope_Tr, a_rD.to(slope_Tr.dtype), out=slope_x_TD[start:stop])
        slope_x = None if slope_x_TD is None else slope_x_TD.view(ctx.shape).to(ctx.x_dtype)
        return slope, slope_x, None, *of_matrices
