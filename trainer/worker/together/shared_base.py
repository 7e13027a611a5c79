"""One base model with the adapters of several runs: a forward has rows of all of them, and each row gets the product of
its own run's adapter.

The layers of the base model compute all rows at once. After each adapted layer, the product of each run's adapter is
added to the run's rows (`trainer.worker.together.lora_products`). In the same way each run's head computes the losses
of its rows. So a run's numbers are those that it would have alone, up to the rounding of larger matrix products.

Legend: B rows, L tokens of the longest row, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import pad

from trainer.adapters.peft_method import ADAPTER_NAME
from trainer.errors import InputError
from trainer.model.kernels.attention import by_mask
from trainer.tasks.lm_head_loss import TargetHead, outputs_of_several
from trainer.worker.together.lora_products import LoraProduct, with_products
from trainer.worker.together.random_state import RandomState
from trainer.worker.together.turns import BACKWARD, ModelPass

ADAPTERS = "adapters_of_runs"
"""The name of the submodule of an adapted layer that has the runs' LoRA layers."""
PACKED = ("cu_seq_lens_q", "cu_seq_lens_k")
LONGEST = ("max_length_q", "max_length_k")
BOUNDS = "sample_bounds"
JOINED = {"input_ids", "position_ids", "use_cache", BOUNDS, *PACKED, *LONGEST}
"""The arguments with which several runs' forwards are joined."""


@dataclass
class RunRows:
    """The rows of one run in a forward, of which the first ``length`` tokens are the run's own. ``layers``: its LoRA
    layers, by the name of the adapted layer; ``head``: makes of its hidden states what the model returns; ``shape``:
    of that."""

    rows: slice
    length: int
    layers: Mapping[str, Any]
    head: TargetHead
    random: RandomState
    shape: torch.Size = field(default_factory=torch.Size)


@dataclass(frozen=True)
class Forward:
    """A forward that a run asks for. ``autocast``: the dtype to compute in, None for the parameters' own."""

    inputs: Mapping[str, Any]
    layers: Mapping[str, Any]
    head: TargetHead
    random: RandomState
    training: bool
    gradients: bool
    autocast: torch.dtype | None

    @property
    def rows(self) -> int:
        return int(self.inputs["input_ids"].shape[0])

    @property
    def length(self) -> int:
        return int(self.inputs["input_ids"].shape[1])


@dataclass(frozen=True)
class Backward:
    """A backward that a run asks for. ``last``: the run's gradients are complete after it."""

    loss: torch.Tensor
    last: bool


class BorrowedHead(torch.nn.Module):
    """Takes the place of the output embeddings in a run's model: computes with those of the shared base model."""

    def __init__(self, project: Callable[[torch.Tensor], torch.Tensor], out_features: int) -> None:
        super().__init__()
        self.out_features, self._project = out_features, project

    def forward(self, hidden_BLD: torch.Tensor) -> torch.Tensor:
        return self._project(hidden_BLD)


