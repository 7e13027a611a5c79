"""The base's configuration, read in one way by everything that needs it.

Here it is decided, once for all commands, whether muster takes a base: its configuration can be used, its class is the
one that the task needs, and its weights are stored in a quantisation that goes with the recipe.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import InputError
from trainer.model.files.configs import UNUSABLE, cause
from trainer.model.files.remote_code import check_code
from trainer.recipe.sections.model import ModelSection
from trainer.recipe.tasks import CAUSAL, SEQUENCE

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

KINDS = {CAUSAL: "causal language model", SEQUENCE: "model for sequence classification"}
_MAPPINGS = {CAUSAL: "MODEL_FOR_CAUSAL_LM_MAPPING", SEQUENCE: "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING"}
DEQUANTISED = ("mxfp4", "fp8")
"""The methods whose weights are dequantised while they are read (`trainer.model.dequantise`)."""
UNQUANTISED = "name the unquantised model, and keep it in 4 bits with model.quantization: nf4"


def load_config(section: ModelSection, folder: Path, auto_class: str | None, **settings: Any) -> PreTrainedConfig:
    """Returns the configuration in ``folder``, with ``settings`` in place of its own values.

    Raises InputError when muster cannot take such a base for the transformers class ``auto_class`` (None: for any)."""
    from transformers import AutoConfig

    check_code(section, folder)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            folder, trust_remote_code=section.trust_remote_code, **settings
        )
    except UNUSABLE as e:
        raise InputError(f"model.path {section.path!r} has a config.json that cannot be used: {cause(e)}") from e
    if auto_class is not None:
        _check_class(section, config, auto_class)
    _check_quantization(section, stored_quantization(config))
    return config


def stored_quantization(config: PreTrainedConfig) -> Mapping[str, Any] | None:
    """Returns the settings with which the weights in the files are quantised, None if they are not."""
    stored = next((q for part in _parts(config) if (q := getattr(part, "quantization_config", None)) is not None), None)
    return {} if stored is not None and not isinstance(stored, dict) else stored


def dequantised(config: PreTrainedConfig) -> PreTrainedConfig:
    """Returns a copy of the configuration: that of the model whose stored weights are dequantised, if they are."""
    config = copy.deepcopy(config)
    if is_dequantised(config):
        for part in _parts(config):
            if hasattr(part, "quantization_config"):
                del part.quantization_config
    return config


def is_dequantised(config: PreTrainedConfig) -> bool:
    """Returns True if the stored weights are quantised, and dequantised while they are read."""
    return (stored_quantization(config) or {}).get("quant_method") in DEQUANTISED


def is_packed(config: PreTrainedConfig) -> bool:
    """Returns True if the stored weights are quantised, and stay so in memory."""
    return stored_quantization(config) is not None and not is_dequantised(config)


def _parts(config: PreTrainedConfig) -> tuple[Any, Any]:
    return config, config.get_text_config()


def _check_class(section: ModelSection, config: PreTrainedConfig, auto_class: str) -> None:
    import transformers

    kind, own = config.model_type, getattr(config, "auto_map", None) or {}
    holds = f"model.path {section.path!r} holds a {kind!r} model"
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(
            f"{holds}, which is no {KINDS[auto_class]} but an encoder with a decoder: name a model that is one stack "
            "of layers"
        )
    if type(config) not in getattr(transformers, _MAPPINGS[auto_class]) and auto_class not in own:
        names = getattr(config, "architectures", None)
        classes = f" ({', '.join(map(str, names[:2]))})" if isinstance(names, list) and names else ""
        raise InputError(
            f"{holds}{classes}, which is no {KINDS[auto_class]}: name one of a family for which transformers "
            f"has a class that ends in {auto_class.removeprefix('AutoModel')}"
        )
    # transformers builds a language model from an encoder too, in which a token sees those after it.
    if auto_class == CAUSAL and hasattr(config, "add_cross_attention") and not getattr(config, "is_decoder", True):
        raise InputError(
            f"{holds}, which is no {KINDS[auto_class]} but an encoder, whose tokens see those after them: name a "
            "decoder, or use task: classification"
        )


def _check_quantization(section: ModelSection, stored: Mapping[str, Any] | None) -> None:
    if stored is None:
        return
    method, holds = stored.get("quant_method"), f"model.path {section.path!r} holds weights that"
    if method == "bitsandbytes" or stored.get("load_in_4bit") or stored.get("load_in_8bit"):
        kind = str(stored.get("bnb_4bit_quant_type", "fp4")) if stored.get("load_in_4bit") else "int8"
        if kind not in ("nf4", "int8"):
            raise InputError(f"{holds} bitsandbytes has packed as {kind}, which muster does not train: {UNQUANTISED}")
        if section.quantization != kind:
            raise InputError(
                f"{holds} bitsandbytes has packed as {kind}, and model.quantization is {section.quantization}: set "
                f"model.quantization: {kind} (--quantization {kind} for a command), or name the unquantised model"
            )
    elif method not in DEQUANTISED:
        named = f"are quantised by {str(method)[:80]!r}" if method else "have a quantization_config without a method"
        raise InputError(f"{holds} {named}, which muster does not train: {UNQUANTISED}")
    elif odd := next((f"{n} {stored[n]!r}" for n, only in _ONLY.items() if stored.get(n, only) != only), None):
        raise InputError(
            f"{holds} are quantised by {method!r} with {odd[:80]}, which muster does not read: {UNQUANTISED}"
        )


_ONLY = {"scale_fmt": "float", "expert_dtype": "fp8"}
"""The settings of fp8 that are read; other ones store scales, or experts, in another type."""
