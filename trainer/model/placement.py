"""The devices of a model that is not trained: one device, or several, over which accelerate spreads the model.

accelerate fills GPUs first, then the host's memory, then a folder on its disk. A layer's weights are copied to the
device that computes it, and freed there afterwards.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.errors import InputError
from trainer.experts import expert_weights
from trainer.model.base_config import load_config
from trainer.model.files.configs import UNUSABLE, cause
from trainer.recipe.sections.model import ModelSection

GPU_SHARE, HOST_SHARE = 0.85, 0.8
"""The shares of free memory that weights may take; the rest is for activations."""
PACKED_BYTES = {"nf4": 0.6, "int8": 1.1}
"""Bytes per quantised parameter, with its quantisation state."""


@dataclass(frozen=True)
class Placement:
    """The whole model on ``device``; with ``limits`` (bytes by device: a GPU's number, or ``cpu``) over several GPUs.

    With ``disk``, a folder, it is also spread over the host's memory and disk, and computed on ``device``."""

    device: torch.device
    limits: Mapping[int | str, int] | None = None
    disk: str | None = None

    @classmethod
    def on(cls, device: torch.device | str) -> Placement:
        return cls(torch.device(device))

    def for_model(self) -> dict[str, Any]:
        """Returns the placement as arguments of transformers' ``from_pretrained``."""
        assert self.disk is None, "spread by trainer.model.offload"
        if self.limits is None:
            return {"device_map": {"": self.device}}
        return {"device_map": "auto", "max_memory": dict(self.limits)}


@contextmanager
def placement_for(
    section: ModelSection, folder: Path, limits: Mapping[int | str, int] | None = None
) -> Iterator[Placement]:
    """Yields one device if the model in ``folder`` fits there, else a spread. ``limits`` replaces the free memory.

    Raises InputError when a quantised model does not fit on the GPUs."""
    free = dict(limits) if limits is not None else free_bytes()
    gpus: dict[int | str, int] = {device: room for device, room in free.items() if isinstance(device, int)}
    first, size = next(iter(free)), model_bytes(section, folder)
    device = torch.device("cuda", first) if isinstance(first, int) else torch.device("cpu")
    if size <= free[first]:
        yield Placement(device)
    elif size <= sum(gpus.values()):
        yield Placement(device, gpus)
    elif section.quantization != "none":
        raise InputError(
            f"{section.path} takes about {size / 2**30:.1f} GiB in {section.quantization}, more than the free memory, "
            "and quantised weights cannot be kept on the disk: use --quantization none"
        )
    else:
        with tempfile.TemporaryDirectory(prefix="muster-weights-") as disk:
            yield Placement(device, free, disk)


def free_bytes() -> dict[int | str, int]:
    """Returns the bytes that weights may take on each device, the fastest device first."""
    import psutil

    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    free: dict[int | str, int] = {gpu: int(torch.cuda.mem_get_info(gpu)[0] * GPU_SHARE) for gpu in gpus}
    return free | {"cpu": int(psutil.virtual_memory().available * HOST_SHARE)}


def model_bytes(section: ModelSection, folder: Path) -> int:
    """Estimates the bytes of the model's weights in memory, from a model without weights."""
    from transformers import AutoModel

    config = load_config(section, folder, None)
    try:
        with torch.device("meta"):
            model: Any = AutoModel.from_config(config, trust_remote_code=section.trust_remote_code)
    except (*UNUSABLE, RuntimeError) as error:
        raise InputError(f"model.path {section.path!r} cannot be loaded: {cause(error)}") from error
    width = getattr(torch, section.dtype).itemsize
    packed = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    packed += sum(weight.shape.numel() for weight in expert_weights(model).values())
    rest = sum(p.numel() for p in model.parameters()) - packed
    tied = getattr(config.get_text_config(), "tie_word_embeddings", False)
    head = 0 if tied else model.get_input_embeddings().weight.numel()
    return int(packed * PACKED_BYTES.get(section.quantization, width) + (rest + head) * width)
