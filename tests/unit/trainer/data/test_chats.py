"""A conversation is trained as it stands at inference time, and nothing of it is lost, whatever its template does."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from tests.unit.trainer.data.chat_support import (
    BLOCKS,
    CALLING,
    CALLING_TEXT,
    DATED,
    OPENED,
    PARTS,
    PLAIN,
    ROLE_ENDS,
    THINKING,
    WITHOUT_END,
    byte_tokenizer,
    chat,
    encoded,
    targets,
    texts,
)
from trainer.artifacts.chat import CHAT
from trainer.artifacts.chat import Conversation as Talk
from trainer.chat_templates import template as template_module
from trainer.chat_templates.template import named_template
from trainer.data.sample import RowError
from trainer.recipe.formats import CHAT_TEMPLATES
from trainer.recipe.sections.data import DataSection

TWO = (("user", "Who?"), ("assistant", "Mira."), ("user", "Where?"), ("assistant", "Ashford."))
WEATHER = {"name": "weather", "arguments": {"city": "Ashford"}}
CALL = ("assistant", None, {"tool_calls": [{"type": "function", "function": WEATHER}]})
CALLED = (("user", "Rain?"), CALL, ("tool", "dry"), ("assistant", "No."))


def fault(*arguments, **settings):
    found = encoded(*arguments, **settings)
    assert isinstance(found, RowError)
    return found.reason


def said(samples):
    return " ".join(warning for sample in samples for warning in sample.warnings)


def test_turns_share_a_sample_and_end_with_the_token_that_stops_generation():
    assert texts(encoded(chat(*TWO), PLAIN)) == [
        "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n⟦Mira.<|im_end|>⟧\n"
        "<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n⟦Ashford.<|im_end|>⟧\n"
    ]


def test_a_turn_that_the_template_rewrites_later_is_a_sample_of_its_own():
    turns = [(role, text, {"reasoning_content": "hm"} if role == "assistant" else {}) for role, text in TWO]
    samples = encoded(chat(*turns), THINKING)
    assert targets(samples) == ["<think>hm</think>Mira.<|im_end|>", "<think>hm</think>Ashford.<|im_end|>"]
    assert [sample.turn for sample in samples] == [2, 4]
    assert "<|im_start|>assistant\nMira.<|im_end|>" in texts(samples)[1], "as the model sees it later"


@pytest.mark.parametrize(
    ("row", "template", "names"),
    [
        (chat(*CALLED), PLAIN, "the call of message 2 ('weather')"),
        (chat(("user", "a"), ("assistant", "b", {"reasoning_content": "because"})), PLAIN, "reasoning_content"),
        (chat(("user", "a"), ("assistant", "b")), "{% for m in messages[1:] %}{{ m.content }}{% endfor %}", "'a'"),
        (
            chat(("system", "Be brief."), *TWO),
            "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}",
            "Be brief.",
        ),
    ],
)
def test_what_the_template_leaves_out_is_a_fault_that_names_it(row, template, names):
    assert "the chat template leaves out" in fault(row, template)
    assert names in fault(row, template)


@pytest.mark.parametrize("template", [CALLING, CALLING_TEXT])
@pytest.mark.parametrize("arguments", [{"city": "Ashford"}, '{"city": "Ashford"}'])
def test_arguments_are_written_once_as_the_template_takes_them(template, arguments):
    call = {"tool_calls": [{"function": {"name": "weather", "arguments": arguments}}]}
    samples = encoded(chat(("user", "Rain?"), ("assistant", "", call), ("tool", "dry"), ("assistant", "No.")), template)
    assert targets(samples) == ['[weather {"city": "Ashford"}]<|im_end|>', "No.<|im_end|>"]


def test_sharegpts_calls_and_results_are_calls_and_results():
    turns = [("human", "Rain?"), ("function_call", '{"name": "weather", "arguments": {"city": "Ashford"}}')]
    turns += [("observation", "dry"), ("gpt", "No.")]
    row = {"conversations": [{"from": role, "value": text} for role, text in turns], "tools": "[]"}
    assert targets(encoded(row, CALLING)) == targets(encoded(chat(*CALLED), CALLING))


def test_the_results_of_calls_have_the_ids_and_names_of_their_calls():
    template = PLAIN.replace("{{ m.content }}", "{{ m.content }}{{ m.tool_call_id }}/{{ m.name }}").replace(
        "<|im_end|>", "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}"
        "{{ c.id }}{% endfor %}<|im_end|>"
    )  # fmt: skip
    (text,) = texts(encoded(chat(*CALLED), template))
    assert "drycall00000/weather" in text


def test_the_assistant_may_open_a_conversation_and_no_other_words_are_trained():
    assert targets(encoded(chat(("assistant", "Welcome."), *TWO), CALLING))[0] == "Welcome.<|im_end|>"


def test_a_generation_prompt_that_is_no_beginning_of_the_text():
    samples = encoded(chat(*TWO), OPENED)
    assert targets(samples) == ["Mira.<|im_end|>", "Ashford.<|im_end|>"]
    assert "'tant\\n<think>\\n'" in said(samples) or "<think>" in said(samples)


def test_an_answer_that_begins_as_the_generation_prompt_does_is_trained_whole():
    assert targets(encoded(chat(("user", "a"), ("assistant", "<thing>")), OPENED)) == ["<thing><|im_end|>"]


def test_the_mark_of_the_next_turn_may_end_a_turn():
    by = byte_tokenizer(eos="</s>")
    stops = (by.convert_tokens_to_ids("<|user|>"),)
    samples = encoded(chat(*TWO), ROLE_ENDS, by=by, stops=stops)
    assert targets(samples, by) == ["Mira.<|user|>", "Ashford.<|user|>"]
    assert said(samples) == ""


def test_a_turn_without_an_end_is_warned_about():
    samples = encoded(chat(*TWO), WITHOUT_END)
    assert targets(samples) == ["Mira.\n", "Ashford.\n"]
    assert "without a token that stops generation" in said(samples)


def test_a_template_that_wants_parts_gets_parts():
    assert targets(encoded(chat(*TWO), PARTS)) == ["Mira.<|im_end|>", "Ashford.<|im_end|>"]


def test_generation_blocks_decide():
    assert targets(encoded(chat(*TWO), BLOCKS)) == ["ira.<|im_end|>", "shford.<|im_end|>"]


def test_dates_are_frozen():
    (text,) = texts(encoded(chat(*TWO), DATED, date="2026-02-03"))
    assert "Today is 03 Feb 2026." in text


@pytest.mark.parametrize("mark", [{"weight": 0}, {"weight": 0.0}, {"train": False}])
def test_a_turn_may_be_excluded(mark):
    turns = [TWO[0], (*TWO[1], mark), *TWO[2:]]
    assert targets(encoded(chat(*turns), PLAIN)) == ["Ashford.<|im_end|>"]
    assert encoded(chat(TWO[0], (*TWO[1], mark)), PLAIN) == []
    assert "has to be 0 or 1" in fault(chat(TWO[0], (*TWO[1], {"weight": 0.5})), PLAIN)


def test_the_last_turn_alone_is_trained():
    assert targets(encoded(chat(*TWO), PLAIN, train_on="last")) == ["Ashford.<|im_end|>"]


def test_what_follows_the_last_answer_is_left_out_with_a_warning():
    samples = encoded(chat(*TWO, ("user", "Thanks")), PLAIN)
    assert "Thanks" not in texts(samples)[0]
    assert "goes on after the assistant's last turn" in said(samples)


def test_a_system_column_is_the_first_turn():
    assert "system\nBe brief.<|im_end|>" in texts(encoded(chat(*TWO, system="Be brief."), PLAIN))[0]
    assert "message 1" in fault(chat(("oracle", "x"), system="Be brief."), PLAIN), "numbers count the row's messages"


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (chat(("user", "a"), ("oracle", "b")), "message 2 has the role 'oracle', which is not one of: system, "),
        (chat(("user", "a")), "there is no turn of the assistant"),
        (chat(("user", "a"), ("assistant", None)), "message 2 has no content"),
        (chat(("user", "a"), ("assistant", "")), "message 2 has no content"),
        (chat(("user", None), ("assistant", "b")), "message 1 has no content"),
        (chat(("user", {"a": 1}), ("assistant", "b")), "message 1 has a content that is no text but dict"),
        (chat(("user", 3), ("assistant", "b")), "message 1 has a content that is no text but int"),
        (chat(("user", [{"type": "image"}]), ("assistant", "b")), "message 1 has a content with a part of type image"),
        (chat(("user", "a"), ("function_call", "weather()")), "message 2 has a call that is no mapping"),
        (
            chat(("user", "a"), ("assistant", "", {"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]})),
            "message 2 has a call of f whose arguments are not valid JSON",
        ),
    ],
)
def test_what_is_no_turn_is_a_fault(row, says):
    assert says in fault(row, PLAIN)


def test_parts_of_text_are_joined():
    parts = [{"type": "text", "text": "Mi"}, {"type": "text", "text": "ra."}]
    assert targets(encoded(chat(("User", "Who?"), ("Assistant", parts)), PLAIN)) == ["Mira.<|im_end|>"]


def test_special_tokens_in_a_row_may_stay_text():
    row = chat(("user", "say <|im_end|>"), ("assistant", "<|im_end|> it is"))
    tokens, text = encoded(row, PLAIN), encoded(row, PLAIN, special_tokens="text")
    end = byte_tokenizer().eos_token_id
    assert [list(samples[0].tokens).count(end) for samples in (tokens, text)] == [4, 2]
    assert targets(text) == ["<|im_end|> it is<|im_end|>"]
    assert texts(text)[0].replace("⟦", "").replace("⟧", "") == texts(tokens)[0].replace("⟦", "").replace("⟧", "")


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_musters_templates_write_every_word_and_train_the_assistants(name):
    by = byte_tokenizer(eos="</s>")
    samples = encoded(chat(("system", "Be brief."), *TWO), named_template(name), by=by)
    # The last turn of qwen3 has empty reasoning, which the same turn has not when another one follows.
    assert [sample.turn for sample in samples] == ([3, 5] if name == "qwen3" else [5])
    assert all(word in texts(samples, by)[-1] for word in ("Be brief.", "Who?", "Where?", "Mira.", "Ashford."))
    trained = "".join(targets(samples, by))
    assert all(word in trained for word in ("Mira.", "Ashford."))
    assert not any(word in trained for word in ("Be brief", "Who?", "Where?"))


@pytest.mark.parametrize("name", ["qwen3", "glm"])
def test_musters_templates_of_reasoning_models_drop_it_from_earlier_turns(name):
    turns = [(role, text, {"reasoning_content": "hm"} if role == "assistant" else {}) for role, text in TWO]
    by = byte_tokenizer(eos="</s>")
    first, second = texts(encoded(chat(*turns), named_template(name), by=by), by)
    assert "hm" in first.split("⟦")[1]
    assert "hm" not in second.split("⟦")[0]


# A template that leaves out results of tools, and one that leaves out the system text.
NO_RESULTS = CALLING.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}")
NO_SYSTEM = PLAIN.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
SEARCH = {"tool_calls": [{"function": {"name": "search", "arguments": {"q": "Paris"}}}]}


@pytest.mark.parametrize(
    ("row", "template", "names"),
    [
        (chat(("user", "Rain?"), CALL, ("tool", "dry"), ("assistant", "It is dry now.")), NO_RESULTS, "('dry')"),
        (chat(("system", "In French."), ("user", "a"), ("assistant", "In French: b")), NO_SYSTEM, "('In French.')"),
        (chat(("user", "a"), ("assistant", "I search Paris.", SEARCH), *CALLED[2:]), PLAIN, "search"),
        (chat(("user", "2+2"), ("assistant", "It is 4.", {"reasoning_content": "4"})), PLAIN, "reasoning_content"),
    ],
)
def test_words_that_stand_elsewhere_do_not_stand_for_those_that_are_left_out(row, template, names):
    assert "leaves out" in fault(row, template)
    assert names in fault(row, template)


# The system text is written with the last question only, as Mistral's templates do; and one that merges turns.
LAST_SYSTEM = """{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}<|user|>\
{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }} {% endif %}{{ m.content }}<|assistant|>\
{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"""


def test_a_turn_stands_behind_the_prompt_that_the_template_writes_at_inference_time():
    samples = encoded(chat(("system", "Be brief."), *TWO), LAST_SYSTEM)
    assert texts(samples) == [
        "<|user|>Be brief. Who?<|assistant|>⟦Mira.<|im_end|>⟧",
        "<|user|>Who?<|assistant|>Mira.<|im_end|><|user|>Be brief. Where?<|assistant|>⟦Ashford.<|im_end|>⟧",
    ]


def test_two_turns_of_the_assistant_in_a_row():
    turns = [("user", "a"), ("assistant", "b"), ("assistant", "c")]
    assert targets(encoded(chat(*turns), named_template("qwen3")))[-1] == "<think>\n\n</think>\n\nc<|im_end|>"


def test_reasoning_whose_opening_tag_stood_in_the_prompt():
    turns = [(role, f"hm\n</think>\n\n{text}" if role == "assistant" else text) for role, text in TWO]
    assert targets(encoded(chat(*turns), THINKING)) == [
        "<think>hm</think>Mira.<|im_end|>",
        "<think>hm</think>Ashford.<|im_end|>",
    ]


def test_special_tokens_that_a_row_brings_are_not_doubled():
    by = byte_tokenizer(eos="</s>")
    template = "<s>" + PLAIN.replace("<|im_end|>", "</s>")
    row = chat(("user", "<s>Who?"), ("assistant", "Mira.</s>"))
    assert texts(encoded(row, template, by=by), by) == texts(encoded(chat(*TWO[:2]), template, by=by), by)


def test_a_call_ends_with_the_mark_of_its_result():
    by = byte_tokenizer(eos="</s>")
    template = ROLE_ENDS.replace("<|{{ m.role }}|>", "{{ {'tool': '<think>'}.get(m.role, '<|' ~ m.role ~ '|>') }}")
    template = template.replace("{{ m.content }}", "{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}")
    stops = tuple(by.convert_tokens_to_ids(mark) for mark in ("<|user|>", "<think>"))
    (call,) = targets(encoded(chat(("user", "Rain?"), CALL), template, by=by, stops=stops), by)
    assert call.endswith("<think>")


def test_a_block_without_the_stop_token_is_warned_about():
    template = BLOCKS.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    samples = encoded(chat(("user", "a"), ("assistant", "Yo 😀")), template)
    assert targets(samples) == ["o 😀"]
    assert "without a token that stops generation" in said(samples)


@pytest.mark.parametrize(
    ("turn", "says"),
    [
        ({"role": "assistant", "content": "a", "tool_calls": 5}, "has a call that is no mapping"),
        ({"role": "user", "content": "a", "images": ["x.png"]}, "has images; only text"),
        ({"role": "assistant", "content": "  "}, "has no content"),
        ({"role": "assistant", "te\ud800xt": "a"}, "has no content"),
    ],
)
def test_odd_turns_are_faults(turn, says):
    reason = fault({"messages": [{"role": "user", "content": "a"}, turn]}, PLAIN)
    assert says in reason
    assert reason.encode()


def test_keys_of_merged_layouts_and_other_names_of_arguments():
    row = {"messages": [{"role": None, "from": "human", "value": "a"}, {"role": None, "from": "gpt", "value": "b"}]}
    assert targets(encoded(row, PLAIN)) == ["b<|im_end|>"]
    call = {"tool_calls": [{"name": "weather", "parameters": {"city": "Ashford"}}]}
    samples = encoded(chat(("user", "Rain?"), ("assistant", "", call)), CALLING)
    assert targets(samples) == ['[weather {"city": "Ashford"}]<|im_end|>']


TOOL = '{"name": "f", "parameters": {}}'


@pytest.mark.parametrize("tools", [[json.loads(TOOL)], f"[{TOOL}]", [TOOL]])
def test_tools_in_their_usual_forms(tools):
    template = CALLING.replace("{{ t | tojson }}", "{{ t.function.name }}")
    assert "Be kind. f" in texts(encoded(chat(*TWO, tools=tools), template))[0]


def test_a_tokenizer_with_a_template_for_tools():
    by = copy.deepcopy(byte_tokenizer())
    by.chat_template = {"default": PLAIN, "tool_use": CALLING}
    assert targets(encoded(chat(*CALLED, tools=[{"name": "weather"}]), by=by))[0].startswith("[weather")
    assert "Be kind" not in texts(encoded(chat(*TWO), by=by))[0]


def test_marks_in_calls_and_thoughts_stay_text_too():
    end = byte_tokenizer().eos_token_id
    call = {"tool_calls": [{"function": {"name": "f", "arguments": {"a": "x<|im_end|>y"}}}]}
    called, thinking = (
        chat(("user", "a"), ("assistant", "", call)),
        chat(("user", "a"), ("assistant", "<think>a</think>b")),
    )
    (marked,), (plain,) = encoded(called, CALLING, special_tokens="text"), encoded(called, CALLING)
    assert list(marked.tokens).count(end) == list(plain.tokens).count(end) - 1
    assert targets(encoded(thinking, THINKING, special_tokens="text")) == ["<think>a</think>b<|im_end|>"]


def test_a_prompt_with_tools_is_written_by_the_template_for_tools():
    by = copy.deepcopy(byte_tokenizer())
    by.chat_template = {"default": PLAIN, "tool_use": CALLING}
    (asked,) = encoded(chat(("user", "Rain?"), tools=[{"name": "weather"}]), by=by, task="ppo")
    assert "weather" in by.decode(asked.tokens)


def test_a_system_text_behind_the_mark_of_the_assistants_turn_is_not_trained():
    row = chat(("system", "Be brief."), ("assistant", "Welcome."), *TWO)
    by = byte_tokenizer(eos="</s>")
    assert "Be brief" not in "".join(targets(encoded(row, named_template("gemma"), by=by), by))
    assert "Be brief" in "".join(texts(encoded(row, named_template("gemma"), by=by), by))


@pytest.mark.parametrize("answer", ["hm\n</think>\n\nMira.", ""])
def test_a_talk_goes_on_after_any_answer(answer):
    talk = Talk(byte_tokenizer(template=THINKING), CHAT)
    talk.ask("Who?")
    talk.answered(answer)
    assert byte_tokenizer().decode(talk.ask("Where?")).endswith("Where?<|im_end|>\n<|im_start|>assistant\n")


def test_each_chat_template_is_named():
    folder = Path(template_module.__file__).parent
    assert {file.stem for file in folder.glob("*.jinja")} == set(CHAT_TEMPLATES)
    told = DataSection.model_fields["chat_template"].description
    assert all(f"`{name}`" in told for name in CHAT_TEMPLATES)
