"""Checks that a model reads a text from left to right, and keeps the samples of a pack and the tiles of a layer apart.

Packing relies on position ids that restart, and on the positions at which samples begin. A model with recurrent
(state-space) layers, or one that ignores both, silently carries state from one sample into the next. One that counts
tokens from the beginning of the row treats a sample by its place in the pack. The check is numerical, with the
arguments that training uses: the logits of a sample must depend neither on the samples before it nor on its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from trainer.errors import InputError
from trainer.layers.tiling import Tiles

Inputs = Callable[[npt.NDArray[np.int64], npt.NDArray[np.int64], torch.device], dict[str, Any]]
"""Returns the model's arguments from token ids and position ids [B, L] (`trainer.tasks.Task.inputs`)."""

FIRST_TOKENS, SECOND_TOKENS = 6, 5
TOLERANCE = 0.02
"""In standard deviations of the logits. Without a leak, only rounding differs; a leak moves logits by about as much as
they differ among themselves."""
EXACT_TOLERANCE = 1e-3
"""In float32, of tokens at the same place: an encoder with random weights near zero moves logits by 0.01."""
INT8_TOLERANCE = 0.25
"""LLM.int8() treats a column separately when any token of the batch has an outlier in it, so that tokens change each
other's rounding (0.07 was measured)."""
PLACE_TOLERANCE = 0.25
"""In 16 bits: at another place in its pack, a sample's sums are rounded differently in each layer."""

FEW = 4
"""Tokens. It is no divisor of the place of the second sample."""
TOKEN_UNITS: dict[str, dict[str, float]] = {
    "sliding_window": {"sliding_window": FEW},
    "attention_chunk_size": {"attention_chunk_size": FEW},
    "floor_scale": {"floor_scale": FEW, "attn_scale": 10.0},
    "index_topk": {"index_topk": FEW},
    "keep_window_size": {"keep_window_size": FEW},
}
"""The settings of transformers' models, in tokens, by which attention changes along a row, and the values with which it
changes within a few tokens: by more than rounding, so that Llama 4's temperature is also made steeper."""


@contextmanager
def shrunk(base: Any, units: Iterable[str]) -> Iterator[None]:
    """Makes the attention of a model change within a few tokens by each of ``units`` inside the context."""
    owners = {id(o): o for m in base.modules() for o in (m, getattr(m, "config", None)) if o is not None}
    values = {name: value for unit in units for name, value in TOKEN_UNITS[unit].items()}
    with ExitStack() as restored:
        for owner in owners.values():
            for name, value in values.items():
                if (before := vars(owner).get(name)) is not None:
                    setattr(owner, name, value)
                    restored.callback(setattr, owner, name, before)
        yield


def units_below(base: Any, sequence_length: int) -> dict[str, int]:
    """Returns those of ``TOKEN_UNITS`` that are shorter than the packs, with the model's values."""
    config = base.config.get_text_config()
    found = {name: getattr(config, name, None) or sequence_length for name in TOKEN_UNITS}
    return {name: int(value) for name, value in found.items() if value < sequence_length}


@contextmanager
def mode(module: torch.nn.Module, *, training: bool) -> Iterator[None]:
    """Sets the module to training or to evaluation inside the context, without gradients."""
    was_training = module.training
    module.train(training)
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(was_training)


def check_isolation(
    model: Any, module: Any, inputs: Inputs, device: torch.device, path: str, sequence_length: int
) -> None:
    """Raises InputError when the logits of a sample depend on the tokens before it in its pack, or on its place in it.

    ``module``: the wrapped model, whose forward is called. Every rank calls it, in the forward's precision."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    packs = _Packs(base, module, inputs, device)
    with mode(module, training=False):
        leak, place = packs.leak(), packs.moved_by_place()
        counted = {}
        for name, value in units_below(base, sequence_length).items():
            with shrunk(base, [name]):
                if packs.moved_by_place() > 3 * place + TOLERANCE:  # less is rounding
                    counted[name] = value
    if not leak <= (INT8_TOLERANCE if getattr(base, "is_loaded_in_8bit", False) else TOLERANCE):
        raise InputError(
            f"model.path {path!r}: {type(base).__name__} lets the samples of a pack see each other (logits move by "
            f"{leak:.2g} of their spread with the samples before them); set data.packing=false"
        )
    if not place <= (TOLERANCE if packs.in_float32 else PLACE_TOLERANCE):
        raise InputError(
            f"model.path {path!r}: {type(base).__name__} treats a sample by its place in the pack (logits move by "
            f"{place:.2g} of their spread with the place); set data.packing=false"
        )
    if counted:
        name, value = min(counted.items(), key=lambda item: item[1])
        raise InputError(
            f"model.path {path!r}: {type(base).__name__} counts {name} {value} from the beginning of a pack, so that a "
            f"sample behind {value} tokens differs from the same one alone, and data.sequence_length is "
            f"{sequence_length}; lower it to {value}, or set data.packing=false"
        )


def check_left_to_right(
    model: Any, module: Any, inputs: Inputs, device: torch.device, path: str, sequence_length: int
) -> None:
    """Raises InputError when a token's logits depend on what follows it, as in an encoder, or when the model does not
    number the tokens of a text from 0: models of RoBERTa's family begin behind the number of their padding token.

    ``module``: the wrapped model, whose forward is called. Every rank calls it, in the forward's precision."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = getattr(model, "active_peft_config", None)
    packs = _Packs(base, module, inputs, device)
    units = units_below(base, sequence_length)
    with mode(module, training=False):
        ahead = packs.moved_by_what_follows()
        with shrunk(base, units):
            ahead_by_unit = packs.moved_by_what_follows()
        # The code of virtual prompts puts them into numbered texts only.
        numbering = 0.0 if config is not None and config.is_prompt_learning else packs.moved_by_numbering()
    in_8bit = getattr(base, "is_loaded_in_8bit", False)
    tolerance = INT8_TOLERANCE if in_8bit else EXACT_TOLERANCE if packs.in_float32 else TOLERANCE
    if not ahead <= tolerance:
        raise InputError(
            f"model.path {path!r}: {type(base).__name__} lets a token see what follows it (logits move by {ahead:.2g} "
            "of their spread), so that it cannot learn to write; name a causal language model"
        )
    if not ahead_by_unit <= tolerance:
        value = min(units.values())
        raise InputError(
            f"model.path {path!r}: behind {value} tokens, {type(base).__name__} lets a token see what follows it "
            f"(by {', '.join(units)}), and data.sequence_length is {sequence_length}; lower it to {value}"
        )
    if not numbering <= TOLERANCE:
        raise InputError(
            f"model.path {path!r}: {type(base).__name__} does not number the tokens of a text from 0, as training does "
            f"(logits move by {numbering:.2g} of their spread); name another model.path"
        )


