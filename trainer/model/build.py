"""Builds the base model that a rank trains on: quantised or not, on the rank's device, ready for an adapter.

Trainable parameters are kept in float32 (the optimizer's updates are too small for bfloat16); the forward runs in the
recipe's dtype (`trainer.precision`). Frozen parameters are kept in that dtype, or packed by bitsandbytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trainer.errors import InputError
from trainer.experts import expert_weights
from trainer.fast_imports import load_libraries
from trainer.model.base_config import is_dequantised, load_config, stored_quantization
from trainer.model.dequantise import dequantised_weights
from trainer.model.files.configs import UNUSABLE, cause
from trainer.model.files.weight_check import wrong_shapes
from trainer.model.files.weight_source import WeightSource
from trainer.model.head import Head, head_modules, is_head, set_up_head, take_tied_embeddings
from trainer.model.meta import NeedsFullLoad, add_generation_config, from_config, meta_model
from trainer.model.peak_rss import HostPeak
from trainer.model.placement import Placement
from trainer.model.quantization import check_packed, keep_weights_packed, plain_subclasses, quantization_config
from trainer.model.sharded_load import ShardLoader
from trainer.recipe.sections.model import ModelSection

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class LoadedModel:
    """``bytes_read``: size of the weight files; ``peak_host_bytes``: rise of the process's memory to its peak."""

    model: PreTrainedModel
    bytes_read: int
    peak_host_bytes: int


def build(
    section: ModelSection,
    folder: Path,
    where: torch.device | Placement,
    *,
    full: bool,
    checkpointing: bool,
    head: Head | None = None,
) -> LoadedModel:
    """Loads the causal LM in ``folder`` whole, or the sequence classifier if ``head`` is given.

    ``full``: all parameters are trainable; else only those of the head. ``where``: a device, or a placement over
    several devices for a model that is not trained. Raises InputError when transformers cannot load such a model.
    """
    load_libraries()
    host = HostPeak()
    dtype = torch.float32 if full else getattr(torch, section.dtype)
    placement = where if isinstance(where, Placement) else Placement(where)
    read = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    if section.quantization != "none":
        streamed = _load_streamed(section, folder, placement, checkpointing, head)
        if streamed is not None:
            return LoadedModel(streamed, read, host.bytes())
    model, missing = _load_whole(section, folder, placement, dtype, head)
    keep_weights_packed(model)
    if section.quantization != "none":
        check_packed(model, section, head_modules(model) if head else None)
        _unmap_files(model)
    model.requires_grad_(full)
    if head:
        set_up_head(model, head, missing)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return LoadedModel(model, read, host.bytes())


def _load_streamed(
    section: ModelSection, folder: Path, placement: Placement, checkpointing: bool, head: Head | None
) -> Any:
    """Returns the model if transformers alone would not quantise all of it: with experts, or with layers of a subclass
    of ``nn.Linear``. It is quantised while it is read, so that it never takes more memory. Returns None for others."""
    import transformers

    auto = transformers.AutoModelForSequenceClassification if head else transformers.AutoModelForCausalLM
    config = load_config(section, folder, auto.__name__, **(head.settings() if head else {}))
    plain = section.model_copy(update={"quantization": "none"})
    layout = from_config(plain, config, full=False, checkpointing=False, auto_class=auto)
    experts, layers = expert_weights(layout), plain_subclasses(layout)
    if not experts and not layers:
        return None
    what = "experts" if experts else f"layers of {type(layers[0]).__name__}"
    if section.quantization == "int8":
        from_config(section, config, full=False, checkpointing=False, auto_class=auto)  # refuses experts
        return None
    if placement.limits is not None:
        raise InputError(
            f"the {what} of {section.path!r} in nf4 are not spread over several GPUs; use one that holds all"
        )
    with closing(WeightSource(str(folder))) as source:
        try:
            base: Any = meta_model(
                section, folder, placement.device, full=False, checkpointing=checkpointing, head=head
            )
            ShardLoader(base, source, section.path, placement.device, head).fill_base()
        except NeedsFullLoad as reason:
            raise InputError(f"the {what} of {section.path!r} cannot be quantised to nf4: {reason}") from reason
    return base


