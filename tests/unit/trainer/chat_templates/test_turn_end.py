"""What a chat template writes after a turn ends the texts that are generated."""

from __future__ import annotations

import pytest

from tests.support.training import small_recipe
from tests.unit.trainer.data.chat_support import PLAIN, ROLE_ENDS, WITHOUT_END, byte_tokenizer
from trainer.artifacts.chat import CHAT, QA, Conversation
from trainer.chat_templates.turn_end import TurnEnd, turn_end
from trainer.tasks.sampling import end_tokens, stop_strings

SPOKEN = WITHOUT_END.replace("{{ m.content }}\n", "{{ m.content }}\n\n")


@pytest.mark.parametrize(
    ("template", "tokens", "strings"),
    [
        (PLAIN, ["<|im_end|>"], ()),
        (ROLE_ENDS, ["<|user|>"], ()),
        (SPOKEN, [], ("\n\nuser:",)),
        (PLAIN.replace("<|im_end|>", "[END]"), [], ("[END]",)),
        (None, [], ()),
        ("{{ raise_exception('no') }}", [], ()),
    ],
)
def test_a_turns_end_is_a_token_or_a_text(template, tokens, strings):
    by = byte_tokenizer(eos="</s>", template=template)
    ids = frozenset(by.convert_tokens_to_ids(token) for token in tokens)
    assert turn_end(by) == TurnEnd(ids, strings)


def test_an_answer_ends_before_the_text_and_shows_no_part_of_it():
    by = byte_tokenizer(eos="</s>", template=PLAIN.replace("<|im_end|>", "[END]"))
    talk = Conversation(by, CHAT)
    assert not talk.ended("Yes. [EN")
    assert talk.certain("Yes. [EN") == "Yes. "
    assert talk.ended("Yes. [END]\nmore")
    assert talk.shown("Yes. [END]\nmore") == "Yes. "
    assert talk.shown("Yes.") == talk.certain("Yes.") == "Yes."
    assert Conversation(by, QA).shown("[END] a\nb") == "[END] a"


@pytest.mark.parametrize(
    ("source", "stops"),
    [
        ({"format": "messages"}, True),
        ({"format": "instruction", "as": "chat"}, True),
        ({"format": "completion"}, False),
    ],
)
def test_texts_of_a_run_stop_at_the_text_that_its_chats_have(source, stops, tiny_model, tmp_path):
    by = byte_tokenizer(eos="</s>", template=PLAIN.replace("<|im_end|>", "[END]"))
    recipe = small_recipe("stops", tiny_model, tmp_path, **{"data.train": [{"path": "x.jsonl", **source}]})
    assert stop_strings(recipe, by) == (("[END]",) if stops else ())


def test_texts_of_a_run_stop_at_the_token_that_its_template_writes():
    by = byte_tokenizer(eos="</s>", template=PLAIN)
    ends = {by.convert_tokens_to_ids(token) for token in ("</s>", "<|im_end|>")}
    assert end_tokens(object(), by) == ends