class SharedBase:
    """``model``: the base model, whose layers are adapted in place by `adapt`; ``synchronise(last)`` tells the strategy
    before a backward if gradients are exchanged after it; ``recomputes``: a backward computes the layers again."""

    def __init__(self, model: Any, device: torch.device, *, recomputes: bool) -> None:
        self.model, self._device, self.recomputes = model, device, recomputes
        self.module: torch.nn.Module = model
        self.synchronise: Callable[[bool], None] = lambda last: None
        head = model.get_output_embeddings()
        self._project = head.forward
        self._vocabulary = int(getattr(head, "out_features", 0) or model.config.get_text_config().vocab_size)
        head.forward = self._of_each_run
        self._parts: list[RunRows] = []
        self._rows: list[int] = []
        self._tokens = torch.Size()
        self._recomputing = False
        self._note: Callable[[Any], None] = lambda layer: None

    @contextmanager
    def noting(self, note: Callable[[Any], None]) -> Iterator[None]:
        """Calls ``note`` with each run's LoRA layer that a forward in the context uses."""
        before, self._note = self._note, note
        try:
            yield
        finally:
            self._note = before

    def head_for_run(self) -> BorrowedHead:
        return BorrowedHead(self._project, self._vocabulary)

    def adapt(self, name: str, run: int, layer: Any) -> None:
        """Gives the layer ``name`` of the base model the matrices of a run's LoRA layer. Raises InputError for another
        kind of adapter."""
        check_plain(name, layer)
        adapted = self.model.get_submodule(name)
        if ADAPTERS not in dict(adapted.named_children()):
            adapted.add_module(ADAPTERS, torch.nn.ModuleDict())
            adapted.register_forward_hook(lambda module, args, output: self._adapted(name, args[0], output))
        # Children of the layer that they adapt, so that a strategy shards them with that layer.
        matrices = torch.nn.ModuleDict({"A": layer.lora_A, "B": layer.lora_B})
        adapted.get_submodule(ADAPTERS).add_module(str(run), matrices)

    def answer(self, calls: Sequence[ModelPass]) -> None:
        """Answers calls that go together by one forward or one backward."""
        if calls[0].order == BACKWARD:
            self._backward([call.asked for call in calls])
            return
        asked: list[Forward] = [call.asked for call in calls]
        for call, output in zip(calls, self._forward(asked), strict=True):
            call.answer = output

    def _forward(self, asked: Sequence[Forward]) -> list[Any]:
        first = asked[0]
        inputs = joined([one.inputs for one in asked]) if len(asked) > 1 else first.inputs
        self._tokens, self._parts = inputs["input_ids"].shape, parts_of(asked)
        self._rows = [one.rows for one in asked]
        if self.module.training != first.training:
            self.module.train(first.training)
        enabled = first.autocast is not None
        # Runs that write texts at the same time share the kernel of the model, and the first that ends sets it back.
        with (
            by_mask(self.model) if "attention_mask" in inputs else nullcontext(),
            torch.set_grad_enabled(first.gradients),
            torch.autocast(self._device.type, first.autocast, enabled=enabled),
        ):
            output = self.module(**inputs)
            logits = output.logits
            sizes = [part.shape.numel() // logits.shape[-1] for part in self._parts]
            pieces = logits.reshape(1, -1, logits.shape[-1]).split(sizes, dim=1)
        outputs = []
        for piece, part in zip(pieces, self._parts, strict=True):
            own = type(output)(**output) if len(asked) == 1 else type(output)()
            own["logits"] = piece.reshape(*part.shape[:-1], piece.shape[-1])
            outputs.append(own)
        return outputs

    def _backward(self, asked: Sequence[Backward]) -> None:
        self.synchronise(any(one.last for one in asked))
        self._recomputing = True
        try:
            torch.autograd.backward([one.loss for one in asked])
        finally:
            self._recomputing = False

    def _adapted(self, name: str, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Returns the output [B, L, D] of an adapted layer with the adapters' products added."""
        if x.shape[:-1] != self._tokens:
            raise InputError(
                f"{name} gets its tokens as {tuple(x.shape[:-1])} and not row by row, so that the adapters of several "
                "runs cannot share it: leave it out of adapter.target_modules, or train the runs apart"
            )
        products, length = [], self._tokens[1]
        for part in self._parts:
            layer = part.layers.get(name)
            if layer is not None and not layer.disable_adapters:
                self._note(layer)
                products.append(LoraProduct(part.rows.start * length, part.rows.stop * length, *matrices_of(layer)))
        return with_products(output, self._dropped(name, x), products)

    def _dropped(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Returns the input of the LoRA layers ``name``, after the dropout of those that have one."""
        layers = [part.layers.get(name) for part in self._parts]
        if not any(drops(layer) for layer in layers):
            return x
        done = []
        for part, layer, mine in zip(self._parts, layers, x.split(self._rows), strict=True):
            if drops(layer):
                assert layer is not None
                with part.random.drawn(name, again=self._recomputing):
                    own = layer.lora_dropout[ADAPTER_NAME](mine[:, : part.length])
                mine = torch.cat([own, mine[:, part.length :]], dim=1)
            done.append(mine)
        return torch.cat(done)

    def _of_each_run(self, hidden_BLD: torch.Tensor) -> torch.Tensor:
        """Returns what the runs' heads make of their rows, as one row, and notes its shapes."""
        rows = zip(self._parts, hidden_BLD.split(self._rows), strict=True)
        made = outputs_of_several([p.head for p in self._parts], [mine_BLD[:, : p.length] for p, mine_BLD in rows])
        for part, mine in zip(self._parts, made, strict=True):
            part.shape = mine.shape
        return torch.cat([mine.reshape(1, -1, mine.shape[-1]) for mine in made], dim=1)


def check_plain(name: str, layer: Any) -> None:
    """Raises InputError unless the layer computes W x + s B A x."""
    plain = ADAPTER_NAME in layer.lora_A and not layer.lora_variant and not getattr(layer, "parameter_name", None)
    if not (plain and all(isinstance(m, torch.nn.Linear) for m in (*layer.lora_A.values(), *layer.lora_B.values()))):
        raise InputError(
            f"the adapter of {name} is no plain LoRA of a linear layer, and only those can share a base model: leave "
            "it out of adapter.target_modules, or train the runs apart"
        )


def matrices_of(layer: Any) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Returns the scale, A and B of a run's LoRA layer."""
    return layer.scaling[ADAPTER_NAME], layer.lora_A[ADAPTER_NAME].weight, layer.lora_B[ADAPTER_NAME].weight


def drops(layer: Any) -> bool:
    """Returns True if a run's LoRA layer drops elements of its input now."""
    if layer is None or layer.disable_adapters:
        return False
    dropout = layer.lora_dropout[ADAPTER_NAME]
    return dropout.training and getattr(dropout, "p", 0.0) > 0


def parts_of(asked: Sequence[Forward]) -> list[RunRows]:
    found, start = [], 0
    for one in asked:
        found.append(RunRows(slice(start, start + one.rows), one.length, one.layers, one.head, one.random))
        start += one.rows
    return found


def joined(inputs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the arguments of one forward for the rows of several. Rows are padded on the right; each pad has position
    0, and the pads that are added to a row are a sample of their own, which no other token sees."""
    length = max(one["input_ids"].shape[1] for one in inputs)
    made: dict[str, Any] = {
        name: torch.cat([pad(one[name], (0, length - one[name].shape[1])) for one in inputs])
        for name in ("input_ids", "position_ids")
    }
    made["use_cache"] = False
    if PACKED[0] in inputs[0]:
        bounds, longest = joined_bounds([(one["input_ids"].shape, one[PACKED[0]], one[LONGEST[0]]) for one in inputs])
        made |= dict.fromkeys(PACKED, bounds) | dict.fromkeys(LONGEST, longest)
    if BOUNDS in inputs[0]:
        made[BOUNDS] = joined_bounds([(one["input_ids"].shape, *one[BOUNDS]) for one in inputs])
    return made


def joined_bounds(runs: Sequence[tuple[torch.Size, torch.Tensor, int]]) -> tuple[torch.Tensor, int]:
    """Returns the positions at which the samples of several runs begin in the joined, flattened rows, with the end of
    the rows, as int32; and the length of the longest sample. Of each run: the shape [B, L] of its rows, the same
    positions in its own rows, and its longest sample."""
    length, start, found = max(shape[1] for shape, _, _ in runs), 0, []
    for (rows, own), begins, _ in runs:
        places = begins[:-1]
        found.append(start + places // own * length + places % own)
        if own < length:
            found.append(start + torch.arange(rows, device=begins.device, dtype=begins.dtype) * length + own)
        start += rows * length
    ends = torch.tensor([start], dtype=torch.int32, device=runs[0][1].device)
    longest = max(max(most, length - shape[1]) for shape, _, most in runs)
    return torch.cat([torch.cat(found).to(torch.int32).sort().values, ends]), longest
