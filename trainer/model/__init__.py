"""The base model: its files brought to this host, its tokenizer, and the module built from them."""

from trainer.model.build import LoadedModel, build
from trainer.model.files.fetch import ModelFiles, fetch_model
from trainer.model.files.tokenizer import load_tokenizer
from trainer.model.files.weight_check import check_weights
from trainer.model.head import Head, save_head_config
from trainer.model.kernels.packing_check import check_isolation, check_left_to_right, check_tiles

__all__ = [
    "Head",
    "LoadedModel",
    "ModelFiles",
    "build",
    "check_isolation",
    "check_left_to_right",
    "check_tiles",
    "check_weights",
    "fetch_model",
    "load_tokenizer",
    "save_head_config",
]
