"""The optimizers, with the properties of each one, and the schedules of the learning rate.

A strategy that shards gives an optimizer parts of the parameters. What it can be given is in its row, and the rules
between optimizers and strategies follow from that.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from trainer.errors import InputError
from trainer.registry import CODE, Choice, Registry, load_code

BYTES = 4
"""Of a float32 value."""


@dataclass(frozen=True)
class Blocks:
    """The form of a state that is quantised block by block.

    ``bits``: per element; there is one float32 scale for each ``size`` elements. ``smallest``: tensors with fewer
    elements keep a float32 state. ``full_only``: so do tensors that do not divide into complete blocks."""

    bits: int
    size: int
    smallest: int = 4096
    full_only: bool = False

    def bytes_of(self, elements: int) -> int:
        """Returns the bytes of one moment of a tensor."""
        if elements < self.smallest or (self.full_only and elements % self.size):
            return BYTES * elements
        return elements * self.bits // 8 + BYTES * -(-elements // self.size)


@dataclass(frozen=True)
class OptimizerRow(Choice):
    """An optimizer's row. ``code``: its class, or a function of parameter groups and settings that returns one.

    ``library``: the package that has it, if that is none of muster's own. ``fixed``: arguments that belong to the name.
    ``uses``: the fields of the recipe's section that have an effect, each with its default. ``codec``: the class that
    reads and writes its state if that is not one tensor per moment.

    ``holds``: the form of the parameters that it takes under fsdp: ``any`` (sharded tensors of torch), ``shards``
    (plain tensors that contain a rank's elements), ``matrices`` (the matrices of the decoder layers complete, others
    in any form) or ``complete``. ``elementwise``: an element's update depends on no other element, so that it takes any
    part of a parameter. ``averages``: it trains at one point and keeps the averaged weights at another, and counts its
    steps for a group of parameters.

    ``moments``: tensors of state with the size of the parameter; ``factored``: rows and columns of a matrix in place of
    them. ``blocks``: their form if they are quantised. ``paged``: the driver moves its state from the GPU to the host
    when the GPU is full. ``capability``: the lowest CUDA capability of a GPU that it runs on."""

    library: str = ""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    uses: Mapping[str, Any] = field(default_factory=dict)
    codec: str = ""
    holds: Literal["any", "shards", "matrices", "complete"] = "any"
    elementwise: bool = True
    averages: bool = False
    moments: int = 2
    factored: bool = False
    blocks: Blocks | None = None
    paged: bool = False
    capability: tuple[int, int] | None = None
    named_by_user: bool = False

    @property
    def quantised(self) -> bool:
        return self.blocks is not None

    @property
    def bytes_per_element(self) -> float:
        """Bytes of state for an element of a large matrix in a decoder layer, without scales."""
        if self.factored:
            return 0.0
        moments = 1 if self.holds == "matrices" else self.moments
        return moments * (self.blocks.bits / 8 if self.blocks else BYTES)

    def state_bytes(self, shape: tuple[int, ...], elements: int, *, in_layer: bool) -> int:
        """Returns the bytes of state for ``elements`` of a parameter of this shape, without step counters."""
        matrix = len(shape) > 1
        if self.factored and matrix:  # a value for each row here, and one for each column
            return BYTES * (elements // shape[-1] + math.prod(shape[:-2]) * shape[-1]) if elements else 0
        moments = 1 if self.holds == "matrices" and in_layer and len(shape) == 2 else self.moments
        return moments * (self.blocks.bytes_of(elements) if self.blocks else BYTES * elements)

    def load(self) -> Any:
        """Imports the optimizer. Raises InputError if its library is not installed, or if it cannot be imported."""
        return load_code("optimizer.name", self.code) if self.named_by_user else _loaded(self.code, self.library)

    def load_codec(self) -> Any:
        """Returns the codec of its state; None if there is none."""
        return _loaded(self.codec, self.library)() if self.codec else None

    def against_zero(self) -> str | None:
        """Returns the reason for which it does not work under ZeRO; None if it does."""
        if self.named_by_user:
            return "is known by its name only, and ZeRO gives an optimizer flat parts of several parameters"
        if self.quantised:
            return "quantises its state in blocks, which would lie across the parts that ZeRO cuts"
        if self.paged:
            return "moves its state to the host by itself, which ZeRO does by strategy.deepspeed"
        if not self.elementwise:
            return "updates complete matrices, and ZeRO gives an optimizer flat parts of parameters"
        if self.averages:
            return "switches between two sets of weights, and ZeRO keeps copies that it cannot switch"
        return None


def _loaded(code: str, library: str) -> Any:
    if library and importlib.util.find_spec(library) is None:
        raise InputError(f"optimizer.name needs {library}, which is not installed: pip install {library}")
    module, attribute = code.split(":")
    return getattr(importlib.import_module(module), attribute)


DECAY = {"weight_decay": 0.0}
ADAM = {**DECAY, "betas": (0.9, 0.999), "eps": 1e-8}
LION = {**DECAY, "betas": (0.9, 0.99)}
BITSANDBYTES: dict[str, Any] = {
    "codec": "trainer.optim.codecs:Bitsandbytes",
    "holds": "shards",
    "fixed": {"args": None},
}
BLOCKS_OF_BITSANDBYTES = Blocks(8, 256)
TORCHAO: dict[str, Any] = {"library": "torchao", "holds": "shards", "uses": ADAM}
OF_8BIT: dict[str, Any] = {**BITSANDBYTES, "uses": ADAM, "blocks": BLOCKS_OF_BITSANDBYTES}
OF_LION: dict[str, Any] = {**BITSANDBYTES, "uses": LION, "moments": 1}

OPTIMIZERS = Registry(
    "optimizer",
    {
        "adamw": OptimizerRow("torch.optim:AdamW", uses=ADAM),
        "adamw_fused": OptimizerRow("torch.optim:AdamW", uses=ADAM, fixed={"fused": True}),
        "adamw_8bit": OptimizerRow(
            "bitsandbytes.optim.adamw:AdamW8bit", **OF_8BIT | {"fixed": {"args": None, "is_paged": False}}
        ),
        "paged_adamw_8bit": OptimizerRow("bitsandbytes.optim.adamw:PagedAdamW8bit", **OF_8BIT, paged=True),
        "paged_adamw_32bit": OptimizerRow(
            "bitsandbytes.optim.adamw:PagedAdamW32bit", **BITSANDBYTES, uses=ADAM, paged=True
        ),
        "adamw_torchao_8bit": OptimizerRow(
            "torchao.optim:AdamW8bit",
            **TORCHAO,
            codec="trainer.optim.codecs:Torchao8bit",
            blocks=Blocks(8, 256, full_only=True),
        ),
        "adamw_torchao_4bit": OptimizerRow(
            "torchao.optim:AdamW4bit",
            **TORCHAO,
            codec="trainer.optim.codecs:Torchao4bit",
            blocks=Blocks(4, 128, full_only=True),
        ),
        "adamw_torchao_fp8": OptimizerRow(
            "torchao.optim:AdamWFp8",
            **TORCHAO,
            codec="trainer.optim.codecs:TorchaoFp8",
            blocks=Blocks(8, 256, full_only=True),
            capability=(8, 9),
        ),
        "schedule_free_adamw": OptimizerRow(
            "schedulefree:AdamWScheduleFree",
            library="schedulefree",
            uses=ADAM,
            fixed={"warmup_steps": 0},
            averages=True,
        ),
        "adafactor": OptimizerRow(
            "torch.optim:Adafactor", uses=DECAY, holds="complete", elementwise=False, moments=1, factored=True
        ),
        "muon": OptimizerRow(
            "trainer.optim.muon:MuonWithAdamW", uses={**ADAM, "momentum": 0.95}, holds="matrices", elementwise=False
        ),
        "lion": OptimizerRow(
            "bitsandbytes.optim.lion:Lion", **OF_LION | {"fixed": {"args": None, "optim_bits": 32, "is_paged": False}}
        ),
        "lion_8bit": OptimizerRow(
            "bitsandbytes.optim.lion:Lion8bit",
            **OF_LION | {"fixed": {"args": None, "is_paged": False}},
            blocks=BLOCKS_OF_BITSANDBYTES,
        ),
        "paged_lion_8bit": OptimizerRow(
            "bitsandbytes.optim.lion:PagedLion8bit", **OF_LION, blocks=BLOCKS_OF_BITSANDBYTES, paged=True
        ),
        "sgd": OptimizerRow("torch.optim:SGD", uses={**DECAY, "momentum": 0.9}, moments=1),
    },
    also={
        "adamw_torch": "adamw",
        "adamw_torch_fused": "adamw_fused",
        "adamw_bnb_8bit": "adamw_8bit",
        "adamw8bit": "adamw_8bit",
        "paged_adamw8bit": "paged_adamw_8bit",
        "paged_adamw": "paged_adamw_32bit",
        "adamw_torch_8bit": "adamw_torchao_8bit",
        "ao_adamw_8bit": "adamw_torchao_8bit",
        "adamw_torch_4bit": "adamw_torchao_4bit",
        "ao_adamw_4bit": "adamw_torchao_4bit",
        "ao_adamw_fp8": "adamw_torchao_fp8",
        "lion_32bit": "lion",
    },
    group="muster.optimizers",
    held=OptimizerRow(""),
)


def optimizer_row(name: str) -> OptimizerRow:
    """Returns the row of a name, or that of ``module:Attribute``."""
    if CODE.fullmatch(name):
        return OptimizerRow(name, named_by_user=True, uses={"weight_decay": 0.0})
    return OPTIMIZERS[name]


@dataclass(frozen=True)
class ScheduleRow(Choice):
    """A schedule's row. Its code is a function of the place in the run and the recipe's section, which returns the
    factor of the learning rate after the warm-up, from 1 to 0. ``settings``: the fields of the section that have an
    effect on it, besides the warm-up. ``spans_run``: the rate of a step depends on the length of the run."""

    settings: tuple[str, ...] = ("min_lr_ratio",)
    spans_run: bool = True


SCHEDULES = Registry(
    "schedule",
    {
        "constant": ScheduleRow("trainer.optim.schedules:constant", (), spans_run=False),
        "linear": ScheduleRow("trainer.optim.schedules:linear"),
        "cosine": ScheduleRow("trainer.optim.schedules:cosine", ("min_lr_ratio", "cycles")),
        "wsd": ScheduleRow("trainer.optim.schedules:wsd", ("min_lr_ratio", "decay_ratio", "decay_shape")),
        "inverse_sqrt": ScheduleRow("trainer.optim.schedules:inverse_sqrt", (), spans_run=False),
        "polynomial": ScheduleRow("trainer.optim.schedules:polynomial", ("min_lr_ratio", "power")),
    },
    also={"constant_with_warmup": "constant", "warmup_stable_decay": "wsd"},
    group="muster.schedules",
    held=ScheduleRow(""),
)
