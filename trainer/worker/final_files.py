"""The files that only the checkpoints have that may become the final adapter, the last and the best one: the tokenizer,
the model card, and `muster.json`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.checkpoint.artifact_info import ArtifactInfo
from trainer.checkpoint.model_card import model_card
from trainer.model import save_head_config
from trainer.run.best import chosen_by
from trainer.run.frozen import Provenance, lasting
from trainer.worker.build import Parts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def write_final_files(
    folder: Path,
    parts: Parts,
    *,
    chat_template: str | None,
    state: Mapping[str, Any],
    provenance: Provenance,
    base: dict[str, Any],
) -> None:
    """Completes the checkpoint in ``folder``. ``chat_template``: the run's own, None for the tokenizer's; ``state``:
    of the commit record; ``base``: the identity of the base model's files."""
    tokenizer = parts.tokenizer()
    if parts.task.labels:
        _finish_classifier(tokenizer, parts, folder)
    tokenizer.chat_template = chat_template or tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(model_card(lasting(parts.recipe), state, provenance))
    best = chosen_by(state)
    chosen = {"metric": best.metric, "value": best.value, "step": best.step} if best else None
    info = ArtifactInfo.of(parts.recipe)._replace(base=base, best=chosen, begins_from=state.get("begins_from"))
    info.write(folder)


def _finish_classifier(tokenizer: PreTrainedTokenizerBase, parts: Parts, folder: Path) -> None:
    model: Any = parts.strategy.model
    base = model if parts.adapter.full else model.get_base_model()
    # The head finds a text's end by the padding, so texts must be padded as they were in training.
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(base.config.get_text_config().pad_token_id)
    if not parts.adapter.full:
        save_head_config(base, folder)
