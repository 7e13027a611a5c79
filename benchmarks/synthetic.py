"""Made-up rows whose lengths are distributed as those of GSM8K's training set, and a tokenizer for them.

Words per question and per answer follow the log-normal distributions fitted to 4,000 rows of GSM8K (means 45 and 51
words), with their correlation and within its shortest and longest; the answers hold sums as GSM8K's do.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

MEAN, DEVIATION, CORRELATION = np.array([3.736, 3.798]), np.array([0.368, 0.538]), 0.49
SHORTEST, LONGEST = np.array([9, 4]), np.array([183, 205])
WORDS, VOCABULARY = 6_000, 4_096
CHUNK = 10_000
SYLLABLES = [c + v + e for c in "bdfgklmnprst" for v in "aeiou" for e in ("", "n", "r", "st")]


def words(seed: int = 3) -> list[str]:
    """Words of one to four syllables, the short ones first."""
    rng = np.random.default_rng(seed)
    counts = np.sort(rng.integers(1, 5, WORDS))
    return ["".join(rng.choice(SYLLABLES, n)) for n in counts]


def rows(count: int, seed: int = 1) -> Iterator[dict[str, str]]:
    """Deterministic ``{"prompt", "completion"}`` rows."""
    known = np.array(words())
    covariance = np.array([[1, CORRELATION], [CORRELATION, 1]]) * np.outer(DEVIATION, DEVIATION)
    for chunk in range(0, count, CHUNK):
        rng = np.random.default_rng([seed, chunk])
        lengths = np.exp(rng.multivariate_normal(MEAN, covariance, min(CHUNK, count - chunk)))
        lengths = np.clip(np.rint(lengths), SHORTEST, LONGEST).astype(int)
        # Squared, so that the short words at the front are the frequent ones, as in any language.
        text = known[(rng.random(lengths.sum()) ** 2 * WORDS).astype(int)].tolist()
        numbers = rng.integers(2, 90, (len(lengths), 2)).tolist()
        at = 0
        for (asked, answered), (a, b) in zip(lengths.tolist(), numbers, strict=True):
            prompt, completion = text[at : at + asked], text[at + asked : at + asked + answered]
            at += asked + answered
            completion[len(completion) // 2] = f"{a}*{b}=<<{a}*{b}={a * b}>>{a * b}"
            yield {"prompt": " ".join(prompt) + "?\n", "completion": " ".join(completion) + f".\n#### {a * b}"}


def write_rows(folder: Path, count: int, files: int = 8, seed: int = 1) -> int:
    """``part-*.jsonl`` of together ``count`` rows; returns the bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    per_file = -(-count // files)
    for i in range(files):
        with (folder / f"part-{i:03d}.jsonl").open("w") as file:
            file.writelines(
                json.dumps(row) + "\n" for row in rows(min(per_file, count - i * per_file), seed=seed * 1000 + i)
            )
    return sum(p.stat().st_size for p in folder.iterdir())


def make_tokenizer() -> Any:
    """A byte-level BPE trained on 20,000 of the rows, with bos and eos."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((row["prompt"] + row["completion"] for row in rows(20_000, seed=7)), trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bpe.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
