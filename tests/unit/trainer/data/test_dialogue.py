"""Answers of an environment between two turns: the tokens that the chat template writes there."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import transformers

from trainer.chat_templates.template import named_template
from trainer.data.formats.dialogue import ChatDialogue, PlainDialogue
from trainer.errors import InputError, RewardFailed
from trainer.recipe.formats import CHAT_TEMPLATES

TURN = "<|{{ m.role }}|>{{ m.content }}</s>"
LOOP = "{% for m in messages %}" + TURN + "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
DROPS = LOOP.replace("{{ m.content }}", "{{ m.content if m.role == 'user' or loop.last else '' }}")
THINKS = LOOP.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] if not loop.last else m.content }}")
OPENED = LOOP.replace("<|assistant|>{%", "<|assistant|><think>{%")
NO_TOOL = "{% for m in messages if m.role == 'tool' %}{{ raise_exception('no') }}{% endfor %}" + LOOP
STRICT = LOOP.replace("{{ m.content }}", "{{ raise_exception('rude') if 'damn' in m.content }}{{ m.content }}")


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(tiny_model)


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def rendered(tokenizer: Any, template: str, *messages: tuple[str, str]) -> str:
    turns = [{"role": role, "content": content} for role, content in messages]
    return str(tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False, add_generation_prompt=True))


@pytest.mark.parametrize("literal", [False, True])
@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_prompt_turn_and_answer_are_what_the_template_writes(tokenizer: Any, name: str, literal: bool) -> None:
    template = named_template(name)
    dialogue = ChatDialogue(tokenizer, template, literal=literal)
    end = "" if name == "glm" else dialogue._end
    turn = ids_of(tokenizer, f"I ask{end}")
    answer = dialogue.answer("it is 12", turn, ended=turn[-1] == tokenizer.eos_token_id)
    prompt = rendered(tokenizer, template, ("user", "how much"))
    whole = rendered(tokenizer, template, ("user", "how much"), ("assistant", "I ask"), (dialogue.role, "it is 12"))
    own = {"mistral": " ", "vicuna": " ", "glm": "<think></think>\n"}.get(name, "")  # the model itself writes it
    assert prompt + own + tokenizer.decode([*turn, *answer]) == whole
    assert answer == ids_of(tokenizer, tokenizer.decode(answer)) or literal


def test_a_turn_that_a_stop_string_ended_gets_the_mark_of_its_end(tokenizer: Any) -> None:
    dialogue = ChatDialogue(tokenizer, LOOP, literal=False)
    closed = dialogue.answer("12", ids_of(tokenizer, "I ask</s>"), ended=True)
    assert tokenizer.decode(closed) == "<|tool|>12</s><|assistant|>"
    assert dialogue.answer("12", ids_of(tokenizer, "I ask>>"), ended=False) == [tokenizer.eos_token_id, *closed]


def test_a_turn_that_ended_in_the_next_ones_mark_has_it_once(tokenizer: Any) -> None:
    dialogue = ChatDialogue(tokenizer, named_template("glm"), literal=False)
    answer = dialogue.answer("12", ids_of(tokenizer, "I ask"), ended=False)
    assert dialogue.answer("12", [7, answer[0]], ended=True) == answer[1:]


def test_an_answer_ends_no_turn_where_special_tokens_are_text(tokenizer: Any) -> None:
    text = "no</s>more"
    for literal, count in ((False, 3), (True, 2)):
        dialogue = ChatDialogue(tokenizer, LOOP, literal=literal)
        answer = dialogue.answer(text, [5], ended=False)
        assert answer.count(tokenizer.eos_token_id) == count
        plain = PlainDialogue(tokenizer, literal=literal).answer(text, [5], ended=False)
        assert plain.count(tokenizer.eos_token_id) == count - 2
        assert text in tokenizer.decode(answer)


@pytest.mark.parametrize("text", ["12", " 12", "\n12\n", "", "a", "é", "  x"])
def test_a_plain_answer_is_the_text_as_it_is(tokenizer: Any, text: str) -> None:
    assert PlainDialogue(tokenizer, literal=False).answer(text, [5], ended=True) == ids_of(tokenizer, text)


@pytest.mark.parametrize("template", [DROPS, OPENED, None])
def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer: Any, template: str | None) -> None:
    with pytest.raises(InputError, match=r"set data\.chat_template"):
        ChatDialogue(tokenizer, template, literal=False)


def test_a_template_that_drops_reasoning_warns(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        ChatDialogue(tokenizer, LOOP, literal=False)
        assert "reasoning" not in caplog.text
        ChatDialogue(tokenizer, THINKS, literal=False)
    assert "drops the reasoning of earlier turns" in caplog.text


def test_the_role_is_tool_where_the_template_knows_it(tokenizer: Any) -> None:
    assert [ChatDialogue(tokenizer, one, literal=False).role for one in (LOOP, NO_TOOL)] == ["tool", "user"]


def test_an_answer_that_the_template_refuses_fails(tokenizer: Any) -> None:
    with pytest.raises(RewardFailed, match=r"refuses the environment's answer 'damn': rude"):
        ChatDialogue(tokenizer, STRICT, literal=False).answer("damn", [5], ended=False)
