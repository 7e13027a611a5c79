"""The model's tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from trainer.errors import InputError
from trainer.model.files.remote_code import ASK

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Raises InputError when the folder holds no tokenizer. It may lack an end-of-sequence token; the formats that need
    one check for it."""
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as e:
        if not trust_remote_code and "trust_remote_code" in str(e):
            raise InputError(f"the tokenizer in {folder} is code that comes with it, which was not run: {ASK}") from e
        reason = next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__).rstrip(":")
        raise InputError(
            f"no tokenizer can be loaded from {folder} ({reason}); put the tokenizer's files next to config.json"
        ) from e
    return tokenizer
