"""Counts the bytes that are allocated while a model computes under fake tensors, from a storage's first use to its
end."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten


class LiveBytes(TorchDispatchMode):
    """Counts the bytes allocated while it is active, without ``held``, the tensors that existed before.

    Operations that need values, which fake tensors do not have, get fixed results: a mask selects all positions (a plan
    counts every token as a target), and a scalar is 0, so that a condition on it is false (packed samples get the mask
    that keeps them apart). So does the product of tokens and experts, whose shape torch computes for bfloat16 only.
    """

    def __init__(self, held: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peaks: dict[str, int] = {}
        self.stage = ""
        self._sizes: dict[int, int] = {}
        # Kept alive: the address of a freed storage would be reused for a new one, which would then not be counted.
        self._held = [_local(t).untyped_storage() for t in held]
        self._sizes.update({storage._cdata: 0 for storage in self._held})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default:
            return 0
        if func is aten.bincount.default:
            return torch.empty(kwargs["minlength"] if kwargs else args[2], dtype=torch.long, device=args[0].device)
        if func is aten.index.Tensor and len(args[1]) == 1:
            (mask,) = args[1]
            if mask is not None and mask.dtype == torch.bool:
                positions = [torch.empty(mask.numel(), dtype=torch.long, device=mask.device) for _ in range(mask.ndim)]
                args = (args[0], positions)
        made = _grouped_product(*args) if func is aten._grouped_mm.default else func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._see(_local(tensor).untyped_storage())
        return made

    def _see(self, storage: torch.UntypedStorage, *, resized: bool = False) -> None:
        key = storage._cdata
        if key not in self._sizes:
            weakref.finalize(storage, self._gone, key)
        elif not resized:
            return
        size = storage.nbytes()
        self.live += size - self._sizes.get(key, 0)
        self._sizes[key] = size
        self.peaks[self.stage] = max(self.peaks.get(self.stage, 0), self.live)

    def _gone(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)

    @contextmanager
    def counting(self) -> Iterator[None]:
        # FSDP2 frees and allocates storages in place, without the dispatcher.
        resize: Callable[..., Any] = torch.UntypedStorage.resize_

        def seen(storage: torch.UntypedStorage, size: int) -> Any:
            done = resize(storage, size)
            self._see(storage, resized=True)
            return done

        torch.UntypedStorage.resize_ = seen  # type: ignore[method-assign,assignment]
        try:
            with self:
                yield
        finally:
            torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]


def _grouped_product(a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor | None = None, *_: Any) -> torch.Tensor:
    """Returns a tensor of the size of the product. Of two matrices, the groups divide the dimension that is summed."""
    groups = [len(offsets)] if offsets is not None and a.dim() == b.dim() == 2 else []
    stack = [a.shape[0]] if a.dim() == b.dim() == 3 else groups
    return a.new_empty([*stack, a.shape[-2], b.shape[-1]])


def _local(tensor: torch.Tensor) -> torch.Tensor:
    local: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local
