"""The differences between inference engines that have OpenAI's interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class EngineDialect(NamedTuple):
    """``load``, ``unload``: paths of the requests; ``model``: the name that a request for a text has to give, from
    those of the base model and the adapter; ``updates``: how a server is started that takes adapters while it runs;
    ``drawn``: how one is started whose log-probabilities are those of the distribution that is drawn from."""

    load: str
    unload: str
    model: Callable[[str, str], str]
    updates: str
    drawn: str


DIALECTS = {
    "vllm": EngineDialect(
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        lambda base, adapter: adapter,
        "--enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment",
        "--logprobs-mode processed_logprobs",
    ),
    "sglang": EngineDialect(
        "/load_lora_adapter",
        "/unload_lora_adapter",
        lambda base, adapter: f"{base}:{adapter}" if adapter != base else base,
        "--enable-lora",
        "RETURN_ORIGINAL_LOGPROB unset in its environment",
    ),
}
