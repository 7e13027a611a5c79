"""Sharded load of a base model: no rank ever holds more of it than it keeps.

    meta model → adapter, task → wrapped by the strategy → memory for this rank's pieces → each filled from its bytes

A piece is a contiguous run of a flattened parameter (rows under FSDP2, a flat slice under ZeRO-3), so that it is one
range of a safetensors file. NF4 weights are quantised while they are read (nf4.py).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from trainer import nf4
from trainer.experts import PackedExperts, packed_experts
from trainer.model.dequantise import QuantisedLocation, WeightReader, locate_weights
from trainer.model.files.safetensors_index import Location, Range, TensorLocation, read_headers
from trainer.model.files.weight_check import wrong_shapes
from trainer.model.files.weight_source import WeightSource
from trainer.model.head import Head, drawn_for, is_head, set_up_head
from trainer.model.key_mapping import located, match_names, state_of
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
    """The source of a parameter. ``packing``: if it is packed, the 4-bit layer or the experts with its quantisation
    state. ``state``: if the files hold it packed, the stored tensors of that state, by bitsandbytes' names."""

    stored: Location
    packing: Any = None
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
            unlike = {n for n, shape in heads.items() if self.stored[names[n][0]].shape != shape}
            names = {n: keys for n, keys in names.items() if n not in unlike}
        packings = _packings(base) if getattr(base, "is_loaded_in_4bit", False) else {}
        tensors = dict(state_of(base))
        # By identity, since the adapter renames what it wraps. `_tensors` keeps them alive until then, so that no
        # other object gets one of these ids.
        self._tensors = [tensors[name] for name in names]
        self._places = {
            id(tensors[name]): _WeightLocation(
                located(self.stored, keys, torch.Size(packing.quant_state.shape) if packing else tensors[name].shape),
                packing,
                state_in(self.stored, keys[0]),
            )
            for name, keys in names.items()
            for packing in [packings.get(id(tensors[name]))]
        }
        _check_shapes(path, {name: (tensors[name], self._places[id(tensors[name])]) for name in names})
        # A joined tensor is stored by its name in the model, which transformers' rules leave as it is.
        self._keys = {
            keys[0] if len(keys) == 1 else name: (self._places[id(tensors[name])], tensors[name])
            for name, keys in names.items()
        }
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

    def fill(
        self,
        pieces: Sequence[ShardSlice | _Complete],
        initial: InitParameter,
        whole: Callable[[str], torch.Tensor],
        gather: Gather = nf4.gather_absmax,
    ) -> None:
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
            elif place.packing is not None:
                state = self._quantised(place, piece.start, piece.stop, piece.local, gather)
                _set_state(place.packing, state)
            else:
                self._copy(piece, place.stored)
        self.source.check_unchanged({part.file for place in self._named.values() for part in place.stored.parts})
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

    def fill_base(self) -> None:
        """Allocates and fills all parameters of ``base``, which is neither wrapped nor has an adapter."""
        self.attached(self.base)
        made: dict[int, torch.nn.Parameter] = {}
        replaced = []  # keeps them alive: `id` is unique only among live objects
        for module in self.base.modules():
            for name, old in list(module._parameters.items()):
                if old is not None and old.is_meta:
                    replaced.append(old)
                    if id(old) not in made:
                        made[id(old)] = nf4.allocated(module, old, self.device)
                    module._parameters[name] = made[id(old)]
        # As plain tensors: bitsandbytes' tensor subclass would quantise the values that are copied into it.
        flat = {n: p.detach().as_subclass(torch.Tensor).view(-1) for n, p in self.base.named_parameters()}
        pieces = [_Complete(n, p.shape, 0, p.numel(), flat[n]) for n, p in self.base.named_parameters()]
        self.fill(pieces, _no_adapter, self.base.get_parameter, lambda absmax: absmax)

    def converted(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yields, for one stored tensor at a time, the tensors that replace it in bitsandbytes' format, by name."""
        order = sorted(self._keys.items(), key=lambda item: (item[1][0].stored.file, item[1][0].stored.start))
        self.source.ahead(run for _, (place, _) in order for run in _byte_ranges(place.stored, 0, place.stored.numel))
        for key, (place, tensor) in order:
            stored = place.stored
            if place.packing is None:
                yield {key: self._values(stored, 0, stored.numel).view(stored.shape).to(tensor.dtype)}
            else:
                packed = torch.empty(tensor.shape, dtype=tensor.dtype)
                state = self._quantised(place, 0, packed.numel(), packed.view(-1), lambda absmax: absmax)
                parts = {f"{key}.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
                yield {key: packed, **parts}

    def _ranges(self, pieces: Sequence[ShardSlice | _Complete]) -> Iterator[tuple[str, int, int]]:
        for piece in pieces:
            place = self._named[piece.name]
            stored, first, last = place.stored, piece.start, piece.stop
            if place.state:
                first, last = (n * piece.local.element_size() // stored.dtype.itemsize for n in (first, last))
                yield from ((part.file, part.start, part.start + part.bytes) for part in place.state.values())
            elif place.packing is not None:
                first, last = nf4.elements_of(first, last, piece.local.element_size(), stored.numel)
            if last > first:
                yield from _byte_ranges(stored, first, last)

    def _values(self, stored: Location, start: int, stop: int) -> torch.Tensor:
        """Returns elements ``start`` to ``stop``, as stored or dequantised to float32."""
        parts = [self._reader.values(*run) for run in stored.ranges(start, stop)] if stop > start else []
        return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else torch.empty(0, dtype=stored.dtype)

    def _read(self, stored: Location, start: int, stop: int, raw: torch.Tensor) -> None:
        """Reads elements ``start`` to ``stop`` into ``raw``, which is uint8 on the host."""
        size, done = stored.dtype.itemsize, 0
        for part, first, last in stored.ranges(start, stop) if stop > start else ():
            view = _bytes_of(raw[done : done + (last - first) * size])
            self.source.read_into(part.file, part.start + first * size, view)
            done += len(view)

    def _copy(self, piece: ShardSlice | _Complete, stored: Location) -> None:
        local = piece.local
        if local.numel() and local.device.type == "cpu" and local.dtype == stored.dtype:
            self._read(stored, piece.start, piece.stop, local.view(torch.uint8))
            return
        for start in range(piece.start, piece.stop, CHUNK):
            stop = min(piece.stop, start + CHUNK)
            local[start - piece.start : stop - piece.start].copy_(self._values(stored, start, stop))

    def _copy_packed(self, piece: ShardSlice | _Complete, place: _WeightLocation) -> None:
        """Copies a weight that the files hold packed; their storage type may differ from the model's."""
        from bitsandbytes.functional import QuantState

        (stored,), size = place.stored.parts, piece.local.element_size()
        step = CHUNK // size * size
        local = piece.local.view(torch.uint8) if piece.local.numel() else piece.local
        for start in range(0, local.numel(), step):
            part = torch.empty(min(step, local.numel() - start), dtype=torch.uint8)
            self.source.read_into(stored.file, stored.start + piece.start * size + start, _bytes_of(part))
            local[start : start + len(part)].copy_(part)
        state: dict[str, Any] = {
            name: self._values(part, 0, part.numel).view(part.shape) for name, part in place.state.items()
        }
        _set_state(place.packing, QuantState.from_dict(state, self.device))

    def _quantised(self, place: _WeightLocation, start: int, stop: int, local: torch.Tensor, gather: Gather) -> Any:
        """Fills ``local`` with elements ``start`` to ``stop`` of the packed weight; returns the full weight's state."""
        stored, state = place.stored, place.packing.quant_state

        def read(first: int, last: int) -> torch.Tensor:
            return self._values(stored, first, last).to(device=self.device, dtype=state.dtype)

        absmax = nf4.quantise_piece(read, stored.numel, start, stop, local, self.device)
        return nf4.nested_state(gather(absmax), state.shape, state.dtype)

    def _rows(
        self, piece: ShardSlice | _Complete, first: int, last: int, whole: Callable[[str], torch.Tensor]
    ) -> Iterator[torch.Tensor]:
        """Collective: yields rows ``first`` to ``last`` (different on each rank) of a weight, dequantised."""
        packing = self._named[piece.name].packing if piece.name in self._named else None
        if packing is not None:
            yield from nf4.dequantise_rows(whole(piece.name), packing.quant_state, first, last)
            return
        columns = piece.shape[1:].numel()
        ours = torch.tensor(int((piece.start, piece.stop) == (first * columns, last * columns)), device=self.device)
        dist.all_reduce(ours, dist.ReduceOp.MIN)
        if ours:  # on every rank, so that either all call ``whole`` or none
            yield piece.local.view(-1, *piece.shape[1:])
        else:
            yield whole(piece.name)[first:last]


def _byte_ranges(location: Location, first: int, last: int) -> Iterator[tuple[str, int, int]]:
    """Yields the files' bytes from which elements ``first`` to ``last`` are read."""
    for place, start, stop in location.ranges(first, last):
        runs: Iterable[Range] = ((place, start, stop),)
        if isinstance(place, QuantisedLocation):
            runs = place.stored(*place.units(start, stop))
        for part, a, b in runs:
            yield part.file, part.start + a * part.dtype.itemsize, part.start + b * part.dtype.itemsize


class _Complete(NamedTuple):
    """All elements of a parameter, with the fields of a `ShardSlice`."""

    name: str
    shape: torch.Size
    start: int
    stop: int
    local: torch.Tensor


def _no_adapter(name: str, *_: Any) -> torch.Tensor:
    raise AssertionError(f"{name} is in no file, and there is no adapter")


def _bytes_of(raw: torch.Tensor) -> memoryview:
    array: Any = raw.numpy()
    return memoryview(array)


def state_in(stored: Mapping[str, TensorLocation], weight: str) -> dict[str, TensorLocation]:
    """Returns the stored tensors of the quantisation state of ``weight``; empty if it is not packed."""
    if not any(f"{weight}.quant_state.bitsandbytes__{kind}" in stored for kind in ("nf4", "fp4")):
        return {}
    return {n.removeprefix(f"{weight}."): place for n, place in stored.items() if n.startswith(f"{weight}.")}


def _packings(base: Any) -> dict[int, Any]:
    """Returns the 4-bit layers and packed experts, by the ``id`` of their packed weight."""
    layers = {id(layer.weight): layer for layer in four_bit_layers(base).values()}
    return layers | {id(weight): packing for weight, packing in packed_experts(base)}


def _set_state(packing: Any, state: Any) -> None:
    packing.quant_state = state
    # Not under FSDP2, where a layer's weight is a plain parameter.
    if not isinstance(packing, PackedExperts) and hasattr(packing.weight, "quant_state"):
        packing.weight.quant_state = state


def _check_shapes(path: str, found: Mapping[str, tuple[torch.Tensor, _WeightLocation]]) -> None:
    unlike = []
    for name, (tensor, place) in sorted(found.items()):
        packing = place.packing
        wanted = tuple(packing.quant_state.shape if packing is not None else tensor.shape)
        if packing is not None and getattr(packing, "source_cls", type(None)).__name__ == "Conv1D":
            raise NeedsFullLoad(f"its {name} is stored transposed")
        if place.state and place.stored.bytes == tensor.numel() * tensor.element_size():
            continue
        part, *more = place.stored.parts
        fits = part.shape == wanted
        if more:  # the experts' matrices, stacked
            fits = part.shape[-1:] == wanted[-1:] and place.stored.numel == math.prod(wanted)
        if not fits:
            unlike.append((name, part.shape, wanted))
    if unlike:
        name, stored, wanted = unlike[0]
        raise wrong_shapes(path, len(unlike), name, stored, wanted)
