"""The bytes that this process sends through torch.distributed, counted where its collectives are called."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class CountedTraffic(TorchDispatchMode):
    """Adds up what each rank sends in a ring, by the ranks of the group. Of what is gathered or scattered in n parts,
    that are n - 1 of them, and twice as much of what is reduced to all."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sent: Counter[tuple[int, ...]] = Counter()
        self.by_call: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        if name.startswith("c10d.") or "c10d_functional" in name:
            group = next((found for argument in args if (found := _group(argument))), None)
            if group is not None:
                ranks = tuple(dist.get_process_group_ranks(group))
                n = len(ranks)
                size = _sent(name, args, n)
                self.sent[ranks] += size
                self.by_call[name] += size
        return function(*args, **(kwargs or {}))


def _sent(name: str, args: Any, n: int) -> int:
    first, second = (_bytes(args[at]) if at < len(args) else 0 for at in (0, 1))
    if "reduce_scatter" in name:  # output, input
        return first * (n - 1)
    if "allreduce" in name:
        return 2 * first * (n - 1) // n
    if "allgather" in name:  # output, input
        return second * (n - 1)
    if "alltoall" in name:  # output, input
        return second * (n - 1) // n
    if "broadcast" in name or "reduce_" in name:
        return first * (n - 1) // n
    return 0


def _bytes(argument: Any) -> int:
    return sum(t.nbytes for t in tree_leaves(argument) if isinstance(t, torch.Tensor))


def _group(argument: Any) -> dist.ProcessGroup | None:
    if isinstance(argument, torch.ScriptObject):
        with suppress(RuntimeError):  # another kind of object, such as the operation
            return dist.ProcessGroup.unbox(argument)
    return None
