"""The base model: its files brought to this host, its tokenizer, and the module built from them."""

from trainer.model.build import Loaded, build
from trainer.model.files import ModelFiles, fetch_model
from trainer.model.tokenizer import load_tokenizer

__all__ = ["Loaded", "ModelFiles", "build", "fetch_model", "load_tokenizer"]
