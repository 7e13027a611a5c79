"""The losses of task ``dpo``."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.registry import Choice, Registry


@dataclass(frozen=True)
class DPOLossRow(Choice):
    """A loss of `trainer.tasks.preference.dpo`: a function of the pairs' log-ratios and of the section. ``uses``: the
    settings of the section that only some losses have."""

    uses: tuple[str, ...] = ()


_CODE = "trainer.tasks.preference.dpo_losses"

DPO_LOSSES = Registry(
    "dpo loss",
    {
        "sigmoid": DPOLossRow(f"{_CODE}:sigmoid", ("label_smoothing",)),
        "robust": DPOLossRow(f"{_CODE}:robust", ("label_smoothing",)),
        "hinge": DPOLossRow(f"{_CODE}:hinge"),
        "ipo": DPOLossRow(f"{_CODE}:ipo"),
        "sppo": DPOLossRow(f"{_CODE}:sppo"),
        "apo_zero": DPOLossRow(f"{_CODE}:apo_zero"),
        "apo_down": DPOLossRow(f"{_CODE}:apo_down"),
        "discopop": DPOLossRow(f"{_CODE}:discopop", ("discopop_tau",)),
    },
    also={"sppo_hard": "sppo"},
)
