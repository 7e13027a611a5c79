"""What each adapter method starts from: the settings that it takes with their best known defaults, and their source.

A recipe that leaves a setting out gets the method's own. A setting that a method does not list has no effect on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Method(NamedTuple):
    """``settings``: recipe field to default; ``lr``: the peak learning rate to begin with (AdamW, batches of some
    dozen samples); ``what``: one line for the reference; ``source``: where the defaults come from."""

    what: str
    settings: Mapping[str, Any]
    lr: str
    source: str


BESIDE = {"modules_to_save": ()}
TOKENS = {**BESIDE, "trainable_tokens": ()}
LORA = {"rank": 16, "alpha": 32, "dropout": 0.05, "target_modules": "all-linear", "bias": "none", **TOKENS}

DEFAULTS: dict[str, Method] = {
    "lora": Method(
        "adds a low-rank product to each target",
        LORA,
        "2e-4",
        "arXiv:2106.09685; all linear layers and this rate: QLoRA, arXiv:2305.14314, section 4",
    ),
    "rslora": Method(
        "LoRA scaled by alpha / √rank, so that high ranks go on learning",
        {**LORA, "rank": 64, "alpha": 16},
        "1e-4",
        "arXiv:2312.03732: gains show at high ranks; alpha 16 keeps the step of LoRA with alpha = 2 rank",
    ),
    "dora": Method(
        "LoRA that trains each row's magnitude apart from its direction: closer to full fine-tuning, slower",
        LORA,
        "1e-4",
        "arXiv:2402.09353, appendix A.2: rank 16, alpha 32, 1e-4 to 2e-4",
    ),
    "pissa": Method(
        "LoRA on the principal singular vectors of each weight; the rest is frozen (and quantised): learns faster",
        {**LORA, "alpha": 16, "dropout": 0.0},
        "2e-5",
        "arXiv:2404.02948, section 5: alpha = rank, no dropout, 2e-5",
    ),
    "olora": Method(
        "LoRA that starts from the orthonormal basis of each weight's QR decomposition",
        {**LORA, "alpha": 16, "dropout": 0.05},
        "1e-4",
        "arXiv:2406.01775, section 4: alpha 16, dropout 0.05; rate between LoRA's and PiSSA's",
    ),
    "loraplus": Method(
        "LoRA whose B learns faster than A by `lr_ratio`",
        {**LORA, "lr_ratio": 16.0},
        "5e-5",
        "arXiv:2402.12354, section 5: ratio 16, with A at a rate below LoRA's",
    ),
}


def settings_of(method: str) -> Mapping[str, Any]:
    """The settings that a method takes, each with its default; none for a name that is not known."""
    return DEFAULTS[method].settings if method in DEFAULTS else {}


def methods_with(setting: str) -> list[str]:
    """The methods on which a setting has an effect."""
    return [name for name, method in DEFAULTS.items() if setting in method.settings]
