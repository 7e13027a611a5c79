"""Sharded load of a base model: no rank ever holds more of it than it keeps.

    meta model → adapter, task → wrapped by the strategy → memory for this rank's pieces → each filled from its bytes

A piece is a contiguous run of a flattened parameter (rows under FSDP2, a flat slice under ZeRO-3), so that it is one
range of a safetensors file. NF4 weights are quantised while they are read (nf4.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from trainer.model import nf4
from trainer.model.dequantise import QuantisedLocation, WeightReader, locate_weights
from trainer.model.files.safetensors_index import TensorLocation, read_headers
from trainer.model.files.weight_check import wrong_shapes
from trainer.model.files.weight_source import WeightSource
from trainer.model.head import Head, drawn_for, is_head, set_up_head
from trainer.model.key_mapping import match_names, state_of
from trainer.model.meta import NeedsFullLoad, four_bit_layers

if TYPE_CHECKING:
    from trainer.strategies.base import ShardSlice

CHUNK = 2**22
"""Elements that are read at a time when they are converted to another type."""

RowReader = Callable[[str, int, int], Iterator[torch.Tensor]]
Gather = Callable[[torch.Tensor], torch.Tensor]
InitParameter = Callable[[str, torch.Size, int, int, RowReader], torch.Tensor]


@dataclass(frozen=True)
class _WeightLocation:
    """The source of a parameter. ``layer``: the 4-bit layer whose packed weight it is. ``state``: if the files hold it
    packed, the stored tensors of its quantisation state, by bitsandbytes' names."""

    stored: TensorLocation
    layer: Any = None
    state: Mapping[str, TensorLocation] = field(default_factory=dict)


