"""What training has saved, in use: found by its address, loaded, asked, described, merged."""

from trainer.saved.generation import GREEDY, Sampling, Writer
from trainer.saved.loading import load
from trainer.saved.subject import Address, Subject, base_files, find, tokenizer_of

__all__ = ["GREEDY", "Address", "Sampling", "Subject", "Writer", "base_files", "find", "load", "tokenizer_of"]
