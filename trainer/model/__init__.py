"""The base model: its files brought to this host, its tokenizer, and the module built from them."""

from trainer.model.build import Loaded, build
from trainer.model.files import ModelFiles, fetch_model
from trainer.model.head import Head, save_head_config
from trainer.model.isolation import check_isolation
from trainer.model.tokenizer import load_tokenizer
from trainer.model.weights import check_weights

__all__ = [
    "Head",
    "Loaded",
    "ModelFiles",
    "build",
    "check_isolation",
    "check_weights",
    "fetch_model",
    "load_tokenizer",
    "save_head_config",
]
