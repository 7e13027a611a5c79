"""The ZeRO settings that a strategy names: a file of the folder ``deepspeed/``, or the settings themselves.

They contain only what DeepSpeed's ``zero_optimization`` takes. Batch sizes, clipping, precision, optimizer and learning
rate are set in the recipe alone, so that two values cannot contradict each other.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.recipe.strategies import STRATEGIES
from trainer.registry import choose_hint

FOLDER = Path(__file__).resolve().parents[2] / "deepspeed"
OFFLOADS = ("offload_optimizer", "offload_param")
ELSEWHERE = {
    "train_batch_size": "training.global_batch",
    "train_micro_batch_size_per_gpu": "training.micro_batch",
    "gradient_accumulation_steps": "training.global_batch",
    "gradient_clipping": "training.max_grad_norm",
    "fp16": "model.dtype",
    "bf16": "model.dtype",
    "torch_autocast": "model.dtype",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "activation_checkpointing": "training.gradient_checkpointing",
}
"""Keys that a DeepSpeed configuration often contains, each with the recipe key that replaces it."""


def names() -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in FOLDER.glob("*.json")))


def zero_settings(kind: str, given: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns DeepSpeed's ``zero_optimization``. ``given``: ``strategy.deepspeed`` after validation."""
    settings = dict(given) if isinstance(given, Mapping) else _read(given or kind)["zero_optimization"]
    return {**settings, "stage": STRATEGIES[kind].zero_stage}


def mistakes(kind: str, given: str | Mapping[str, Any] | None) -> Iterator[str]:
    """Yields the mistakes in ``strategy.deepspeed``, as sentences that follow its path."""
    where, settings = "", given
    if not isinstance(given, Mapping):
        name = given or kind
        if name not in names():
            yield f"{name!r} is not one of the files in deepspeed/: {', '.join(names())}{choose_hint(name, names())}"
            return
        where = f"file {name}.json: "
        try:
            config = _read(name)
        except ValueError as error:
            yield f"{where}is not JSON ({error})"
            return
        yield from (f"{where}{text}" for text in _foreign(config, allowed={"zero_optimization"}))
        settings = config.get("zero_optimization")
    if not isinstance(settings, Mapping):
        yield f"{where}zero_optimization is missing or no mapping; it holds DeepSpeed's ZeRO settings"
        return
    yield from (f"{where}{text}" for text in _foreign(settings, allowed=None))
    yield from (f"{where}{text}" for text in _wrong(kind, settings))


def _read(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return config


def _foreign(settings: Mapping[str, Any], allowed: set[str] | None) -> Iterator[str]:
    for key in settings:
        if key in ELSEWHERE:
            yield f"{key} does not belong here; it comes from {ELSEWHERE[key]}"
        elif allowed is not None and key not in allowed:
            yield f"{key} does not belong here: only ZeRO settings (zero_optimization) do"


def _wrong(kind: str, settings: Mapping[str, Any]) -> Iterator[str]:
    right = STRATEGIES[kind].zero_stage
    stage = settings.get("stage", right)
    if stage != right:
        yield f"holds ZeRO stage {stage}, and strategy.kind {kind} is stage {right}; name another file or kind"
    for part in OFFLOADS:
        offload = settings.get(part, {})
        device = offload.get("device", "none") if isinstance(offload, Mapping) else offload
        if device not in ("none", "cpu"):
            yield f"{part}.device {device!r} is not one of: none, cpu (checkpoints gather what is in host memory)"
        if part == "offload_param" and device == "cpu" and right < 3:
            yield f"offload_param needs strategy.kind zero3: {kind} keeps complete parameters on the device"
