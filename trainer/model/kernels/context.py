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
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import init_device_mesh

from trainer.distributed.world import World
from trainer.errors import InputError
from trainer.model.kernels.attention import CONTEXT, IMPLEMENTATIONS, computing_dtype, probe, varlen_forward
from trainer.model.kernels.packing_check import Inputs, mode, shrunk, units_below
from trainer.modules import head_module
from trainer.recipe.tasks import TASKS

if TYPE_CHECKING:
    from trainer.recipe import Recipe
    from trainer.recipe.strategies import Mesh

TOLERANCE = 0.02
"""The largest difference of a token's logits, in standard deviations: only rounding differs."""

Kernel = Callable[..., tuple[torch.Tensor, Any]]
"""Attention of all tokens of some heads, by transformers' interface, with ``sample_bounds``."""


def flash(*call: Any, sample_bounds: tuple[torch.Tensor, int], **others: Any) -> tuple[torch.Tensor, Any]:
    """Calls transformers' FlashAttention with the boundaries under its own names."""
    from transformers import AttentionInterface

    (begins, longest), name = sample_bounds, IMPLEMENTATIONS["flash"]
    bounds = {"cu_seq_lens_q": begins, "cu_seq_lens_k": begins, "max_length_q": longest, "max_length_k": longest}
    found: tuple[torch.Tensor, Any] = AttentionInterface()[name](*call, **bounds, **others)
    return found


by_loop = partial(varlen_forward, by_loop=True)
KERNELS: dict[str, Kernel] = {"varlen": varlen_forward, "flash": flash}
"""By the value of ``compute.attention``; ``by_loop`` for others."""


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(array).to(device)


class Context:
    """This process as rank ``rank`` of ``size`` that compute the same micro-batches."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.size = group, group.rank(), group.size()

    @classmethod
    def of(cls, mesh: Mesh, device: torch.device) -> Context:
        """Collective of all ranks."""
        made = init_device_mesh(device.type, (mesh.data_ranks, mesh.context), mesh_dim_names=("data", "context"))
        return cls(made["context"].get_group())

    def inputs(self, input_ids: np.ndarray, position_ids: np.ndarray, device: torch.device) -> dict[str, Any]:
        """Returns the model's arguments for this rank's part of the rows [B, L], with the boundaries of all samples."""
        padding = (0, 0), (0, -input_ids.shape[1] % self.size)
        ids, positions = np.pad(input_ids, padding), np.pad(position_ids, padding)
        bounds = np.append(np.flatnonzero(positions.ravel() == 0), positions.size).astype(np.int32)
        return {
            "input_ids": to_device(self.part(ids), device),
            "position_ids": to_device(self.part(positions), device),
            "use_cache": False,
            "sample_bounds": (to_device(bounds, device), int(np.diff(bounds).max())),
        }

    def part(self, array_BL: np.ndarray) -> np.ndarray:
        """Returns this rank's columns [B, n] of an array with a value per token; those of the padding are 0."""
        padded = np.pad(array_BL, ((0, 0), (0, -array_BL.shape[1] % self.size)))
        n = padded.shape[1] // self.size
        return np.ascontiguousarray(padded[:, self.rank * n : (self.rank + 1) * n])

    def mine(self, at: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Selects this rank's elements of ``at``, indices into flattened rows of ``length`` tokens. Returns their
        indices into its own flattened parts [B, n], and which of ``at`` they are."""
        n = -(-length // self.size)
        rows, columns = np.divmod(at, length)
        order = np.flatnonzero(columns // n == self.rank)
        return rows[order] * n + columns[order] - self.rank * n, order

    def whole(self, values: torch.Tensor, order: torch.Tensor, total: int) -> torch.Tensor:
        """Collective of the group: returns the ``total`` values (rows) of which this rank has those at ``order``. A
        gradient reaches this rank's values only."""
        found: torch.Tensor = _Whole.apply(values, order, total, self.group)  # type: ignore[no-untyped-call]
        return found

    def use(self, base: Any, kernel: Kernel) -> None:
        """Sets attention that exchanges heads for tokens on a model, around ``kernel``. Raises InputError if the
        model's code has attention of its own."""
        from transformers import AttentionInterface, AttentionMaskInterface

        AttentionInterface.register(CONTEXT, partial(self._attention, kernel))
        AttentionMaskInterface.register(CONTEXT, lambda **_: None)
        base.set_attn_implementation(CONTEXT)
        if base.config._attn_implementation != CONTEXT:
            raise InputError("the model's code has attention of its own")

    def _attention(
        self,
        kernel: Kernel,
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
        dtype = computing_dtype(query)  # kernels cast to it; as float32, twice the bytes would be sent
        query, key, value = query.to(dtype), *(t.to(dtype).repeat_interleave(times, 1) for t in (key, value))
        q, k, v = map(self._all_tokens, (query, key, value))
        out, _ = kernel(module, q, k, v, None, sample_bounds=sample_bounds, **others)
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
        found = values.new_zeros(total, *values.shape[1:])
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
    recipe: Recipe, model: Any, module: Any, context: Context, inputs: Inputs, kernel: str, world: World
) -> None:
    """Sets attention that exchanges heads for tokens on ``model``, around its kernel (``compute.attention``).

    ``inputs``: the model's arguments without context parallelism. Every rank calls it, in the forward's precision.
    Raises InputError if the outputs of the model's head change: another layer than attention then mixes tokens, or
    attention depends on more than the kernel is told."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    device = world.device
    ids, positions, real = probe(recipe.data.packing and not TASKS[recipe.task].has_head)
    at = np.flatnonzero(real.numpy())
    mine, order = context.mine(at, ids.shape[1])
    outputs: list[torch.Tensor] = []

    def record(_: Any, __: Any, output_BLV: torch.Tensor) -> None:
        outputs.append(output_BLV.flatten(0, 1).float())

    try:
        # Windows are shrunk, so that the few tokens of the probe are not all inside them.
        with (
            head_module(base).register_forward_hook(record),
            mode(module, training=False),
            shrunk(base, units_below(base, recipe.data.sequence_length)),
        ):
            module(**inputs(ids, positions, device))
            context.use(base, KERNELS.get(kernel, by_loop))
            module(**context.inputs(ids, positions, device))
        want, got = outputs[0][to_device(at[order], device)], outputs[1][to_device(mine, device)]
        mine_moved = float((got - want).abs().amax() / outputs[0].std()) if len(order) else 0.0
        moved = max(world.all_gather(mine_moved))  # every rank decides alike
        if not moved <= TOLERANCE:
            raise InputError(f"the outputs of its head move by {moved:.2g} of their spread")
    except (InputError, RuntimeError, TypeError, ValueError, KeyError) as error:
        raise InputError(
            f"strategy.context_parallel {context.size} does not work for {type(base).__name__} of model.path "
            f"{recipe.model.path!r}: {error}; set it to 1"
        ) from error