@torch.no_grad()
def _unmap_files(model: torch.nn.Module) -> None:
    # On a CPU, an unquantised parameter is a view of its file, which keeps the whole file mapped.
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and not hasattr(parameter, "quant_state") and not hasattr(parameter, "CB"):
            parameter.data = parameter.data.clone()


def _load_whole(
    section: ModelSection, folder: Path, placement: Placement, dtype: torch.dtype, head: Head | None
) -> tuple[Any, set[str]]:
    """Returns the model, and the names of the head's parameters that are not in the files."""
    import transformers
    from safetensors import SafetensorError

    auto = transformers.AutoModelForSequenceClassification if head else transformers.AutoModelForCausalLM
    config = load_config(section, folder, auto.__name__, **(head.settings() if head else {}))
    source: dict[str, Any] = {"pretrained_model_name_or_path": folder, **(head.settings() if head else {})}
    if is_dequantised(config):
        auto, source = _dequantised(section, folder, config, dtype, auto)
    loaded: Any
    try:
        loaded = auto.from_pretrained(
            **source,
            output_loading_info=True,
            dtype=dtype,
            quantization_config=quantization_config(section, _unquantised(section, folder) if head else None),
            **placement.for_model(),
            trust_remote_code=section.trust_remote_code,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # `_check_complete` names them; transformers' own error does not
        )
    except (*UNUSABLE, SafetensorError) as e:
        raise InputError(f"model.path {section.path!r} cannot be loaded as a {_kind(head)}: {cause(e)}") from e
    except RuntimeError as e:
        if "negative dimension" not in str(e):  # any other may be a fault of this host: memory, a driver
            raise
        raise InputError(f"model.path {section.path!r} has a config.json that cannot be used: {cause(e)}") from e
    model, loading = loaded
    if "state_dict" in source:
        model.name_or_path = str(folder)
        add_generation_config(model, folder)
    unlike = {name: shapes for name, *shapes in loading["mismatched_keys"]}
    lacking = set(loading["missing_keys"]) | set(unlike)
    if head and model.config.get_text_config().tie_word_embeddings:
        lacking -= take_tied_embeddings(model, folder, lacking)
    drawn = {name for name in lacking if head and is_head(model, name)}
    _check_complete(section.path, {n: s for n, s in unlike.items() if n not in drawn}, lacking - drawn, _kind(head))
    return model, drawn


def _dequantised(
    section: ModelSection, folder: Path, config: PreTrainedConfig, dtype: torch.dtype, auto: Any
) -> tuple[Any, dict[str, Any]]:
    """Returns the model's class, and arguments for its ``from_pretrained``: its weights, dequantised on the host."""
    plain = section.model_copy(update={"quantization": "none"})
    blank = from_config(plain, config, full=False, checkpointing=False, auto_class=auto)
    weights = dequantised_weights(folder, stored_quantization(config), section.path, dtype)
    return type(blank), {"pretrained_model_name_or_path": None, "config": blank.config, "state_dict": weights}


def _kind(head: Head | None) -> str:
    return "sequence classifier" if head else "causal language model"


def _unquantised(section: ModelSection, folder: Path) -> list[str] | None:
    """Returns the names of the head's modules, from a model without weights; None without quantisation."""
    from transformers import AutoModelForSequenceClassification

    if section.quantization == "none":
        return None
    config = load_config(section, folder, AutoModelForSequenceClassification.__name__)
    with torch.device("meta"):
        return head_modules(
            AutoModelForSequenceClassification.from_config(config, trust_remote_code=section.trust_remote_code)
        )


def _check_complete(path: str, unlike: Mapping[str, Any], missing: set[str], kind: str) -> None:
    """Raises InputError for missing weights and for ``unlike``: by name, the stored shape and the expected one."""
    # transformers only warns, and draws these weights at random: differently on every rank.
    if unlike:
        name, (stored, wanted) = min(unlike.items())
        raise wrong_shapes(path, len(unlike), name, stored, wanted)
    if missing:
        raise InputError(
            f"model.path {path!r} lacks {len(missing)} weights of a {kind} ({', '.join(sorted(missing)[:3])}); "
            "name a complete checkpoint"
        )
