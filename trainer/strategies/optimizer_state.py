"""Optimizer state as named tensors that any strategy on any number of ranks can load.

    p.<key>            an entry of the state of parameter p: a full tensor, or a scalar
    p.<key>@<start>    the same of one part of p, which begins at element <start> of the flattened parameter, where a
                       state is quantised in blocks that end with the part
    p.group:<key>      a number that the optimizer counts for the group of p

Python integers are saved as int64 scalars, other numbers as float64. Before a state is loaded, the optimizer allocates
it by an update that changes nothing; saved values are then copied into that memory, so that its layout, its device and
its kind (paged, quantised) are the optimizer's own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from trainer.distributed.world import World
from trainer.errors import CorruptObject, InputError
from trainer.strategies.held import HeldPart, Itself

if TYPE_CHECKING:
    from trainer.recipe.optimizers import OptimizerRow

Whole = Callable[[torch.Tensor], torch.Tensor]
Spread = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Read = Callable[[str], torch.Tensor]
GROUP = "group:"


class OptimizerState:
    """The state of one optimizer. ``held``: the parameters that it updates, by name. ``whole`` and ``spread``: the
    strategy's conversion of a tensor to a full one, and of a full one to the layout of another."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        row: OptimizerRow,
        held: Mapping[str, Itself],
        world: World,
        whole: Whole,
        spread: Spread,
    ) -> None:
        self.optimizer, self.row, self.held, self.world = optimizer, row, held, world
        self.whole, self.spread = whole, spread
        self.codec = row.load_codec()
        self._group = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        self._initial = {id(group): dict(group) for group in optimizer.param_groups}

    def check(self) -> None:
        """Raises InputError for a state that cannot be saved. Called after the first update."""
        for name, held in self.held.items():
            for key, value in self.optimizer.state.get(held.parameter, {}).items():
                if value is not None and not isinstance(value, torch.Tensor | int | float):
                    raise InputError(
                        f"optimizer.name {self.row.code} keeps a {type(value).__name__} as state[{key!r}] of {name}, "
                        "and muster saves tensors and numbers only"
                    )

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields (name, tensor on the CPU). Collective: every rank iterates to the end."""
        mine = {name: self._entries(held) for name, held in self.held.items()}
        forms = {
            name: {key: (str(v.dtype).removeprefix("torch."), list(v.shape)) for key, v in mine[name].items()}
            for name, held in self.held.items()
            if held.part
        }
        told = self.world.all_gather([(forms[name], part.start) for name, part in self._parts()]) if forms else []
        for index, (name, _) in enumerate(self._parts()):
            pieces = self._pieces(mine[name], [rank[index] for rank in told])
            yield from ((f"{name}.{key}", value) for key, value in self._stored(name, pieces))
        for name, held in self.held.items():
            if held.part is None:
                yield from ((f"{name}.{key}", self.whole(value).cpu()) for key, value in mine[name].items())
            for key, number in self._counted(held).items():
                yield f"{name}.{GROUP}{key}", as_tensor(number)

    def _parts(self) -> list[tuple[str, HeldPart]]:
        return [(name, held.part) for name, held in self.held.items() if held.part is not None]

    def _entries(self, held: Itself) -> dict[str, torch.Tensor]:
        state = self.optimizer.state.get(held.parameter, {})
        if held.part is not None and not held.part.saved:
            return {}
        scalars = {key: as_tensor(v) for key, v in state.items() if _is_scalar(v)}
        if self.codec:
            return {**scalars, **{key: v.detach() for key, v in self.codec.raw(state).items()}}
        return {**scalars, **{key: v.detach() for key, v in state.items() if v is not None and not _is_scalar(v)}}

    def _pieces(
        self, mine: Mapping[str, torch.Tensor], told: Sequence[Any]
    ) -> list[tuple[int, dict[str, torch.Tensor]]]:
        """Returns the entries of each part that has any, with its first element. Collective."""
        found = []
        for rank, (forms, start) in enumerate(told):
            entries = {}
            for key, (dtype, shape) in forms.items():
                if rank == self.world.rank:
                    tensor = mine[key].to(self.world.device).contiguous()
                else:
                    tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=self.world.device)
                dist.broadcast(tensor.view(-1).view(torch.uint8), src=rank)  # as bytes: gloo knows no 8-bit floats
                entries[key] = tensor.cpu()
            if entries:
                found.append((start, entries))
        return sorted(found, key=lambda piece: piece[0])

    def _stored(
        self, name: str, pieces: list[tuple[int, dict[str, torch.Tensor]]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the entries of a parameter as they are saved: complete tensors where no part is quantised."""
        if not pieces:
            return
        yield from ((key, value) for key, value in pieces[0][1].items() if not value.ndim)
        parts = [(start, {k: v for k, v in entries.items() if v.ndim}) for start, entries in pieces]
        if len(parts) == 1 and parts[0][0] == 0:
            yield from parts[0][1].items()
        elif self.codec and any(self.codec.is_quantised(entries) for _, entries in parts):
            for start, entries in parts:
                yield from ((f"{key}@{start}", value) for key, value in entries.items())
        else:
            shape = self.held[name].source.shape
            for key in parts[0][1]:
                yield key, torch.cat([entries[key].reshape(-1) for _, entries in parts]).view(shape)

    def _counted(self, held: Itself) -> dict[str, Any]:
        """Returns the numbers of a parameter's group that the optimizer has changed."""
        group = self._group[id(held.parameter)]
        initial = self._initial[id(group)]
        numbers = {k: v for k, v in group.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        return {k: v for k, v in numbers.items() if k != "lr" and v != initial.get(k)}

    def load(self, names: Mapping[str, list[str]], read: Read) -> None:
        """Loads the state. ``names``: the keys that were saved for each parameter; ``read`` returns a tensor by its
        saved name. Raises CorruptObject for the state of another model or optimizer."""
        check_owners(names, self.held)
        entries = {name: [key for key in names.get(name, []) if not key.startswith(GROUP)] for name in self.held}
        self.optimizer.state.clear()
        self._allocate([self.held[name] for name, keys in entries.items() if keys])
        for name, held in self.held.items():
            group = self._group[id(held.parameter)]
            counts = [key for key in names.get(name, []) if key.startswith(GROUP)]
            group.update({key: self._initial[id(group)][key] for key in self._counted(held)})  # undoes `_allocate`
            group.update({key.removeprefix(GROUP): read(f"{name}.{key}").item() for key in counts})
            state = self.optimizer.state.get(held.parameter)
            if state:
                self._load_one(name, state, held, entries[name], read)
            elif entries[name] and (held.part is None or held.part.numel):
                raise CorruptObject(f"{name}.{entries[name][0]} is no part of the state of {self.row.code}")

    def _allocate(self, held: Sequence[Itself]) -> None:
        for group in self.optimizer.param_groups:
            set_group_lr(group, 0.0)
        for one in held:
            one.zero_gradient()
        if held:
            self.optimizer.step()
        for one in held:
            one.close()

    @torch.no_grad()
    def _load_one(self, name: str, state: dict[str, Any], held: Itself, keys: list[str], read: Read) -> None:
        values = {} if not self.codec else {key: v for key, v in state.items() if not _is_scalar(v)}
        for key, existing in state.items():
            if existing is None or key in values:
                continue
            if key not in keys:
                raise CorruptObject(f"{name}.{key} is missing in the optimizer's state")
            state[key] = self._copied(f"{name}.{key}", existing, read(f"{name}.{key}"))
        if self.codec:
            part = held.part or HeldPart(0, held.parameter.numel())
            _Saved(name, [k for k in keys if k not in state or k in values], read, self.codec).into(
                state, part, held.source.shape.numel()
            )
        elif foreign := sorted(set(keys) - set(state)):
            raise CorruptObject(f"{name}.{foreign[0]} is no part of the state of {self.row.code}")

    def _copied(self, name: str, existing: Any, saved: torch.Tensor) -> Any:
        if not isinstance(existing, torch.Tensor):
            return type(existing)(saved.item())
        if existing.shape != saved.shape:
            raise CorruptObject(f"{name} has the shape {tuple(saved.shape)}, not {tuple(existing.shape)}")
        return existing.copy_(self.spread(saved, existing))


class _Saved:
    """The saved state of one parameter, in its parts."""

    def __init__(self, name: str, keys: Iterable[str], read: Read, codec: Any) -> None:
        self.codec = codec
        self._entries: dict[int, dict[str, str]] = defaultdict(dict)
        for key in keys:
            entry, _, start = key.partition("@")
            self._entries[int(start or 0)][entry] = f"{name}.{key}"
        self._read, self._starts, self._name = read, sorted(self._entries), name

    def into(self, state: dict[str, Any], part: HeldPart, total: int) -> None:
        """Copies the saved part that has the same elements, to the byte; if there is none, quantises again."""
        ends = dict(zip(self._starts, [*self._starts[1:], total], strict=True))
        if ends.get(part.start) == part.start + part.numel and self.codec.restore(state, self._raw(part.start)):
            return
        values: dict[str, list[torch.Tensor]] = defaultdict(list)
        for start in self._starts:
            for key, flat in self.codec.values(self._raw(start)).items():
                values[key].append(flat.float())
        joined = {key: torch.cat(flats) for key, flats in values.items()}
        if not joined or any(flat.numel() != total for flat in joined.values()):
            raise CorruptObject(f"the optimizer's state of {self._name} does not cover the parameter")
        self.codec.fill(state, {key: flat.narrow(0, part.start, part.numel) for key, flat in joined.items()})

    def _raw(self, start: int) -> dict[str, torch.Tensor]:
        return {entry: self._read(name) for entry, name in self._entries[start].items()}


def check_owners(names: Iterable[str], parameters: Iterable[str]) -> None:
    """Raises CorruptObject when state was saved for a parameter that does not exist here."""
    foreign = sorted(set(names) - set(parameters))
    if foreign:
        raise CorruptObject(f"the optimizer's state is that of another model: nothing here is called {foreign[:3]}")


def set_group_lr(group: dict[str, Any], lr: float) -> None:
    """Sets the learning rate of a parameter group, in place if the optimizer keeps it as a tensor."""
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


def _is_scalar(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, torch.Tensor) and value.ndim == 0)


def as_tensor(value: Any) -> torch.Tensor:
    """Returns an entry of a state as a tensor, as it is saved."""
    if isinstance(value, torch.Tensor):
        return value.detach()
    return torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)
