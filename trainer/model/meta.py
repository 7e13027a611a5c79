"""The base model without its weights: every parameter on the meta device, built from ``config.json`` alone.

Packed weights and their quantisation state are on the meta device too, with the shapes and types that loading gives
them. Buffers that no file holds (rotary frequencies) get their real values: they are small, and wrapping and
materialising the model leave them unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trainer.errors import InputError
from trainer.experts import expert_weights, pack_experts
from trainer.fast_imports import load_libraries
from trainer.model.base_config import dequantised, load_config, stored_quantization
from trainer.model.files.configs import UNUSABLE, cause
from trainer.model.head import Head, head_modules
from trainer.model.quantization import check_packed, keep_weights_packed, plain_subclasses, quantization_config
from trainer.nf4 import quantise_4bit
from trainer.recipe.sections.model import ModelSection

if TYPE_CHECKING:
    from transformers import PreTrainedModel

META = torch.device("meta")


class NeedsFullLoad(Exception):
    """The model cannot be loaded in shards; ``str`` gives the reason."""


def meta_model(
    section: ModelSection,
    folder: Path,
    device: torch.device,
    *,
    full: bool,
    checkpointing: bool,
    auto_class: Any = None,
    head: Head | None = None,
) -> PreTrainedModel:
    """Builds the model of `trainer.model.build` with its parameters on the meta device, computed buffers on ``device``.

    ``auto_class``: one of transformers' auto classes instead of AutoModelForCausalLM; with a ``head``, the sequence
    classifier. Raises InputError for a configuration that transformers cannot use, NeedsFullLoad when a buffer has a
    value only after the model is loaded whole.
    """
    load_libraries()
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    auto = AutoModelForSequenceClassification if head else auto_class or AutoModelForCausalLM
    config = load_config(section, folder, auto.__name__, **(head.settings() if head else {}))
    model = from_config(section, config, full=full, checkpointing=checkpointing, auto_class=auto)
    add_generation_config(model, folder)
    _compute_buffers(model, device)
    return model


def move_buffers(model: torch.nn.Module, device: torch.device) -> None:
    """Moves the buffers that an adapter has added to a `meta_model`; they are small, and not on the meta device."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)


def from_config(
    section: ModelSection, config: Any, *, full: bool, checkpointing: bool, auto_class: Any = None
) -> PreTrainedModel:
    """Builds the model from a loaded configuration, buffers on the meta device too. Raises InputError like
    `meta_model`. Its ``stored_quantization`` is the one of the base's files."""
    load_libraries()
    from transformers import AutoModelForCausalLM

    stored, config = stored_quantization(config), dequantised(config)  # a copy: quantising writes into it
    dtype = torch.float32 if full else getattr(torch, section.dtype)
    auto = auto_class or AutoModelForCausalLM
    with _as_input_error(section, classifier="SequenceClassification" in auto.__name__), META:
        model: PreTrainedModel = auto.from_config(config, dtype=dtype, trust_remote_code=section.trust_remote_code)
    object.__setattr__(model, "stored_quantization", stored)
    _keep_wide(model, dtype)
    if section.quantization != "none":
        classifier = type(model).__name__.endswith("ForSequenceClassification")
        with _as_input_error(section, classifier=classifier):
            _quantise(model, section, dtype, head_modules(model) if classifier else None)
    model.requires_grad_(full)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.eval()
    return model


@contextmanager
def _as_input_error(section: ModelSection, *, classifier: bool) -> Iterator[None]:
    kind = "sequence classifier" if classifier else "causal language model"
    try:
        yield
    except (*UNUSABLE, RuntimeError) as e:
        raise InputError(f"model.path {section.path!r} cannot be loaded as a {kind}: {cause(e)}") from e


def add_generation_config(model: Any, folder: Path) -> None:
    from transformers import GenerationConfig

    if model.can_generate() and (folder / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder)
        except UNUSABLE as error:
            raise InputError(f"generation_config.json of {folder} cannot be used: {cause(error)}") from error


