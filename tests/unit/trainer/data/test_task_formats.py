"""The formats beyond prompts and conversations: what each makes of a row, and how it reaches a batch."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest

from tests.unit.trainer.data.data_support import memory, source, tokenizer, write_rows
from tests.unit.trainer.data.test_formats import CHAT, encode, said
from trainer.chat_templates.template import named_template
from trainer.data import Batch, PreparationSpec, describe, eval_batches, freeze, prepare_dataset
from trainer.data.blocks import decode_block, encode_block, part_of_row, sample_id
from trainer.data.formats.columns import Columns
from trainer.data.formats.instruction import PROMPT, PROMPT_WITH_INPUT
from trainer.data.formats.qa import Example, example_of
from trainer.data.label_names import label_name
from trainer.data.prepare.label_set import label_set
from trainer.data.sample import RowError, Sample, fit
from trainer.data.spec import FrozenObject, FrozenSource
from trainer.errors import InputError


def text_of(sample):
    return tokenizer().decode(sample.tokens)


def prepared_of(tmp_path, rows, format, packing=False, sequence_length=64, **more):
    chosen = source(write_rows(tmp_path / f"{format}.jsonl", rows), format, **more)
    spec = describe(freeze([chosen]), tokenizer(), sequence_length=sequence_length, packing=packing)
    return prepare_dataset(spec, tokenizer(), memory())


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"instruction": "Add.", "input": "1 {2}", "output": "3"}, PROMPT_WITH_INPUT),
        ({"instruction": "Add.", "input": " ", "output": "3"}, PROMPT),
        ({"instruction": "Add.", "input": None, "output": "3"}, PROMPT),
        ({"instruction": "Add.", "output": "3"}, PROMPT),
    ],
)
def test_instruction_is_alpacas_prompt(row, prompt):
    (sample,) = encode("instruction", [row], sequence_length=512)
    plain = {"prompt": prompt.format(instruction="Add.", input=row.get("input")), "completion": "3"}
    assert sample.tokens.tolist() == encode("completion", [plain])[0].tokens.tolist()
    assert said(sample) == "3</s>"


def test_an_instructions_template_takes_the_place_of_the_prompt():
    row = {"q": "Add.", "output": "3"}
    (sample,) = encode("instruction", [row], template="Do: {instruction} ", columns={"instruction": "q"})
    assert text_of(sample) == "<s>Do: Add. 3</s>"


def test_an_input_that_the_recipe_maps_has_to_be_there():
    (fault,) = encode("instruction", [{"instruction": "x", "output": "y"}], columns={"input": "context"})
    assert "'context' is missing" in fault.reason


@pytest.mark.parametrize("question", ["Who?", "Question: Who?\nAnswer:", " Question:Who?\nAnswer: ", "Who?\nAnswer:"])
def test_qa_has_one_frame_whatever_it_came_with(question):
    (sample,) = encode("qa", [{"question": question, "answer": "Mira"}])
    assert text_of(sample) == "<s>Question: Who?\nAnswer: Mira</s>"
    assert said(sample) == " Mira</s>"


@pytest.mark.parametrize(
    ("row", "answers"),
    [
        ({"answer": "a"}, ("a",)),
        ({"answer": ["a", " b ", "a", ""]}, ("a", "b")),
        ({"answer": "a", "aliases": ["b", "a"]}, ("a", "b")),
        ({"answer": [], "aliases": ["b"]}, ("b",)),
        ({"answer": 18}, ("18",)),
    ],
)
def test_qa_trains_on_the_first_answer_and_keeps_all(row, answers):
    example = example_of({"question": "Who?", **row}, Columns(FrozenSource("x", "qa", ())))
    assert example == Example("Question: Who?\nAnswer:", answers)
    assert said(encode("qa", [{"question": "Who?", **row}])[0]) == f" {answers[0]}</s>"


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"answer": []}, "there is no answer"),
        ({"answer": ""}, "there is no answer"),
        ({"answer": {"value": "a"}}, "text or a list of texts, not dict"),
        ({"answer": "a", "aliases": [True]}, "not bool"),
        ({}, "'answer' is missing"),
    ],
)
def test_a_question_without_an_answer_is_a_fault(row, says):
    (fault,) = encode("qa", [{"question": "Who?", **row}])
    assert says in fault.reason


def test_columns_lead_into_mappings():
    row = {"q": {"text": "Who?"}, "answer": {"value": "Mira", "aliases": ["she"]}, "a.b": "plain"}
    columns = Columns(FrozenSource("x", "qa", (), {"question": "q.text", "answer": "answer.value", "aliases": "a.b"}))
    assert example_of(row, columns) == Example("Question: Who?\nAnswer:", ("Mira", "plain"))
    (fault,) = encode("qa", [row], columns={"question": "q.nothing"})
    assert "the row's columns: a.b, answer, q" in fault.reason


def test_text_is_learnt_whole_and_ends_once():
    (sample, empty) = encode("text", [{"text": "Mira is a baker."}, {"text": ""}])
    assert text_of(sample) == "<s>Mira is a baker.</s>"
    assert text_of(fit(sample, 64)[0]) == text_of(sample)
    assert said(fit(sample, 64)[0]) == "Mira is a baker.</s>"
    assert empty.tokens.tolist() == [tokenizer().bos_token_id, tokenizer().eos_token_id]


@pytest.mark.parametrize("length", [2, 3, 5, 9, 10, 11])
def test_a_long_text_is_cut_into_samples_that_miss_no_target(length):
    sample = Sample(np.arange(10, dtype=np.int32), np.ones(10, np.bool_), splits=True)
    pieces = fit(sample, length)
    assert [t for p in pieces for t in p.tokens[p.target].tolist()] == list(range(1, 10))
    assert all(1 < len(p.tokens) <= length and not p.target[0] and not p.truncated for p in pieces)


def test_the_parts_of_a_text_have_names_of_their_own(tmp_path):
    prepared = prepared_of(tmp_path, [{"text": "in Ashford " * 40}, {"text": "Mira"}], "text", True, 16)
    index = prepared.index(0)
    ids = [index.sample_id(i) for i in range(len(index))]
    assert ids == ["0:0/0", *(f"0:0/0+{i}" for i in range(1, len(ids) - 1)), ids[-1]]
    assert len(set(ids)) == prepared.totals.samples > 4
    assert prepared.totals.rows == 2
    assert (prepared.totals.truncated, prepared.totals.dropped) == (0, 0)
    assert sample_id(1, 2, part_of_row((1 << 40) - 1, 3)) == f"1:2/{(1 << 40) - 1}+3"


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
TOOL_CHAT = [
    {"role": "user", "content": "Rain?"},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "weather", "arguments": {"x": None}}}]},
    {"role": "tool", "content": "dry"},
    {"role": "assistant", "content": "No."},
]
TOOL_TEMPLATE = (
    "{% if tools %}{{ tools[0].function.name }};{% endif %}{% for m in messages %}[{{ m.role }}]{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}call {{ c.function.name }}{{ c.function.arguments }}{% endfor %}|{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
def test_messages_keep_tool_turns_and_pass_the_tools_on(tools):
    (sample,) = encode("messages", [{"messages": TOOL_CHAT, "tools": tools}], chat_template=TOOL_TEMPLATE)
    assert text_of(sample) == "weather;[user]Rain?|[assistant]call weather{}|[tool]dry|[assistant]No.|"
    assert said(sample) == "call weather{}|No.|"
    (plain,) = encode("messages", [{"messages": TOOL_CHAT, "tools": ""}], chat_template=TOOL_TEMPLATE)
    assert text_of(plain).startswith("[user]")


@pytest.mark.parametrize("tools", ["[", '{"a": 1}', 3])
def test_tools_that_are_no_list_are_a_fault(tools):
    (fault,) = encode("messages", [{"messages": TOOL_CHAT, "tools": tools}], chat_template=TOOL_TEMPLATE)
    assert "tools" in fault.reason


def test_sharegpts_turns_are_read_like_others():
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    turns = [{"from": names[m["role"]], "value": m["content"]} for m in CHAT]
    (theirs,) = encode("messages", [{"conversations": turns}], columns={"messages": "conversations"})
    (ours,) = encode("messages", [{"messages": CHAT}])
    assert theirs.tokens.tolist() == ours.tokens.tolist()
    assert theirs.target.tolist() == ours.target.tolist()


def test_preference_texts_are_two_completions_of_one_prompt():
    (pair,) = encode("preference", [{"prompt": "Who? ", "chosen": "Mira.", "rejected": "No one.", "margin": 2}])
    for side, answer in ((pair, "Mira."), (pair.rejected, "No one.")):
        (plain,) = encode("completion", [{"prompt": "Who? ", "completion": answer}])
        assert side.tokens.tolist() == plain.tokens.tolist()
        assert side.target.tolist() == plain.target.tolist()
    assert pair.margin == 2.0


TURN = {"chosen": {"role": "assistant", "content": "Mira."}, "rejected": {"role": "assistant", "content": "No."}}
ASK = {"role": "user", "content": "Who?"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [ASK], **TURN},
        {"prompt": [ASK], "chosen": [TURN["chosen"]], "rejected": [TURN["rejected"]]},
        {"prompt": "Who?", **TURN},
        {"prompt": [ASK], "chosen": "Mira.", "rejected": "No."},
        {"prompt": "Who?", "chosen": [ASK, TURN["chosen"]], "rejected": [ASK, TURN["rejected"]]},
        {
            "conversations": [{"from": "human", "value": "Who?"}],
            "chosen": {"from": "gpt", "value": "Mira."},
            "rejected": {"from": "gpt", "value": "No."},
        },
    ],
)
def test_preference_conversations_come_in_many_shapes(row):
    (pair,) = encode("preference", [row])
    for side, answer in ((pair, "Mira."), (pair.rejected, "No.")):
        (plain,) = encode("messages", [{"messages": [ASK, {"role": "assistant", "content": answer}]}])
        assert side.tokens.tolist() == plain.tokens.tolist()
        assert side.target.tolist() == plain.target.tolist()


def test_only_the_last_answer_of_a_preference_is_a_target():
    (pair,) = encode("preference", [{"prompt": CHAT[:4], **TURN}])
    assert "A baker." in text_of(pair)
    assert said(pair) == "Mira.</s>"


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "x", "chosen": "a"}, "'rejected' is missing"),
        ({"chosen": "a", "rejected": "b"}, "'prompt' is missing"),
        ({"prompt": "x", "chosen": "a", "rejected": "b", "margin": "c"}, "margin has to be a number"),
        ({"prompt": [ASK], "chosen": [ASK], "rejected": [ASK]}, "end with the assistant's answer"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "a list of messages, not int"),
    ],
)
def test_a_pair_that_lacks_something_is_a_fault(row, says):
    (fault,) = encode("preference", [row])
    assert says in fault.reason


def test_a_conversation_without_a_chat_template_is_a_fault():
    bare = copy.deepcopy(tokenizer())
    bare.chat_template = None
    texts, turns = encode(
        "preference", [{"prompt": "x", "chosen": "a", "rejected": "b"}, {"prompt": [ASK], **TURN}], by=bare
    )
    assert isinstance(texts, Sample)
    assert "neither the tokenizer nor the recipe has one" in turns.reason


def test_both_sides_of_a_pair_are_cut_or_it_is_dropped():
    def side(prompt, answer):
        return Sample(np.arange(prompt + answer, dtype=np.int32), np.arange(prompt + answer) >= prompt)

    (pair,) = fit(Sample(*_arrays(side(3, 2)), rejected=side(3, 9), margin=1.0), 6)
    assert (len(pair.tokens), len(pair.rejected.tokens), pair.truncated, pair.margin) == (5, 6, True, 1.0)
    assert fit(Sample(*_arrays(side(3, 2)), rejected=side(7, 2)), 6) == []


def _arrays(sample):
    return sample.tokens, sample.target


def test_pairs_reach_a_batch_chosen_first(tmp_path):
    rows = [{"prompt": f"{i}? ", "chosen": "Mira " * (i + 1), "rejected": "No.", "margin": i} for i in range(3)]
    prepared = prepared_of(tmp_path, rows, "preference")
    batch, rest = eval_batches(prepared, 2, 0, 1)
    assert (batch.pairs, rest.pairs, len(batch.sample_ids)) == (2, 1, 2)
    assert batch.input_ids.shape[0] == 4
    texts = [tokenizer().decode(row[: n.sum()]) for row, n in zip(batch.input_ids, batch.input_ids > 0, strict=True)]
    assert texts == ["<s>0? Mira </s>", "<s>1? Mira Mira </s>", "<s>0? No.</s>", "<s>1? No.</s>"]
    assert batch.margins.tolist() == [0.0, 1.0]
    assert batch.target_tokens == batch.targets.sum()
    assert prepared.totals.tokens == batch.tokens + rest.tokens
    assert prepared.totals.samples == 3


@pytest.mark.parametrize(
    ("value", "name"), [(1, "yes"), ("1", "yes"), (1.0, "yes"), ("yes", "yes"), (" no ", "no"), (0, "no")]
)
def test_classification_labels_are_names_or_numbers(value, name):
    assert label_name(value, ("no", "yes")) == name
    (sample,) = encode("classification", [{"text": "Mira", "label": value}])
    assert sample.label == ("no", "yes").index(name)


def test_numbers_that_are_names_are_no_places():
    assert label_name(1, ("1", "2")) == "1"
    assert isinstance(label_name(0, ("1", "2")), RowError)


def test_a_classified_text_is_the_tokenizers_and_its_last_token_the_target():
    columns = {"text": "a", "text_pair": "b"}
    one, two = (
        encode("classification", [{"a": "Mira is", "b": "a baker.", "label": "yes"}], columns=c)[0]
        for c in ({"text": "a"}, columns)
    )
    assert one.tokens.tolist() == tokenizer()("Mira is")["input_ids"]
    assert two.tokens.tolist() == tokenizer()("Mira is", "a baker.")["input_ids"]
    assert (one.label, two.label) == (1, 1)
    assert np.flatnonzero(two.target).tolist() == [len(two.tokens) - 1]
    (filled,) = encode("classification", [{"a": "Mira", "label": "no"}], template="Say {text}", columns={"text": "a"})
    assert text_of(filled) == "<s>Say Mira"


def test_a_long_classified_text_is_cut_by_the_tokenizer():
    class Bert:
        """A tokenizer with an end that has to stay, and token types, as BERT's."""

        eos_token_id, chat_template = None, None

        def __call__(self, text, pair=None, truncation=False, max_length=None, **_):
            first, second = list(range(10, 10 + len(text))), list(range(60, 60 + len(pair or "")))
            while truncation and len(first) + len(second) > max_length - 3:
                (first if len(first) >= len(second) else second).pop()
            ids = [1, *first, 2, *second, 2]
            return {"input_ids": ids, "token_type_ids": [0] * (len(first) + 2) + [1] * (len(second) + 1)}

    row = {"text": "a" * 9, "text_pair": "b" * 5, "label": "no"}
    (sample,) = encode("classification", [row], by=Bert(), sequence_length=9)
    assert fit(sample, 9) == [sample]
    assert sample.truncated
    assert sample.tokens.tolist() == [1, 10, 11, 12, 2, 60, 61, 62, 2]
    assert sample.token_types.tolist() == [0] * 5 + [1] * 4


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"text": "x", "label": "maybe"}, "'maybe' is neither one of no, yes nor the number of one"),
        ({"text": "x", "label": 0.5}, "text or a whole number, not float"),
        ({"text": "x"}, "'label' is missing"),
        ({"label": "yes"}, "'text' is missing"),
        ({"text": "x", "text_pair": 3, "label": "yes"}, "'text_pair' holds int"),
    ],
)
def test_what_cannot_be_classified_is_a_fault(row, says):
    (fault,) = encode("classification", [row])
    assert says in fault.reason


