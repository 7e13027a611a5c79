"""Virtual tokens before every sample of a pack.

peft inserts virtual tokens before a row and counts the row's positions itself, so that only the first sample of a pack
would see them. Here a forward with position ids, in which a 0 begins a sample, gives each sample the same result as
without packing. A forward without position ids is peft's own.

Legend: B packs, L tokens, V virtual tokens, W = L + V for each sample of the fullest pack, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from trainer.errors import InputError


def before_embeddings(model: Any) -> None:
    """Makes the peft model ``model`` insert its prompt before the embeddings of every sample."""
    own: Callable[..., Any] = model.forward
    kept: list[torch.Tensor] = []

    def forward(input_ids: Any = None, position_ids: Any = None, **rest: Any) -> Any:
        if input_ids is None or position_ids is None:
            return own(input_ids=input_ids, position_ids=position_ids, **rest)
        prompt_BVD = model.get_prompt(batch_size=len(input_ids))
        source_BW, positions_BW, at_BL = spread(position_ids, prompt_BVD.shape[1])
        tokens_BLD = model.word_embeddings(input_ids)
        rows = torch.arange(len(input_ids), device=input_ids.device)[:, None]
        inserted_BWD = torch.cat([prompt_BVD.to(tokens_BLD.dtype), tokens_BLD], 1)[rows, source_BW]
        # A row without a sample has no prompt: keep the prompt's parameters connected to the loss.
        inserted_BWD = inserted_BWD + 0.0 * prompt_BVD.sum().to(tokens_BLD.dtype)
        kept.append(at_BL)
        try:
            return model.base_model(inputs_embeds=inserted_BWD, position_ids=positions_BW, **rest)
        finally:
            kept.clear()

    def at_tokens(head: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        """Drops the virtual tokens before the head, so that logits have the shape that the caller expects."""
        if not kept:
            return None
        rows = torch.arange(len(given[0]), device=given[0].device)[:, None]
        return (given[0][rows, kept[-1]], *given[1:])

    model.get_output_embeddings().register_forward_pre_hook(at_tokens)
    model.forward = forward


def spread(position_ids_BL: torch.Tensor, virtual: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the layout of packs in which ``virtual`` tokens precede each sample of two tokens or more.

    ``source`` [B, W]: what each place contains (v < V a virtual token, V + l the token l). ``position`` [B, W]: its
    position. ``at`` [B, L]: the place of each token. A single token is a pad and gets no virtual tokens; unused places
    contain a token at position 0, which no sample attends to."""
    packs, length = position_ids_BL.shape
    device = position_ids_BL.device
    follows = torch.nn.functional.pad(position_ids_BL[:, 1:], (0, 1)) == 1
    begins = (position_ids_BL == 0) & follows
    begun = begins.cumsum(1)
    at = torch.arange(length, device=device) + virtual * begun
    width = length + virtual * int(begun[:, -1].max())
    source = torch.full((packs, width), virtual, device=device)
    position = torch.zeros((packs, width), dtype=position_ids_BL.dtype, device=device)
    rows = torch.arange(packs, device=device)[:, None].expand_as(at)
    source[rows, at] = virtual + torch.arange(length, device=device).expand_as(at)
    position[rows, at] = position_ids_BL + virtual * (begins | (position_ids_BL > 0))
    row, first = begins.nonzero(as_tuple=True)
    for v in range(virtual):
        place = at[row, first] - virtual + v
        source[row, place], position[row, place] = v, v
    return source, position, at


def before_keys(model: Any) -> None:
    """Makes each sample of a pack attend to the prefix and to itself only, in the peft model ``model``."""
    own: Callable[..., Any] = model.forward
    additive = _takes_additive_masks(model)

    def forward(input_ids: Any = None, position_ids: Any = None, **rest: Any) -> Any:
        if input_ids is None or position_ids is None:
            return own(input_ids=input_ids, position_ids=position_ids, **rest)
        virtual = model.active_peft_config.num_virtual_tokens
        cache = model.get_prompt(batch_size=len(input_ids), max_cache_len=input_ids.shape[1] + virtual)
        seen = visible(position_ids, virtual)[:, None]
        mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min) if additive else seen
        return model.base_model(
            input_ids=input_ids,
            position_ids=position_ids + virtual,
            attention_mask=mask,
            past_key_values=cache,
            **rest,
        )

    model.forward = forward


def visible(position_ids_BL: torch.Tensor, virtual: int) -> torch.Tensor:
    """Returns the attention mask [B, L, V + L]: a token attends to the prefix, and in its sample to the tokens up to
    itself."""
    sample = (position_ids_BL == 0).cumsum(1)
    same = sample[:, :, None] == sample[:, None, :]
    own = same & torch.ones_like(same).tril()
    return torch.cat([own.new_ones(*own.shape[:2], virtual), own], 2)


def _takes_additive_masks(model: Any) -> bool:
    """Returns True for additive masks, False for boolean ones. Raises InputError for a model whose attention would
    ignore a custom mask."""
    config = model.get_base_model().config.get_text_config()
    kind = getattr(config, "_attn_implementation", None)
    windows = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kind not in ("sdpa", "eager") or windows:
        what = f"layers with {', '.join(sorted(windows))}" if windows else f"attention by {kind}"
        raise InputError(f"adapter.method prefix: {what} cannot see a prefix in packs; use method prompt")
    return bool(kind == "eager")
