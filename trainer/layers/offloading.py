"""The inputs of checkpointed layers, kept in host memory between forward and backward.

Under gradient checkpointing (Chen et al. 2016, arXiv:1604.06174) a layer keeps its input only: tokens x hidden
size values, which for long texts are most of what is left. Each is copied to the host while the next layers compute,
and back while the backward of the layer behind it computes.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from trainer.errors import InputError


class _Copy:
    """``before``: the copy that was put before it. ``read``: what `Copies.begin_read` returned, None before."""

    def __init__(self, host: Any, before: weakref.ref[_Copy] | None) -> None:
        self.host, self.before = host, before
        self.read: Any = None


class Copies(ABC):
    """Copies of tensors on the host. The backward needs them in the reverse order: the next one is read ahead."""

    def __init__(self) -> None:
        self._last: weakref.ref[_Copy] | None = None

    def put(self, tensor: torch.Tensor) -> _Copy:
        copy = _Copy(self.write(tensor), self._last)
        self._last = weakref.ref(copy)
        return copy

    def get(self, copy: _Copy) -> torch.Tensor:
        self._begin(copy)
        before = copy.before and copy.before()
        if before:
            self._begin(before)
        begun, copy.read = copy.read, None
        return self.end_read(begun)

    def _begin(self, copy: _Copy) -> None:
        if copy.read is None:
            copy.read = self.begin_read(copy.host)

    @abstractmethod
    def write(self, tensor: torch.Tensor) -> Any:
        """Returns what stands for the tensor on the host."""

    @abstractmethod
    def begin_read(self, host: Any) -> Any:
        """Begins to read what `write` returned. Returns what `end_read` needs."""

    @abstractmethod
    def end_read(self, begun: Any) -> torch.Tensor:
        """Returns the tensor on its device."""


class PinnedCopies(Copies):
    """Copies of a GPU's tensors in pinned host memory, written and read on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device, self._stream = device, torch.cuda.Stream(device)

    def write(self, tensor: torch.Tensor) -> torch.Tensor:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            host = torch.empty_like(tensor, device="cpu", pin_memory=True)
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._stream)  # else its memory would be used again before it is copied
        return host

    def begin_read(self, host: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event]:
        with torch.cuda.stream(self._stream):
            return host.to(self._device, non_blocking=True), self._stream.record_event()

    def end_read(self, begun: tuple[torch.Tensor, torch.cuda.Event]) -> torch.Tensor:
        tensor, ready = begun
        computing = torch.cuda.current_stream(self._device)
        computing.wait_event(ready)
        tensor.record_stream(computing)
        return tensor


class CountedCopies(Copies):
    """Copies of tensors without values: ``bytes`` counts what is on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def write(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        self.bytes += tensor.nbytes
        return partial(torch.empty, tensor.shape, dtype=tensor.dtype, device=tensor.device)

    def begin_read(self, host: Callable[[], torch.Tensor]) -> torch.Tensor:
        return host()

    def end_read(self, begun: torch.Tensor) -> torch.Tensor:
        return begun


def keep_layer_inputs(model: torch.nn.Module, copies: Copies) -> None:
    """Puts the input of each checkpointed layer into ``copies``, and gets it back in the backward.

    Raises InputError if no layer of the model is checkpointed."""
    # transformers has no public way to say how a layer's input is saved. Inside of `checkpoint` torch uses hooks of its
    # own, so that these ones see nothing but the input.
    checkpointed: list[Any] = [m for m in model.modules() if hasattr(m, "_gradient_checkpointing_func")]
    if not checkpointed:
        raise InputError(
            f"compute.offload_activations does not work for {type(model).__name__}: none of its layers is checkpointed"
        )
    for module in checkpointed:
        module._gradient_checkpointing_func = _Keeping(module._gradient_checkpointing_func, copies)


class _Keeping:
    def __init__(self, checkpoint: Callable[..., Any], copies: Copies) -> None:
        self._checkpoint, self._copies = checkpoint, copies

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with saved_tensors_hooks(self._pack, self._unpack):
            return self._checkpoint(*args, **kwargs)

    def _pack(self, tensor: torch.Tensor) -> Any:
        moves = tensor.is_floating_point() and tensor.numel() and not isinstance(tensor, torch.nn.Parameter)
        return self._copies.put(tensor) if moves else tensor

    def _unpack(self, kept: Any) -> torch.Tensor:
        tensor: torch.Tensor = self._copies.get(kept) if isinstance(kept, _Copy) else kept
        return tensor