def _keep_wide(model: Any, dtype: torch.dtype) -> None:
    """Casts to float32 the weights that an architecture keeps in it whatever the dtype is (normalisation, routers)."""
    from transformers.core_model_loading import build_glob_alternation

    plan = model._get_dtype_plan(dtype)
    if not plan:
        return
    wide, _, _ = build_glob_alternation(list(plan))
    for name, parameter in model.named_parameters():
        if wide.search(name):
            parameter.data = parameter.data.to(torch.float32)


def _quantise(model: Any, section: ModelSection, dtype: torch.dtype, skipped: list[str] | None) -> None:
    """Replaces the linear layers with transformers' own code; for nf4, their weights and the experts are packed."""
    from transformers.modeling_utils import local_torch_dtype
    from transformers.quantizers.auto import get_hf_quantizer

    for layer in plain_subclasses(model):
        layer.__class__ = torch.nn.Linear  # the only class that bitsandbytes replaces
    quantizer, _, device_map = get_hf_quantizer(
        model.config, quantization_config(section, skipped), {"": torch.device("cpu")}, True, {}
    )
    with META, local_torch_dtype(dtype, type(model).__name__):  # the dtype of the new layers' biases
        quantizer.preprocess_model(model=model, dtype=dtype, device_map=device_map)
    quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer
    keep_weights_packed(model)
    if section.quantization == "nf4":
        for module in four_bit_layers(model).values():
            pack(module, torch.empty(module.out_features, module.in_features, dtype=dtype, device=META))
        for weight in expert_weights(model).values():
            pack_experts(weight.owner, weight.attribute, dtype)
    check_packed(model, section, skipped)


def four_bit_layers(model: torch.nn.Module) -> dict[str, Any]:
    from bitsandbytes.nn import Linear4bit

    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def pack(module: Any, unpacked: torch.Tensor) -> None:
    """Quantises ``unpacked`` [out, in] into a 4-bit layer's weight, on that tensor's device (meta included)."""
    from bitsandbytes.nn import Params4bit

    old = module.weight
    packed, state = quantise_4bit(unpacked, old.quant_storage)
    module.weight = Params4bit(
        packed,
        requires_grad=False,
        quant_state=state,
        blocksize=old.blocksize,
        compress_statistics=old.compress_statistics,
        quant_type=old.quant_type,
        quant_storage=old.quant_storage,
        module=module,
        bnb_quantized=True,
    )
    module.quant_state = state


def _compute_buffers(model: Any, device: torch.device) -> None:
    """Computes the buffers that are not in the model's files, with the model's code, as transformers does after
    loading."""
    for name, module in model.named_modules():
        buffers = [b for b in module._non_persistent_buffers_set if module._buffers.get(b) is not None]
        if not buffers:
            continue
        # Computed from two different initial values: a buffer that the model does not write differs afterwards.
        found = [_computed(_owner(model, name), module, buffers, device, fill) for fill in (0, 1)]
        for buffer in buffers:
            if not torch.equal(found[0][buffer], found[1][buffer]):
                raise NeedsFullLoad(f"its buffer {name}.{buffer} is in no file, and nothing computes it")


@torch.no_grad()
def _computed(
    owner: Any, module: torch.nn.Module, buffers: list[str], device: torch.device, fill: int
) -> dict[str, torch.Tensor]:
    for name in buffers:
        like = module._buffers[name]
        assert like is not None
        module._buffers[name] = torch.full(like.shape, fill, dtype=like.dtype, device=device)
    owner._init_weights(module)
    return {name: module.get_buffer(name) for name in buffers}


def _owner(model: Any, name: str) -> Any:
    """Returns the innermost (sub)model of the module ``name``, which has the code that initialises it."""
    from transformers import PreTrainedModel

    path = name.split(".") if name else []
    for length in range(len(path), -1, -1):
        module = model.get_submodule(".".join(path[:length]))
        if isinstance(module, PreTrainedModel):
            return module
    return model