def test_labels_reach_a_batch_in_the_order_of_its_targets(tmp_path):
    rows = [{"text": "Mira " * (i % 4 + 1), "label": ["yes", "no", "maybe"][i % 3]} for i in range(12)]
    prepared = prepared_of(tmp_path, rows, "classification", packing=True, sequence_length=24)
    assert prepared.spec.labels == ("maybe", "no", "yes")
    batches = list(eval_batches(prepared, 2, 0, 1))
    offsets = sorted(int(i.split("/")[1]) for b in batches for i in b.sample_ids)
    label_at = {at: rows[n]["label"] for n, at in enumerate(offsets)}
    for batch in batches:
        assert [prepared.spec.labels[n] for n in batch.labels] == [
            label_at[int(i.split("/")[1])] for i in batch.sample_ids
        ]
        assert batch.target_tokens == len(batch.labels) == batch.targets.sum()
    assert Batch.empty().labels.shape == (0,)


def test_blocks_of_every_kind_come_back_as_they_went_in():
    def some(n):
        return np.arange(n, dtype=np.int32), np.arange(n) % 2 == 1

    types = np.array([0, 1, 1], np.int8)
    for sample in (
        Sample(*some(3)),
        Sample(*some(3), label=2, token_types=types),
        Sample(*some(3), rejected=Sample(*some(5)), margin=0.5),
    ):
        block = decode_block(encode_block([(0, 0, 0), (0, 0, 1)], [Sample(*some(3), **_others(sample)), sample]))
        again = block.sample(1)
        assert again.tokens.tolist() == sample.tokens.tolist()
        assert again.target.tolist() == sample.target.tolist()
        assert (again.label, again.margin) == (sample.label, sample.margin)
        assert (again.token_types is None) == (sample.token_types is None)
        if sample.rejected is not None:
            assert again.rejected.tokens.tolist() == sample.rejected.tokens.tolist()
        assert block.nbytes > 0