class ShardLoader:
    """Loads the weights in ``source`` into the meta model ``base``, after it has been wrapped.

    ``device``: used for quantisation and collectives; a rank's pieces may be on the host. Raises InputError when a
    weight is missing or has another shape, NeedsFullLoad when ``base`` must be loaded whole."""

    def __init__(
        self, base: Any, source: WeightSource, path: str, device: torch.device, head: Head | None = None
    ) -> None:
        self.source, self.device, self.base, self.head = source, device, base, head
        self.stored = locate_weights(read_headers(source, path), base.stored_quantization, path)
        self._reader = WeightReader(source)
        names = match_names(base, self.stored, path, lambda name: head is not None and is_head(base, name))
        if head:  # a head with another number of outputs is treated as missing
            heads = {n: tuple(base.get_parameter(n).shape) for n in names if is_head(base, n)}
            unlike = {n for n, shape in heads.items() if self.stored[names[n]].shape != shape}
            names = {n: key for n, key in names.items() if n not in unlike}
        layers = {id(layer.weight): layer for layer in four_bit_layers(base).values()} if _is_four_bit(base) else {}
        tensors = dict(state_of(base))
        # By identity, since the adapter renames what it wraps. `_tensors` keeps them alive until then, so that no
        # other object gets one of these ids.
        self._tensors = [tensors[name] for name in names]
        self._places = {
            id(tensors[name]): _WeightLocation(
                self.stored[key], layers.get(id(tensors[name])), state_in(self.stored, key)
            )
            for name, key in names.items()
        }
        _check_shapes(path, {name: (tensors[name], self._places[id(tensors[name])]) for name in names})
        self._keys = {names[name]: (self._places[id(tensors[name])], tensors[name].dtype) for name in names}
        self._lacking = {n: t for n, t in tensors.items() if head and n not in names and is_head(base, n)}
        if head:
            set_up_head(base, head, self._lacking)
        self._named: dict[str, _WeightLocation] = {}
        self._drawn: dict[str, str] = {}  # name in the base, by the name after the adapter was attached
        self._first_name: dict[str, str] = {}  # first name of a tied parameter, by each of its names

    def digest(self) -> str:
        """Returns a digest of the stored tensors' locations. Ranks that load the same model have the same one."""
        return hashlib.sha256(repr(sorted(self.stored.items())).encode()).hexdigest()

    def attached(self, model: torch.nn.Module) -> None:
        """Records the parameters' names after the adapter was attached. Fills the buffers, which are not sharded."""
        self._named = {n: self._places[id(p)] for n, p in model.named_parameters() if id(p) in self._places}
        lacking = {id(t): n for n, t in self._lacking.items()}
        self._drawn = {n: lacking[id(p)] for n, p in model.named_parameters() if id(p) in lacking}
        first = {id(p): n for n, p in model.named_parameters()}
        self._first_name = {n: first[id(p)] for n, p in model.named_parameters(remove_duplicate=False)}
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and id(buffer) in self._places:
                    stored = self._places[id(buffer)].stored
                    module._buffers[name] = (
                        self._values(stored, 0, stored.numel).to(self.device, buffer.dtype).view(buffer.shape)
                    )
        self._tensors, self._places, self._lacking = [], {}, {}

    def fill(self, pieces: Sequence[ShardSlice], initial: InitParameter, whole: Callable[[str], torch.Tensor]) -> None:
        """Collective: fills ``pieces``, this rank's pieces of all parameters.

        Parameters that no file holds come from ``initial(name, shape, start, stop, rows)``; those of a head are drawn.
        ``whole(name)`` returns the full tensor of a sharded parameter."""
        stored = [p for p in pieces if p.name in self._named]
        stored.sort(key=lambda p: (self._named[p.name].stored.file, self._named[p.name].stored.start))
        self.source.ahead(self._ranges(stored))
        for piece in stored:
            place = self._named[piece.name]
            if place.state:
                self._copy_packed(piece, place)
            elif place.layer is not None:
                state = self._quantised(place, piece.start, piece.stop, piece.local, nf4.gather_absmax)
                _set_state(place.layer, state)
            else:
                self._copy(piece, place.stored)
        self.source.check_unchanged({place.stored.file for place in self._named.values()})
        kept = {piece.name: piece for piece in pieces}
        for name, base_name in self._drawn.items():
            assert self.head is not None
            values = drawn_for(self.base, base_name, kept[name].shape, self.head).view(-1)
            kept[name].local.copy_(values[kept[name].start : kept[name].stop])
        for piece in pieces:
            if piece.name not in self._named and piece.name not in self._drawn:
                values = initial(
                    piece.name,
                    piece.shape,
                    piece.start,
                    piece.stop,
                    lambda name, a, b: self._rows(kept[self._first_name[name]], a, b, whole),
                )
                piece.local.copy_(values)

    def converted(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yields, for one stored tensor at a time, the tensors that replace it in bitsandbytes' format, by name."""
        order = sorted(self._keys.items(), key=lambda item: (item[1][0].stored.file, item[1][0].stored.start))
        self.source.ahead((p.stored.file, p.stored.start, p.stored.start + p.stored.bytes) for _, (p, _) in order)
        for key, (place, dtype) in order:
            stored = place.stored
            if place.layer is None:
                yield {key: self._values(stored, 0, stored.numel).view(stored.shape).to(dtype)}
            else:
                packed = torch.empty(place.layer.weight.shape, dtype=dtype)
                state = self._quantised(place, 0, packed.numel(), packed.view(-1), lambda absmax: absmax)
                parts = {f"{key}.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
                yield {key: packed, **parts}

    def _ranges(self, pieces: Sequence[ShardSlice]) -> Iterator[tuple[str, int, int]]:
        for piece in pieces:
            place = self._named[piece.name]
            stored, first, last = place.stored, piece.start, piece.stop
            if place.state:
                first, last = (n * piece.local.element_size() // stored.dtype.itemsize for n in (first, last))
                yield from ((part.file, part.start, part.start + part.bytes) for part in place.state.values())
            elif place.layer is not None:
                first, last = nf4.elements_of(first, last, piece.local.element_size(), stored.numel)
            if isinstance(stored, QuantisedLocation):
                runs = stored.stored(*stored.units(first, last)) if last > first else ()
                yield from (
                    (p.file, p.start + a * p.dtype.itemsize, p.start + b * p.dtype.itemsize) for p, a, b in runs
                )
            elif last > first:
                size = stored.dtype.itemsize
                yield stored.file, stored.start + first * size, stored.start + last * size

    def _values(self, stored: TensorLocation, start: int, stop: int) -> torch.Tensor:
        return self._reader.values(stored, start, stop)

    def _copy(self, piece: ShardSlice, stored: TensorLocation) -> None:
        local = piece.local
        if local.numel() and local.device.type == "cpu" and local.dtype == stored.dtype:
            view = _bytes_of(local.view(torch.uint8))
            self.source.read_into(stored.file, stored.start + piece.start * stored.dtype.itemsize, view)
            return
        for start in range(piece.start, piece.stop, CHUNK):
            stop = min(piece.stop, start + CHUNK)
            local[start - piece.start : stop - piece.start].copy_(self._values(stored, start, stop))

    def _copy_packed(self, piece: ShardSlice, place: _WeightLocation) -> None:
        """Copies a weight that the files hold packed; their storage type may differ from the model's."""
        from bitsandbytes.functional import QuantState

        stored, size = place.stored, piece.local.element_size()
        step = CHUNK // size * size
        local = piece.local.view(torch.uint8) if piece.local.numel() else piece.local
        for start in range(0, local.numel(), step):
            part = torch.empty(min(step, local.numel() - start), dtype=torch.uint8)
            self.source.read_into(stored.file, stored.start + piece.start * size + start, _bytes_of(part))
            local[start : start + len(part)].copy_(part)
        state: dict[str, Any] = {
            name: self._values(part, 0, part.numel).view(part.shape) for name, part in place.state.items()
        }
        _set_state(place.layer, QuantState.from_dict(state, self.device))

    def _quantised(self, place: _WeightLocation, start: int, stop: int, local: torch.Tensor, gather: Gather) -> Any:
        """Fills ``local`` with elements ``start`` to ``stop`` of the packed weight; returns the full weight's state."""
        stored, state = place.stored, place.layer.quant_state

        def read(first: int, last: int) -> torch.Tensor:
            return self._values(stored, first, last).to(device=self.device, dtype=state.dtype)

        absmax = nf4.quantise_piece(read, stored.numel, start, stop, local, self.device)
        return nf4.nested_state(gather(absmax), state.shape, state.dtype)

    def _rows(
        self, piece: ShardSlice, first: int, last: int, whole: Callable[[str], torch.Tensor]
    ) -> Iterator[torch.Tensor]:
        """Collective: yields rows ``first`` to ``last`` (different on each rank) of a weight, dequantised."""
        layer = self._named[piece.name].layer if piece.name in self._named else None
        if layer is not None:
            yield from nf4.dequantise_rows(whole(piece.name), layer.quant_state, first, last)
            return
        columns = piece.shape[1:].numel()
        ours = torch.tensor(int((piece.start, piece.stop) == (first * columns, last * columns)), device=self.device)
        dist.all_reduce(ours, dist.ReduceOp.MIN)
        if ours:  # on every rank, so that either all call ``whole`` or none
            yield piece.local.view(-1, *piece.shape[1:])
        else:
            yield whole(piece.name)[first:last]


def _bytes_of(raw: torch.Tensor) -> memoryview:
    array: Any = raw.numpy()
    return memoryview(array)


def state_in(stored: Mapping[str, TensorLocation], weight: str) -> dict[str, TensorLocation]:
    """Returns the stored tensors of the quantisation state of ``weight``; empty if it is not packed."""
    if not any(f"{weight}.quant_state.bitsandbytes__{kind}" in stored for kind in ("nf4", "fp4")):
        return {}
    return {n.removeprefix(f"{weight}."): place for n, place in stored.items() if n.startswith(f"{weight}.")}


def _set_state(layer: Any, state: Any) -> None:
    layer.quant_state = state
    if hasattr(layer.weight, "quant_state"):  # not under FSDP2, where the weight is a plain parameter
        layer.weight.quant_state = state


def _is_four_bit(base: Any) -> bool:
    return bool(getattr(base, "is_loaded_in_4bit", False))


def _check_shapes(path: str, found: Mapping[str, tuple[torch.Tensor, _WeightLocation]]) -> None:
    unlike = []
    for name, (tensor, place) in sorted(found.items()):
        wanted = tuple(place.layer.quant_state.shape if place.layer is not None else tensor.shape)
        if place.layer is not None and place.layer.source_cls.__name__ == "Conv1D":
            raise NeedsFullLoad(f"its {name} is stored transposed")
        if place.state and place.stored.bytes == tensor.numel() * tensor.element_size():
            continue
        if place.stored.shape != wanted:
            unlike.append((name, place.stored.shape, wanted))
    if unlike:
        name, stored, wanted = unlike[0]
        raise wrong_shapes(path, len(unlike), name, stored, wanted)
