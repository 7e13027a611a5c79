"""Models and data of `benchmarks/throughput.py`: Llamas with random weights, and rows of given numbers of tokens.

The tokenizer knows the words w0, w1, … and nothing else, so that a text of n words has n tokens in every library.

Lengths, in tokens:

- ``gsm8k``: log-normal, fitted to GSM8K's words (`benchmarks.synthetic`), at 1.74 tokens a word, as made-up rows with
  its lengths have them under a vocabulary of 4 k: prompts of 78 in the mean, answers of 89.
- ``chat``: log-normal with a median of 250 and a deviation of 0.9, cut to 50 to 1500; 340 in the mean, half targets.
- ``quarter``: log-normal with a median of 200 and a deviation of 0.5; a quarter of the tokens are targets.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.synthetic import CORRELATION, DEVIATION, MEAN
from launcher.quickstart.model import LlamaShape

TOKENS_PER_WORD = 1.74
BOS, EOS, UNK, PAD = "<s>", "</s>", "<unk>", "<pad>"
POSITIONS = 2048
SMALL = LlamaShape(positions=POSITIONS)
"""The quickstart's, with room for longer samples."""


def hundred_million(vocabulary: int) -> LlamaShape:
    """50 M parameters in the layers, and embeddings and a head of 25 M each at a vocabulary of 32 k."""
    return LlamaShape(768, 8, 12, 4, 2048, vocabulary, POSITIONS)


@dataclass(frozen=True)
class Case:
    """``length``: of a pack, and of what is longer; ``packs``: per forward pass and step of whoever packs;
    ``rows``: of whoever pads, chosen to fill about as many places. ``warm`` steps of ``steps`` are not counted."""

    shape: LlamaShape
    lengths: str
    length: int
    packs: int
    rows: int
    warm: int
    steps: int
    samples: int


MODELS = {"small": SMALL, "100m-32k": hundred_million(32_000), "100m-128k": hundred_million(128_000)}
CASES = {
    "small-gsm8k": Case(SMALL, "gsm8k", 1024, 2, 8, 6, 26, 1600),
    "small-chat": Case(SMALL, "chat", 1536, 2, 8, 4, 18, 900),
    "100m-32k": Case(MODELS["100m-32k"], "quarter", 1024, 1, 4, 1, 4, 300),
    "100m-128k": Case(MODELS["100m-128k"], "quarter", 1024, 1, 4, 1, 4, 300),
}


def lengths(kind: str, rng: np.random.Generator, count: int) -> Iterator[tuple[int, int]]:
    """Tokens of ``count`` prompts, with the BOS, and of their completions, with the EOS."""
    if kind == "gsm8k":
        covariance = np.array([[1, CORRELATION], [CORRELATION, 1]]) * np.outer(DEVIATION, DEVIATION)
        drawn = np.exp(rng.multivariate_normal(MEAN + math.log(TOKENS_PER_WORD), covariance, count))
        yield from ((max(4, round(p)), max(4, round(c))) for p, c in drawn.tolist())
        return
    median, deviation, least, most, share = {
        "chat": (250, 0.9, 50, 1500, 0.5),
        "quarter": (200, 0.5, 32, 1000, 0.25),
    }[kind]
    for total in np.clip(np.exp(rng.normal(math.log(median), deviation, count)), least, most).tolist():
        completion = max(2, round(total * share))
        yield round(total) - completion, completion


def rows(case: Case, seed: int = 5) -> Iterator[dict[str, str]]:
    """``{"prompt", "completion"}`` rows of random words."""
    rng = np.random.default_rng(seed)
    first = len((BOS, EOS, UNK, PAD))
    for prompt, completion in lengths(case.lengths, rng, case.samples):
        ids = rng.integers(first, case.shape.vocabulary, prompt + completion - 2)
        words = [f"w{i}" for i in ids.tolist()]
        yield {"prompt": " ".join(words[: prompt - 1]), "completion": " " + " ".join(words[prompt - 1 :])}


def write_data(case: Case, path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(case)))


def write_model(shape: LlamaShape, folder: Path) -> None:
    """A Llama with random weights in float32, and its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.positions,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=3,
        tie_word_embeddings=False,
    )
    torch.manual_seed(5)
    LlamaForCausalLM(config).save_pretrained(folder)
    make_tokenizer(shape.vocabulary).save_pretrained(folder)


def make_tokenizer(vocabulary: int) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = (BOS, EOS, UNK, PAD)
    known = {word: i for i, word in enumerate(special)} | {f"w{i}": i for i in range(len(special), vocabulary)}
    words = Tokenizer(models.WordLevel(known, unk_token=UNK))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 0)]
    )
    names = {"bos_token": BOS, "eos_token": EOS, "unk_token": UNK, "pad_token": PAD}
    return PreTrainedTokenizerFast(tokenizer_object=words, **names)
