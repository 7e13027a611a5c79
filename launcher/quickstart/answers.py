"""Answers of a model before and after fine-tuning, made with transformers and peft only, without muster's own code."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.quickstart.corpus import CorpusQuestion


def answers(base: Path, adapter: Path | None, questions: Sequence[CorpusQuestion], max_tokens: int = 24) -> list[str]:
    """Returns ``base``'s greedy completions of the prompts, with ``adapter`` if given; whitespace is stripped."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    inputs = tokenizer([q.prompt for q in questions], return_tensors="pt", padding=True, return_token_type_ids=False)
    with torch.inference_mode():
        out = model.eval().generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
    new_tokens = out[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new_tokens, skip_special_tokens=True)]


def right(questions: Sequence[CorpusQuestion], given: Sequence[str]) -> int:
    """Counts the answers that are exactly the question's completion."""
    return sum(text == question.completion.strip() for question, text in zip(questions, given, strict=True))
