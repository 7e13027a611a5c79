"""Use of saved artifacts (runs, adapters, models): find, load, generate, inspect, merge."""

from trainer.artifacts.generate import GREEDY, Generator, Sampling
from trainer.artifacts.load import load
from trainer.artifacts.locate import Artifact, ArtifactRef, base_files, find, tokenizer_of

__all__ = ["GREEDY", "Artifact", "ArtifactRef", "Generator", "Sampling", "base_files", "find", "load", "tokenizer_of"]
