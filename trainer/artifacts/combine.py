"""Selection of one of several adapters, or of a weighted combination of them (peft's ``add_weighted_adapter``)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from trainer.errors import UsageError

Kind = Literal["cat", "linear", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
PRUNING = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
COMBINED = "_combined"
"""Name of the combined adapter; a user cannot give this name."""
_PART = re.compile(r"([A-Za-z0-9][A-Za-z0-9_-]*)(?:=(-?\d+(?:\.\d*)?|-?\.\d+))?")


@dataclass(frozen=True)
class Mix:
    """A combination of adapters with ``weights`` by name. ``cat`` computes the exact sum, and its rank is the sum of
    the ranks; ``svd`` reduces that sum to the largest rank; ``linear`` averages A and B, a rough approximation. TIES
    (Yadav et al. 2023, arXiv:2306.01708) and DARE (Yu et al. 2023, arXiv:2311.03099) keep the share ``density`` of each
    adapter's entries."""

    weights: dict[str, float]
    kind: Kind = "cat"
    density: float | None = None

    @classmethod
    def of(cls, use: str, kind: str = "cat", density: float | None = None) -> Mix:
        """Parses ``a`` or ``a=0.7,b=0.3``. Raises UsageError."""
        parts = [_PART.fullmatch(part.strip()) for part in use.split(",")]
        if not all(parts) or (len(parts) > 1 and any(m and m[2] is None for m in parts)):
            raise UsageError(f"--use {use!r} is neither the name of an adapter nor weights as in a=0.7,b=0.3")
        if kind not in get_args(Kind):
            raise UsageError(f"--combination {kind!r} is not one of: {', '.join(get_args(Kind))}")
        if density is None and kind in PRUNING:
            raise UsageError(f"--combination {kind} keeps a share of each adapter's entries: say --density, as in 0.5")
        weights = {m[1]: float(m[2] or 1.0) for m in parts if m}
        if len(weights) < len(parts):
            raise UsageError(f"--use {use!r} names an adapter twice: add its weights up")
        return cls(weights, kind, density)  # type: ignore[arg-type]

    @classmethod
    def chosen(cls, use: str | None, kind: str, density: float | None) -> Mix | None:
        """Returns None without ``use``. Raises UsageError for settings of a combination that have no effect."""
        if use is not None:
            return cls.of(use, kind, density)
        if kind != cls.kind or density is not None:
            raise UsageError("--combination and --density have no effect without --use; leave them out")
        return None

    def check(self, names: Sequence[str]) -> None:
        for name in self.weights:
            if name not in names:
                raise UsageError(f"--use {name!r} is none of the adapters {', '.join(names)}")


def mixed(model: Any, mix: Mix) -> str:
    """Activates the adapter that ``mix`` selects, after combining several if needed. Returns its name. Raises
    UsageError for adapters that peft cannot combine, or would combine incorrectly."""
    mix.check(list(model.peft_config))
    names, weights = list(mix.weights), list(mix.weights.values())
    if weights == [1.0]:
        model.set_adapter(names[0])
        return names[0]
    configs = [model.peft_config[name] for name in names]
    if any(config.peft_type != "LORA" or config.use_dora for config in configs):
        raise UsageError("only plain LoRA adapters can be combined by weights: merge one, and train on from there")
    if any(config.bias != "none" or config.modules_to_save or config.trainable_token_indices for config in configs):
        raise UsageError("adapters with biases, modules or tokens that are trained whole cannot be combined by weights")
    # peft copies the first adapter's configuration for the combined one, which has the scale and initialisation of
    # plain LoRA.
    model.peft_config[names[0]] = replace(configs[0], use_rslora=False, init_lora_weights=True)
    try:
        model.add_weighted_adapter(names, weights, COMBINED, combination_type=mix.kind, density=mix.density)
    except (ValueError, TypeError) as error:
        raise UsageError(f"peft cannot combine {', '.join(names)}: {error}") from error
    finally:
        model.peft_config[names[0]] = configs[0]
    model.set_adapter(COMBINED)
    model.eval()  # the new adapter's dropout would still be active
    return COMBINED