def _others(sample):
    return {n: getattr(sample, n) for n in ("label", "token_types", "rejected", "margin")}


def test_the_label_set_is_found_named_or_refused(tmp_path):
    def found(values, name="x", **more):
        rows = [{"text": "a", "label": v} for v in values]
        return freeze([source(write_rows(tmp_path / f"{name}.jsonl", rows), "classification", **more)])

    assert label_set(found([10, 2, 2, "b", "a", None])) == ("2", "10", "a", "b")
    assert label_set(found([0], labels=["bad", "good"])) == ("bad", "good")
    both = [*found([1, 0], "y"), *found(["1", 2], "z")]
    assert label_set(both) == ("0", "1", "2")
    with pytest.raises(InputError, match=r"x\.jsonl: classification needs at least two labels, and has 1"):
        label_set(found([1, 1]))
    with pytest.raises(InputError, match=r"more than 10000 different values.*columns: \{label: NAME\}"):
        label_set(found(range(10_002)))
    assert isinstance(label_name(-1, ("a", "b")), RowError)


def test_evaluation_takes_the_label_set_of_the_training_data(tmp_path):
    rows = [{"text": "a", "label": v} for v in ("x", "z")]
    frozen = freeze([source(write_rows(tmp_path / "e.jsonl", rows), "classification")])
    spec = describe(frozen, tokenizer(), labels=("x", "y", "z"), sequence_length=16)
    (batch,) = eval_batches(prepare_dataset(spec, tokenizer(), memory()), 4, 0, 1)
    assert sorted(batch.labels.tolist()) == [0, 2]


