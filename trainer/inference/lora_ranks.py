"""The ranks of LoRA that vLLM makes room for."""

from __future__ import annotations

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of `--max-lora-rank`."""


def lora_room(rank: int) -> int | None:
    """Returns the smallest `--max-lora-rank` that holds adapters of this rank; None if there is none."""
    return next((room for room in LORA_RANKS if room >= rank), None)
