"""What training has saved, in use: found by its address, loaded, asked, described, merged."""

from trainer.artifacts.generate import GREEDY, Sampling, Writer
from trainer.artifacts.load import load
from trainer.artifacts.locate import Address, Subject, base_files, find, tokenizer_of

__all__ = ["GREEDY", "Address", "Sampling", "Subject", "Writer", "base_files", "find", "load", "tokenizer_of"]
