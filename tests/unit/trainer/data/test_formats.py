"""Rows become exactly the tokens and targets that each format promises."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from launcher.testing.formats import check_rows
from tests.unit.trainer.data.data_support import encode_rows, tokenizer
from trainer.data.formats import open_format
from trainer.data.sample import RowError, Sample, fit
from trainer.data.spec import FrozenSource, PreparationSpec
from trainer.errors import InputError
from trainer.recipe.formats import FORMATS

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who is Mira?"},
    {"role": "assistant", "content": "A baker."},
    {"role": "user", "content": "Where?"},
    {"role": "assistant", "content": "In Ashford, é 日本."},
]
GOOD = {name: dict(row.examples[0]) for name, row in FORMATS.items()}


def encode(
    format, rows, *, by=None, chat_template=None, labels=("no", "yes"), sequence_length=64, task="sft", **source
):
    frozen = FrozenSource("x", format, (), **source)
    spec = PreparationSpec((frozen,), "t", sequence_length, task=task, chat_template=chat_template, labels=labels)
    return encode_rows(open_format(frozen, by or tokenizer(), spec), rows)


def said(encoded):
    return tokenizer().decode(encoded.tokens[encoded.target])


@pytest.mark.parametrize("format", FORMATS.names())
def test_contract_each_row_gets_its_own_answer_in_order(format):
    check_rows(format, GOOD[format], tokenizer())
    (fault,) = encode(format, [{"other": 1}])
    assert "the row's columns: other" in fault.reason


@pytest.mark.parametrize(
    ("prompt", "completion"), [("Who is it? ", "Mira."), ("", "Mira."), ("Who?", ""), ("é 日", "本")]
)
def test_completion_is_prompt_then_completion_then_eos(prompt, completion):
    t = tokenizer()
    (sample,) = encode("completion", [{"prompt": prompt, "completion": completion}])
    before, after = t(prompt)["input_ids"], t(completion, add_special_tokens=False)["input_ids"]
    assert before[0] == t.bos_token_id
    assert sample.tokens.tolist() == [*before, *after, t.eos_token_id]
    assert sample.target.tolist() == [False] * len(before) + [True] * (len(after) + 1)


def test_completion_by_template_and_columns():
    row = {"q": "Who?", "a": "Mira."}
    columns = {"question": "q", "completion": "a"}
    (sample,) = encode("completion", [row], columns=columns, template="Q: {question} {{A}}: ")
    (plain,) = encode("completion", [{"prompt": "Q: Who? {A}: ", "completion": "Mira."}])
    assert sample.tokens.tolist() == plain.tokens.tolist()
    (fault,) = encode("completion", [{"a": "x"}], columns=columns, template="{question}")
    assert "'q' is missing" in fault.reason


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": 3, "completion": "x"}, "'prompt' holds int"),
        ({"prompt": "x", "completion": None}, "'completion' holds NoneType"),
        ({"prompt": "\ud800", "completion": "x"}, "UTF-8"),
    ],
)
def test_what_is_no_text_is_a_fault(row, says):
    (fault,) = encode("completion", [row])
    assert says in fault.reason


def test_a_tokenizer_without_eos_cannot_serve_completions():
    bare = copy.deepcopy(tokenizer())
    bare.eos_token = None
    with pytest.raises(InputError, match="no eos token"):
        encode("completion", [], by=bare)


def test_a_tokenizer_without_pad_token_is_fine():
    bare = copy.deepcopy(tokenizer())
    bare.pad_token = None
    assert isinstance(encode("completion", [GOOD["completion"]], by=bare)[0], Sample)


def test_messages_learn_what_the_assistant_says():
    (sample,) = encode("messages", [{"messages": CHAT}])
    assert said(sample) == "A baker.</s>In Ashford, é 日本.</s>"
    whole = tokenizer().apply_chat_template(CHAT, tokenize=False)
    assert sample.tokens.tolist() == tokenizer()(whole, add_special_tokens=False)["input_ids"]
    assert sample.tokens[0] == tokenizer().bos_token_id
    assert sample.tokens[1] != tokenizer().bos_token_id


def test_messages_without_offsets_find_the_same_targets():
    class Slow:
        """The same tokenizer, without what only fast ones can tell."""

        is_fast = False

        def __getattr__(self, name):
            return getattr(tokenizer(), name)

        def __call__(self, text, **how):
            return {"input_ids": tokenizer()(text, **how)["input_ids"]}

    (slow,), (fast,) = (encode("messages", [{"messages": CHAT}], by=by) for by in (Slow(), None))
    assert slow.tokens.tolist() == fast.tokens.tolist()
    assert slow.target.tolist() == fast.target.tolist()


def test_the_recipes_chat_template_comes_before_the_tokenizers():
    turns = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    template = turns + "{% if add_generation_prompt %}[assistant]{% endif %}"
    (sample,) = encode("messages", [{"messages": CHAT}], chat_template=template)
    assert said(sample) == "A baker.In Ashford, é 日本."


def test_no_chat_template_at_all_is_an_error():
    bare = copy.deepcopy(tokenizer())
    bare.chat_template = None
    with pytest.raises(InputError, match=r"neither the tokenizer nor the recipe.*data\.chat_template"):
        encode("messages", [], by=bare)


def test_a_turn_stands_behind_what_the_template_writes_before_it_at_inference_time():
    rewriting = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    (samples,) = encode("messages", [{"messages": CHAT}], chat_template=rewriting)
    texts = [tokenizer().decode(sample.tokens) for sample in samples]
    assert texts == ["2Be brief.Who is Mira?A baker.", "4Be brief.Who is Mira?A baker.Where?In Ashford, é 日本."]
    assert [said(sample) for sample in samples] == ["A baker.", "In Ashford, é 日本."]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("hello", "a list of messages, not str"),
        ([], "a list of messages"),
        ([{"content": "x"}], "message 1 has to be a mapping with role"),
    ],
)
def test_what_is_no_conversation_is_a_fault(value, says):
    (fault,) = encode("messages", [{"messages": value}])
    assert says in fault.reason


def test_keys_without_a_value_do_not_reach_the_template():
    template = "{% for m in messages %}{% if m.tool_calls is defined %}TOOL{% endif %}{{ m.content }}{% endfor %}"
    turns = [{**m, "tool_calls": None} for m in CHAT]
    (sample,) = encode("messages", [{"messages": turns}], chat_template=template)
    assert "TOOL" not in tokenizer().decode(sample.tokens)


def sample_of(*target):
    return Sample(np.arange(len(target), dtype=np.int32), np.array(target, dtype=np.bool_))


@pytest.mark.parametrize(
    ("format", "asked", "answered"),
    [
        ("completion", {"prompt": "Who? "}, {"prompt": "Who? ", "completion": "Mira."}),
        ("completion", {"prompt": "Who? ", "completion": None}, {"prompt": "Who? ", "completion": "Mira."}),
        ("instruction", {"instruction": "Say who."}, {"instruction": "Say who.", "output": "Mira."}),
        ("messages", {"messages": CHAT[:-1]}, {"messages": CHAT}),
        ("messages", {"messages": CHAT[:2]}, {"messages": CHAT[:3]}),
    ],
)
def test_task_ppo_needs_no_answer_in_the_data(format, asked, answered):
    without, given = encode(format, [asked, answered], task="ppo")
    assert said(without) == tokenizer().eos_token
    start = np.flatnonzero(given.target[1:] & ~given.target[:-1])[-1] + 1  # where the last answer begins
    assert without.tokens[:-1].tolist() == given.tokens[:start].tolist()
    assert isinstance(encode(format, [asked])[0], RowError) or format == "messages"


def test_task_ppo_takes_the_prompts_of_preferences_and_the_chosen_answers():
    [pair], [alone] = (encode("preference", [GOOD["preference"]], task=task) for task in ("dpo", "ppo"))
    assert alone.rejected is None
    assert alone.tokens.tolist() == pair.tokens.tolist()
    assert alone.target.tolist() == pair.target.tolist()


def test_a_conversation_that_the_template_refuses_is_a_fault_for_ppo_too():
    [refused] = encode("messages", [{"messages": CHAT[:2]}], task="ppo", chat_template="{{ raise_exception('no') }}")
    assert "the chat template refuses the conversation: no" in refused.reason


def test_a_long_sample_is_cut_on_the_right_or_dropped():
    (cut,) = fit(sample_of(False, False, True, True), 3)
    assert (cut.tokens.tolist(), cut.target.tolist(), cut.truncated) == ([0, 1, 2], [False, False, True], True)
    assert fit(sample_of(False, False, True, True), 2) == []
    assert fit(sample_of(False, True), 2)[0].truncated is False


def test_nothing_predicts_the_first_token():
    assert fit(sample_of(True, True), 8)[0].target.tolist() == [False, True]
    assert fit(sample_of(True), 8) == []
