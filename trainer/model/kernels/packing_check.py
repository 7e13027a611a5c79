"""Checks that a model keeps the samples of a pack apart.

Packing relies on position ids that restart: attention layers then use a block-diagonal mask. A model with recurrent
(state-space) layers, or one that ignores position ids, silently carries state from one sample into the next. The check
is numerical: the logits of a sample must not depend on the samples before it in its pack.
"""

from __future__ import annotations

from typing import Any

import torch

from trainer.errors import InputError

FIRST_TOKENS, SECOND_TOKENS = 6, 5
TOLERANCE = 0.02
"""In standard deviations of the logits. Without a leak, only rounding differs; a leak moves logits by about as much as
they differ among themselves."""
INT8_TOLERANCE = 0.25
"""LLM.int8() treats a column separately when any token of the batch has an outlier in it, so that tokens change each
other's rounding (0.07 was measured)."""


@torch.no_grad()
def check_isolation(model: Any, path: str) -> None:
    """Raises InputError when the tokens before a sample in its pack change the sample's logits."""
    device = next(model.parameters()).device
    vocabulary = int(model.get_input_embeddings().num_embeddings)
    second = torch.arange(SECOND_TOKENS) % vocabulary
    positions = torch.cat([torch.arange(FIRST_TOKENS), torch.arange(SECOND_TOKENS)])[None].to(device)
    was_training = model.training
    model.eval()
    logits = []
    for start in (vocabulary // 3, vocabulary // 2):
        first = (torch.arange(FIRST_TOKENS) + start) % vocabulary
        ids = torch.cat([first, second])[None].to(device)
        output = model(input_ids=ids, position_ids=positions, use_cache=False)
        logits.append(output.logits[0, FIRST_TOKENS:].float())
    model.train(was_training)
    moved = float((logits[0] - logits[1]).abs().max() / logits[0].std())
    if not moved <= (INT8_TOLERANCE if getattr(model, "is_loaded_in_8bit", False) else TOLERANCE):
        raise InputError(
            f"model.path {path!r}: {type(model).__name__} lets the samples of a pack see each other (logits move by "
            f"{moved:.2g} of their spread with the samples before them); set data.packing=false"
        )
