"""LLaMA-Adapter (Zhang et al. 2023, arXiv:2303.16199): in the top layers each token also attends to ``virtual_tokens``
trained vectors. Their contribution is scaled by a trained gate that starts at zero, so that the first forward equals
that of the base model. A prompt has no position: every token of a pack attends to it in the same way."""

from __future__ import annotations

from typing import Any

from trainer.adapters.peft_method import PeftMethod

BELOW = 2
"""Number of layers at the bottom without vectors: the paper adapts 30 of 32."""


class AdaptionPrompt(PeftMethod):
    peft_type = "ADAPTION_PROMPT"
    reads_base = True  # peft creates its vectors on the device of the base's weights

    def settings(self, base: Any) -> dict[str, Any]:
        section = self.recipe.adapter
        depth = base.config.get_text_config().num_hidden_layers
        return {"adapter_len": section.virtual_tokens, "adapter_layers": section.layers or max(1, depth - BELOW)}

    def starts_at_zero(self, saved_name: str) -> bool:
        return saved_name.endswith(".adaption_gate")
