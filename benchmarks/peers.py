"""What others use to feed the same rows: `datasets` streaming, alone and under torchdata's StatefulDataLoader.

Both read the JSON Lines from the same place, shuffle in a buffer, tokenise on the fly with the same tokenizer in
batches of 1,000, and pad batches of 32 samples into arrays, which is what a training loop would get.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np

BATCH, BUFFER = 32, 10_000


class Encode:
    """Picklable, since loader processes get it."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        prompts = self.tokenizer(rows["prompt"])["input_ids"]
        completions = self.tokenizer(rows["completion"], add_special_tokens=False)["input_ids"]
        eos = self.tokenizer.eos_token_id
        return {"input_ids": [[*p, *c, eos] for p, c in zip(prompts, completions, strict=True)]}


def dataset(rows: str, tokenizer: Any) -> Any:
    from datasets import load_dataset

    endpoint = os.environ.get("AWS_ENDPOINT_URL")
    options = {"endpoint_url": endpoint} if rows.startswith("s3://") else None
    source = load_dataset("json", data_files=rows, split="train", streaming=True, storage_options=options)
    shuffled = source.shuffle(seed=17, buffer_size=BUFFER)
    return shuffled.map(Encode(tokenizer), batched=True, batch_size=1000, remove_columns=["prompt", "completion"])


def pad(samples: list[dict[str, list[int]]]) -> tuple[Any, Any, int]:
    ids = [s["input_ids"] for s in samples]
    arrays = np.zeros((2, len(ids), max(map(len, ids))), np.int64)
    for row, tokens in enumerate(ids):
        arrays[0, row, : len(tokens)] = tokens
        arrays[1, row, : len(tokens)] = 1
    return arrays[0], arrays[1], sum(map(len, ids))


def streaming(rows: str, tokenizer: Any) -> Iterator[int]:
    """Tokens of one batch after the other, epoch after epoch."""
    while True:
        for batch in dataset(rows, tokenizer).iter(batch_size=BATCH):
            yield pad([{"input_ids": ids} for ids in batch["input_ids"]])[2]


def stateful(rows: str, tokenizer: Any, processes: int = 2) -> Iterator[int]:
    from torchdata.stateful_dataloader import StatefulDataLoader

    while True:
        loader = StatefulDataLoader(
            dataset(rows, tokenizer),
            batch_size=BATCH,
            num_workers=processes,
            collate_fn=pad,
            multiprocessing_context="spawn",
        )
        for batch in loader:
            yield batch[2]


def missing_torchdata() -> str | None:
    """Why the loader cannot be measured, None when it can."""
    try:
        from torchdata.stateful_dataloader import StatefulDataLoader  # noqa: F401
    except ImportError as error:
        return f"{error} (pip install torchdata)"
    return None
