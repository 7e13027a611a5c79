"""The losses of task ``grpo``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trainer.registry import Choice, Registry

Level = Literal["token", "sequence", "product"]
"""The ratio of the probabilities of the policy and of the one that wrote the text: of each token, the geometric mean
over the text's tokens, or their product."""

Mean = Literal["texts", "tokens", "length"]
"""The mean over an update: over its texts of each text's mean over its tokens; over all tokens; or over the texts of
each text's sum divided by ``max_new_tokens``."""


@dataclass(frozen=True)
class GRPOLossRow(Choice):
    """A loss of `trainer.tasks.grpo.losses`: a function of ratios, advantages and limits, one number per token, and how
    the numbers are averaged. ``scale``: what the advantages of a group are divided by, its standard deviation or
    nothing. ``leave_one_out``: an answer is compared with the mean of the *other* answers. ``kl_in_reward``: the
    divergence from the reference is taken off the reward, otherwise it is added to the loss. ``clip``: the default
    limits below and above 1."""

    level: Level = "token"
    mean: Mean = "texts"
    scale: Literal["group", "none"] = "group"
    leave_one_out: bool = False
    kl_in_reward: bool = False
    clip: tuple[float, float] = (0.2, 0.2)


_CLIPPED, _TRUNCATED = "trainer.tasks.grpo.losses:clipped", "trainer.tasks.grpo.losses:truncated"

GRPO_LOSSES = Registry(
    "grpo loss",
    {
        "grpo": GRPOLossRow(_CLIPPED),
        "dr_grpo": GRPOLossRow(_CLIPPED, mean="length", scale="none"),
        "dapo": GRPOLossRow(_CLIPPED, mean="tokens", clip=(0.2, 0.28)),
        "gspo": GRPOLossRow(_CLIPPED, level="sequence", clip=(3e-4, 4e-4)),
        "cispo": GRPOLossRow(_TRUNCATED, mean="tokens", clip=(0.2, 4.0)),
        "rloo": GRPOLossRow(_CLIPPED, level="product", scale="none", leave_one_out=True, kl_in_reward=True),
    },
)
