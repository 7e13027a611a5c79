"""Context parallelism: the ranks of a group compute one micro-batch together, each a part of the tokens of every row.

All layers but attention treat a token by itself. In attention, the ranks exchange heads for tokens (Ulysses, Jacobs et
al. 2023, arXiv:2309.14509): each gets all tokens of a part of the heads, so that the kernel for packs is used as it is,
and the exchange is reversed behind it. Keys and values with fewer heads than ranks are repeated first.

The losses of the targets are put together behind the output head, so that a task computes with all of them, on every
rank of the group. Each rank's gradient is that of its own tokens, and the strategy adds them up as it does for
micro-batches.

Legend: B rows, L tokens of a row with padding to a multiple of C, C ranks of the group, n = L / C tokens of a rank,
H query heads, G heads of keys and values, D head dimension, T targets.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from trainer.errors import InputError
from trainer.model.kernels.attention import CONTEXT, IMPLEMENTATIONS, VARLEN, probe, varlen_forward
from trainer.model.kernels.packing_check import Inputs, mode
from trainer.tasks.inputs import segments, to_device

TOLERANCE = 0.02
"""The largest difference of a token's logits, in standard deviations: only rounding differs."""
FLASH = IMPLEMENTATIONS["flash"]


class Context:
    """This process as rank ``rank`` of ``size`` that compute the same micro-batches."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.size = group, group.rank(), group.size()

    def inputs(self, input_ids: np.ndarray, position_ids: np.ndarray, device: torch.device) -> dict[str, Any]:
        """Returns the model's arguments for this rank's part of the rows [B, L], with the boundaries of all samples."""
        padding = (0, 0), (0, -input_ids.shape[1] % self.size)
        ids, positions = np.pad(input_ids, padding), np.pad(position_ids, padding)
        n = ids.shape[1] // self.size
        part = np.s_[:, self.rank * n : (self.rank + 1) * n]
        return {
            "input_ids": to_device(np.ascontiguousarray(ids[part]), device),
            "position_ids": to_device(np.ascontiguousarray(positions[part]), device),
            "use_cache": False,
            **segments(positions, device, VARLEN, packed=False),
        }

    def mine(self, at: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Selects this rank's elements of ``at``, indices into flattened rows of ``length`` tokens. Returns their
        indices into its own flattened parts [B, n], and which of ``at`` they are."""
        n = -(-length // self.size)
        rows, columns = np.divmod(at, length)
        order = np.flatnonzero(columns // n == self.rank)
        return rows[order] * n + columns[order] - self.rank * n, order

    def whole(self, values: torch.Tensor, order: torch.Tensor, total: int) -> torch.Tensor:
        """Collective of the group: returns the ``total`` values of which this rank has those at ``order``. A gradient
        reaches this rank's values only."""
        found: torch.Tensor = _Whole.apply(values, order, total, self.group)  # type: ignore[no-untyped-call]
        return found

    def attention(
        self,
        kernel: str,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        sample_bounds: tuple[torch.Tensor, int],
        position_ids: torch.Tensor | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        """Implements transformers' attention interface: ``query`` [B, H, n, D], ``key`` and ``value`` [B, G, n, D] of
        this rank's tokens; returns [B, n, H, D]. ``sample_bounds``: of all tokens (see `varlen_forward`)."""
        heads, groups = query.shape[1], key.shape[1]
        if heads % self.size:
            raise InputError(f"{heads} attention heads cannot be divided over {self.size} ranks")
        times = math.lcm(groups, self.size) // groups
        q, k, v = (self._all_tokens(t) for t in (query, *(t.repeat_interleave(times, 1) for t in (key, value))))
        if kernel == FLASH:
            begins, longest = sample_bounds
            bounds = {f"cu_seq_lens_{x}": begins for x in "qk"} | {f"max_length_{x}": longest for x in "qk"}
            from transformers import AttentionInterface

            out, _ = AttentionInterface()[FLASH](module, q, k, v, None, **bounds, **others)
        else:
            loop = kernel != VARLEN
            out, _ = varlen_forward(module, q, k, v, None, sample_bounds=sample_bounds, by_loop=loop, **others)
        return self._all_heads(out), None

    def _all_tokens(self, x_BHnD: torch.Tensor) -> torch.Tensor:
        """Returns [B, H / C, L, D]: all tokens of this rank's heads."""
        B, H, n, D = x_BHnD.shape
        sent = x_BHnD.view(B, self.size, H // self.size, n, D).movedim(1, 0)
        return self._exchanged(sent).movedim(0, 2).reshape(B, H // self.size, self.size * n, D)

    def _all_heads(self, x_BLHD: torch.Tensor) -> torch.Tensor:
        """Returns [B, n, H, D] from [B, L, H / C, D]."""
        B, L, h, D = x_BLHD.shape
        sent = x_BLHD.view(B, self.size, L // self.size, h, D).movedim(1, 0)
        return self._exchanged(sent).movedim(0, 2).reshape(B, L // self.size, h * self.size, D)

    def _exchanged(self, parts_C: torch.Tensor) -> torch.Tensor:
        """Sends part c to rank c of the group. Returns the parts that came from each rank, in their order."""
        found: torch.Tensor = _AllToAll.apply(parts_C, self.group)  # type: ignore[no-untyped-call]
        return found


class _AllToAll(torch.autograd.Function):
    """The exchange is its own transpose, so that the backward is the same exchange."""

    @staticmethod
    def forward(ctx: Any, parts_C: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        parts_C = parts_C.contiguous()
        received = torch.empty_like(parts_C)
        dist.all_to_all_single(received, parts_C, group=group)
        return received

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return _AllToAll.apply(gradient, ctx.group), None  # type: ignore[no-untyped-call]


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: torch.Tensor, order: torch.Tensor, total: int, group: dist.ProcessGroup
    ) -> torch.Tensor:
        ctx.save_for_backward(order)
        found = values.new_zeros(total)
        found[order] = values
        dist.all_reduce(found, group=group)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        # Every rank computes the same loss from all values, so that the others' gradients are not added.
        (order,) = ctx.saved_tensors
        return gradient[order], None, None, None


def settle_context(
    model: Any, module: Any, context: Context, inputs: Inputs, kernel: str, device: torch.device, path: str
) -> None:
    """Sets attention that exchanges heads for tokens on ``model``, around its kernel (``compute.attention``).

    ``inputs``: the model's arguments without context parallelism. Every rank calls it, in the forward's precision.
    Raises InputError if the model's logits change: another layer than attention then mixes tokens."""
    from transformers import AttentionInterface, AttentionMaskInterface

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    ids, positions, real = probe(packed=True)
    at = np.flatnonzero(real.numpy())
    mine, order = context.mine(at, ids.shape[1])
    try:
        with mode(module, training=False):
            want = module(**inputs(ids, positions, device)).logits.flatten(0, 1)[to_device(at[order], device)].float()
            AttentionInterface.register(CONTEXT, partial(context.attention, IMPLEMENTATIONS.get(kernel, kernel)))
            AttentionMaskInterface.register(CONTEXT, lambda **_: None)
            base.set_attn_implementation(CONTEXT)
            if base.config._attn_implementation != CONTEXT:
                raise InputError("the model's code has attention of its own")
            got = module(**context.inputs(ids, positions, device)).logits.flatten(0, 1)[to_device(mine, device)].float()
        moved = (got - want).abs().amax(-1) / want.std()
        if not float(moved.max()) <= TOLERANCE:
            raise InputError(f"logits move by {float(moved.max()):.2g} of their spread")
    except (InputError, RuntimeError, TypeError, ValueError, KeyError) as error:
        raise InputError(
            f"strategy.context_parallel {context.size} does not work for {type(base).__name__} of model.path {path!r}: "
            f"{error}; set it to 1"
        ) from error