def check_tiles(model: Any, module: Any, inputs: Inputs, device: torch.device, path: str, tiles: Tiles) -> None:
    """Raises InputError when the logits change with the tiles: a part of a layer then mixes tokens.

    ``module``: the wrapped model, whose forward is called. Every rank calls it, in the forward's precision."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    packs = _Packs(base, module, inputs, device)
    with mode(module, training=False):
        whole = packs.logits()
        with tiles.of(FEW):
            moved = float((packs.logits() - whole).abs().max() / whole.std())
    if not moved <= (INT8_TOLERANCE if getattr(base, "is_loaded_in_8bit", False) else TOLERANCE):
        raise InputError(
            f"compute.tile_tokens does not work for {type(base).__name__} of model.path {path!r}: its logits move by "
            f"{moved:.2g} of their spread; leave it out"
        )


class _Packs:
    """Two packs of two samples, whose shorter sample is the same."""

    def __init__(self, base: Any, module: Any, inputs: Inputs, device: torch.device) -> None:
        self._module, self._inputs, self._device = module, inputs, device
        # The adapter may have wrapped the embeddings, and a strategy may have cut their weight.
        vocabulary = int(
            getattr(base.get_input_embeddings(), "num_embeddings", 0) or base.config.get_text_config().vocab_size
        )
        self._first, self._other, self._second = (
            (np.arange(count) + start) % vocabulary
            for count, start in ((FIRST_TOKENS, vocabulary // 3), (FIRST_TOKENS, vocabulary // 2), (SECOND_TOKENS, 0))
        )
        self.in_float32 = True

    def logits(self) -> torch.Tensor:
        return self._logits(self._first, self._second)

    def leak(self) -> float:
        """Returns the largest change of a logit by the tokens before the sample, in standard deviations."""
        logits, others = (self._logits(first, self._second)[FIRST_TOKENS:] for first in (self._first, self._other))
        return float((logits - others).abs().max() / logits.std())

    def moved_by_place(self) -> float:
        """Returns the change of a token's logits by its sample's place. Packs of one shape are compared, since kernels
        round by shape, and it is the median of the tokens, since rounding may route a token to another expert."""
        behind = self._logits(self._first, self._second)[FIRST_TOKENS:]
        ahead = self._logits(self._second, self._first)[:SECOND_TOKENS]
        return float((behind - ahead).abs().amax(-1).median() / behind.std())

    def moved_by_what_follows(self) -> float:
        """Returns the change of a token's logits by what follows it, the rest of its sample or padding; the median."""
        sample, end = np.concatenate((self._first, self._second)), [np.zeros(1, np.int64)] * SECOND_TOKENS
        logits, others = (one[:FIRST_TOKENS] for one in (self._logits(sample), self._logits(self._first, *end)))
        return float((logits - others).abs().amax(-1).median() / logits.std())

    def moved_by_numbering(self) -> float:
        """Returns the largest change of a logit of a single sample if the model numbers its tokens itself."""
        sample = np.concatenate((self._first, self._second))
        logits, own = self._logits(sample), self._logits(sample, leave_out="position_ids")
        return float((logits - own).abs().max() / logits.std())

    def _logits(self, *samples: npt.NDArray[np.int64], leave_out: str = "") -> torch.Tensor:
        positions = np.concatenate([np.arange(len(sample)) for sample in samples])
        inputs = self._inputs(np.concatenate(samples)[None], positions[None], self._device)
        logits = self._module(**{name: value for name, value in inputs.items() if name != leave_out}).logits[0]
        self.in_float32 = logits.dtype == torch.float32
        found: torch.Tensor = logits.float()
        return found