def test_what_was_prepared_before_there_were_labels_keeps_its_fingerprint():
    frozen = FrozenSource("s3://b/*.jsonl", "completion", (FrozenObject("s3://b/a.jsonl", 7, "e"),), {"prompt": "q"})
    spec = PreparationSpec((frozen,), "tokenizer", 128, version=1)
    assert spec.fingerprint == "15f8c88cd7c824dca8ef63048d48021e"
    labelled = PreparationSpec((FrozenSource("x", "classification", (), labels=("a", "b"), header=("t",)),), "t", 8)
    assert PreparationSpec.from_json(json.loads(json.dumps(labelled.to_json()))) == labelled
    assert labelled.fingerprint != PreparationSpec((FrozenSource("x", "classification", ()),), "t", 8).fingerprint


@pytest.mark.parametrize(("label", "desirable"), [(True, True), (False, False), (1, True), (0, False)])
def test_an_answer_is_good_or_bad(label, desirable):
    row = {"prompt": "Who? ", "completion": "Mira.", "label": label}
    turns = {"prompt": CHAT[1:2], "completion": CHAT[2:3], "label": label}
    for given in (row, turns):
        (sample,) = encode("unpaired_preference", [given], chat_template=named_template("chatml"), task="kto")
        assert sample.desirable is desirable
        assert "baker" in said(sample) or said(sample) == "Mira.</s>"


@pytest.mark.parametrize("label", ["good", 2, None, [True]])
def test_a_label_that_is_neither_is_a_fault(label):
    (fault,) = encode("unpaired_preference", [{"prompt": "Who? ", "completion": "Mira.", "label": label}])
    assert "has to be true (a good answer) or false" in fault.reason
