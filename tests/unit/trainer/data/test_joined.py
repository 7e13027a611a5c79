"""Prompts and answers are tokenised as one text, and special tokens stand once."""

from __future__ import annotations

import pytest

from tests.unit.trainer.data.chat_support import byte_tokenizer, encoded, prefixing_tokenizer, texts

BOTH = byte_tokenizer(eos="</s>", around="<s> $A </s>")
BEGIN = byte_tokenizer(eos="</s>", around="<s> $A")


@pytest.mark.parametrize("by", [BOTH, BEGIN])
@pytest.mark.parametrize(
    ("prompt", "completion", "whole"),
    [
        ("Who?\n", "Mira.", "<s>Who?\n⟦Mira.</s>⟧"),
        ("<s>Who?\n", "Mira.</s>", "<s>Who?\n⟦Mira.</s>⟧"),
        ("Who?", "", "<s>Who?⟦</s>⟧"),
        ("", "Mira.", "<s>⟦Mira.</s>⟧"),
    ],
)
def test_bos_and_eos_stand_once_whoever_writes_them(by, prompt, completion, whole):
    assert texts(encoded({"prompt": prompt, "completion": completion}, by=by, format="completion"), by) == [whole]


@pytest.mark.parametrize("by", [BOTH, BEGIN])
@pytest.mark.parametrize("text", ["a <s> b", "<s>a <s> b</s>"])
def test_a_text_may_bring_its_ends(by, text):
    (sample,) = encoded({"text": text}, by=by, format="text")
    assert by.decode(sample.tokens) == "<s>a <s> b</s>"


def test_an_answer_has_no_space_that_nobody_wrote():
    by = prefixing_tokenizer()
    assert texts(encoded({"prompt": "Who\n", "completion": "Mira"}, by=by, format="completion"), by) == [
        "<s> Who\n⟦Mira</s>⟧"
    ]
    (text,) = texts(encoded({"question": "Who", "answer": "Mira"}, by=by, format="qa"), by)
    assert text == "<s> Question: Who\nAnswer:⟦ Mira</s>⟧"


def test_a_token_of_both_is_a_target_and_is_warned_about():
    by = prefixing_tokenizer()
    (sample,) = samples = encoded({"prompt": "Who ", "completion": "Mira"}, by=by, format="completion")
    assert texts(samples, by) == ["<s> Who⟦ Mira</s>⟧"]
    assert "joins the end of a prompt and the start of its completion" in sample.warnings[0]


def test_special_tokens_may_stay_text():
    row = {"prompt": "a</s>", "completion": "b</s>"}
    (sample,) = encoded(row, by=BEGIN, format="completion", special_tokens="text")
    assert list(sample.tokens).count(BEGIN.eos_token_id) == 1
    assert BEGIN.decode(sample.tokens) == "<s>a</s>b</s></s>"


def test_an_instruction_as_a_chat_has_its_system_text_and_its_history():
    row = {"instruction": "And now?", "input": "x", "output": "Two.", "system": "Be brief."}
    row["history"] = [["F?", "One."]]
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    template += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    samples = encoded(row, template, by=BEGIN, format="instruction", style="chat")
    assert texts(samples, BEGIN) == [
        "<|system|>Be brief.</s><|user|>F?</s><|assistant|>⟦One.</s>⟧<|user|>And now?\nx</s><|assistant|>⟦Two.</s>⟧"
    ]
