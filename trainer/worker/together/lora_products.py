"""The products of several LoRA adapters, each with the tokens of its own run, added to the output of a layer that they
all adapt.

For the tokens x of run k: y + s_k B_k A_k x, with A_k of shape [r_k, D], B_k of shape [O, r_k] and the scale s_k (Hu et
al. 2021, arXiv:2106.09685). Neighbours with as many tokens are computed as one batched product, in which a smaller rank
is filled up with zeros, and one function computes the derivatives too: so there are few operations, and no tensor of
all tokens for each run (the idea of the kernels of *Punica* and *S-LoRA*, arXiv:2310.18547, arXiv:2311.03285).

Legend: T tokens of a run, N runs of a group, D inputs and O outputs of the layer, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad


class LoraProduct(NamedTuple):
    """The adapter of a run, for its tokens from ``start`` to ``stop``."""

    start: int
    stop: int
    scale: float
    a_rD: torch.Tensor
    b_Or: torch.Tensor


class RunGroup(NamedTuple):
    """Runs that follow each other, with T tokens each. ``ranks``: of their adapters."""

    start: int
    tokens: int
    scales: list[float]
    ranks: list[int]

    @property
    def stop(self) -> int:
        return self.start + self.tokens * len(self.ranks)

    def of(self, all_tokens: torch.Tensor) -> torch.Tensor:
        """Returns the group's tokens as [N, T, features]."""
        return all_tokens[self.start : self.stop].view(len(self.ranks), self.tokens, -1)


def with_products(output: torch.Tensor, x: torch.Tensor, products: Sequence[LoraProduct]) -> torch.Tensor:
    """Returns ``output`` [..., O] with the products of ``x`` [..., D] added. Computes in the dtype of ``output``."""
    matrices = [matrix for p in products for matrix in (p.a_rD, p.b_Or)]
    added: torch.Tensor = _Products.apply(output, x, groups_of(products), *matrices)  # type: ignore[no-untyped-call]
    return added


def groups_of(products: Sequence[LoraProduct]) -> list[RunGroup]:
    found: list[RunGroup] = []
    for p in products:
        if not (found and found[-1].stop == p.start and found[-1].tokens == p.stop - p.start):
            found.append(RunGroup(p.start, p.stop - p.start, [], []))
        found[-1].scales.append(p.scale)
        found[-1].ranks.append(len(p.a_rD))
    return found


def stacked(
    groups: Sequence[RunGroup], matrices: Sequence[torch.Tensor], dtype: torch.dtype
) -> Iterator[tuple[RunGroup, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yields each group with its scales [N, 1, 1], its A [N, r, D] and its B [N, O, r]. ``matrices``: A and B of each
    run."""
    pairs = list(zip(matrices[::2], matrices[1::2], strict=True))
    for group in groups:
        mine, pairs = pairs[: len(group.ranks)], pairs[len(group.ranks) :]
        most = max(group.ranks)
        a_NrD = torch.stack([pad(a.to(dtype), (0, 0, 0, most - len(a))) for a, _ in mine])
        b_NOr = torch.stack([pad(b.to(dtype), (0, most - b.shape[1])) for _, b in mine])
        yield group, torch.tensor(group.scales, dtype=dtype, device=a_NrD.device).view(-1, 1, 1), a_NrD, b_NOr


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, output: torch.Tensor, x: torch.Tensor, groups: Sequence[RunGroup], *matrices: torch.Tensor
    ) -> torch.Tensor:
        dtype = output.dtype
        x_TD, y_TO = x.reshape(-1, x.shape[-1]).to(dtype), output.reshape(-1, output.shape[-1]).clone()
        inner = []
        for group, scales, a_NrD, b_NOr in stacked(groups, matrices, dtype):
            inner_NTr = torch.bmm(group.of(x_TD), a_NrD.mT).mul_(scales)
            group.of(y_TO).baddbmm_(inner_NTr, b_NOr.mT)
            inner.append(inner_NTr)
        ctx.groups, ctx.shape, ctx.x_dtype = groups, x.shape, x.dtype
        ctx.save_for_backward(x_TD, *inner, *matrices)
        return y_TO.view(output.shape)

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> Any:
        (slope,) = slopes
        x_TD, *saved = ctx.saved_tensors
        inner, matrices = saved[: len(ctx.groups)], saved[len(ctx.groups) :]
        slope_TO = slope.reshape(-1, slope.shape[-1])
        slope_x_TD = torch.zeros_like(x_TD) if ctx.needs_input_grad[1] else None
        of_matrices: list[torch.Tensor] = []
        for inner_NTr, (group, scales, a_NrD, b_NOr) in zip(
            inner, stacked(ctx.groups, matrices, x_TD.dtype), strict=True
        ):
            slope_NTO = group.of(slope_TO)
            slope_NTr = torch.bmm(slope_NTO, b_NOr).mul_(scales)
            of_a, of_b = torch.bmm(slope_NTr.mT, group.of(x_TD)), torch.bmm(slope_NTO.mT, inner_NTr)
            for n, rank in enumerate(group.ranks):
                of_matrices += [of_a[n, :rank], of_b[n, :, :rank]]
            if slope_x_TD is not None:
                torch.bmm(slope_NTr, a_NrD, out=group.of(slope_x_TD))
        slope_x = None if slope_x_TD is None else slope_x_TD.view(ctx.shape).to(ctx.x_dtype)
        typed = (found.to(matrix.dtype) for found, matrix in zip(of_matrices, matrices, strict=True))
        return slope, slope_x, None, *typed
