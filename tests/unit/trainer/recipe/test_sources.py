"""Sources in a recipe: known data sets by name, and settings that cannot stand together."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from tests.unit.trainer.data.data_support import tokenizer, write_rows
from tests.unit.trainer.recipe.test_mistakes import GOOD, mistakes
from trainer.data import describe, freeze, prepare_dataset
from trainer.data.blocks import decode_block
from trainer.data.formats.columns import Columns
from trainer.data.formats.qa import example_of
from trainer.data.sample import Sample
from trainer.data.spec import FrozenSource
from trainer.recipe import dump, loads, parse, schema
from trainer.recipe.formats import FORMATS
from trainer.recipe.sections.data import SourceSection
from trainer.recipe.sections.datasets import DATASETS
from trainer.storage import open_storage

# One row of each data set, in the columns and types that it is published with.
ROWS: dict[str, dict[str, Any]] = {
    "alpaca": {
        "instruction": "Name a fruit.",
        "input": "",
        "output": "Apple.",
        "text": "Below is an instruction…",
    },
    "code_feedback": {
        "id": 1,
        "messages": [{"role": "user", "content": "Sort it."}, {"role": "assistant", "content": "sorted(x)"}],
    },
    "glue/mrpc": {"sentence1": 'He said "no".', "sentence2": "He declined.", "label": 1, "idx": 0},
    "glue/qqp": {"question1": "Why?", "question2": "How come?", "label": 1, "idx": 0},
    "glue/sst2": {"idx": 0, "sentence": "a stirring film ", "label": 1},
    "gsm8k": {"question": "What is 1 + 1?", "answer": "It is <<1+1=2>>2.\n#### 2"},
    "imdb": {"text": "I rented it.<br />Bad.", "label": 0},
    "metamath_qa": {
        "type": "MATH_AnsAug",
        "query": "What is 1 + 1?",
        "original_question": "What is 1 + 1?",
        "response": "It is 2. The answer is: 2",
    },
    "nq_open": {"question": "who is it", "answer": ["Mira", "the baker"]},
    "trivia_qa": {
        "question": "Who is it?",
        "question_id": "tc_1",
        "question_source": "http://example.org/",
        "entity_pages": {"doc_source": [], "filename": [], "title": [], "wiki_context": []},
        "search_results": {
            "description": [],
            "filename": [],
            "rank": [],
            "title": [],
            "url": [],
            "search_context": [],
        },
        "answer": {
            "aliases": ["Mira", "Mira the Baker"],
            "normalized_aliases": ["mira", "mira baker"],
            "matched_wiki_entity_name": "",
            "normalized_matched_wiki_entity_name": "",
            "normalized_value": "mira",
            "type": "WikipediaEntity",
            "value": "Mira",
        },
    },
}

SAID = {
    "alpaca": "Apple.</s>",
    "code_feedback": "sorted(x)</s>",
    "gsm8k": " It is <<1+1=2>>2.\n#### 2</s>",
    "metamath_qa": "It is 2. The answer is: 2</s>",
    "nq_open": " Mira</s>",
    "trivia_qa": " Mira</s>",
}
LABELS = {"glue/mrpc": "equivalent", "glue/qqp": "duplicate", "glue/sst2": "positive", "imdb": "neg"}


def of(**source: Any) -> SourceSection:
    return SourceSection.model_validate(source)


def with_source(part: str = "train", **source: Any) -> dict[str, Any]:
    data = copy.deepcopy(GOOD)
    data["data"][part] = [source]
    return data


@pytest.mark.parametrize("name", DATASETS)
def test_a_known_data_set_reads_the_rows_that_it_is_published_with(name: str, tmp_path: Any) -> None:
    copied = of(dataset=name, path=str(write_rows(tmp_path / "copy.jsonl", [ROWS[name]])))
    spec = describe(freeze([copied]), tokenizer(), sequence_length=512, packing=False)
    prepared = prepare_dataset(spec, tokenizer(), open_storage(str(tmp_path / "prepared")))
    assert prepared.totals.samples == 1
    index = prepared.index(0)
    sample: Sample = decode_block(prepared.block_bytes(0, int(index.block[0]))).sample(0)
    if name in SAID:
        assert tokenizer().decode(sample.tokens[sample.target]) == SAID[name]
    else:
        assert sample.label is not None
        assert spec.labels[sample.label] == LABELS[name]
        assert copied.labels == spec.labels


def test_the_other_answers_of_a_known_data_set_are_kept() -> None:
    for name, answers in (("trivia_qa", ("Mira", "Mira the Baker")), ("nq_open", ("Mira", "the baker"))):
        section = of(dataset=name)
        example = example_of(ROWS[name], Columns(FrozenSource("x", "qa", (), section.columns)))
        assert getattr(example, "answers", None) == answers


def test_a_name_fills_in_what_the_recipe_leaves_out() -> None:
    plain = of(dataset="gsm8k")
    assert (plain.path, plain.format, plain.split) == ("hf://openai/gsm8k/main", "qa", None)
    copied = of(dataset="trivia_qa", path="s3://b/t.jsonl", columns={"answer": "answer"}, weight=2)
    assert copied.columns == {"question": "question", "answer": "answer", "aliases": "answer.aliases"}
    assert (copied.path, copied.weight) == ("s3://b/t.jsonl", 2)
    other = of(dataset="gsm8k", format="completion", template="{question}", columns={"completion": "answer"})
    assert other.columns == {"completion": "answer"}
    assert of(dataset="imdb", labels=["bad", "good"]).labels == ("bad", "good")
    assert of(dataset="imdb", format="text").labels is None


def test_a_recipe_with_a_known_data_set_is_frozen_in_full() -> None:
    recipe = parse(with_source(dataset="gsm8k"))
    text = dump(recipe)
    assert "path: hf://openai/gsm8k/main" in text
    assert loads(text) == recipe


def test_an_unknown_data_set_is_the_one_mistake() -> None:
    ((path, message),) = mistakes(with_source(dataset="gsm9k"))
    assert path == "data.train.0.dataset"
    assert "is not one of: alpaca, code_feedback" in message
    assert message.endswith("did you mean 'gsm8k'?")


@pytest.mark.parametrize(
    ("data", "path", "says"),
    [
        (with_source(), "data.train.0.path", "is missing"),
        (with_source(path="x.csv", format="text", split="test"), "data.train.0.split", "has no effect on files"),
        (
            with_source(path="x.csv", format="text", labels=["a", "b"]),
            "data.train.0.labels",
            "no effect with format text",
        ),
        (
            with_source(path="x.txt", format="text", sample_by="page"),
            "data.train.0.sample_by",
            "not one of: line, docu",
        ),
        (
            with_source(path="x", format="qa", template="{question}"),
            "data.train.0.template",
            "only completion, instruction, classification take a template",
        ),
        (with_source(path="x", format="qa", columns={"quest": "q"}), "data.train.0.columns.quest", "'question'"),
        (
            with_source(path="x", format="preference"),
            "data.train.0.format",
            "sft does not learn from format preference",
        ),
        (with_source(dataset="imdb"), "data.train.0.format", "it takes completion, messages, instruction, qa, text"),
    ],
)
def test_what_cannot_stand_is_a_mistake(data: dict[str, Any], path: str, says: str) -> None:
    found = dict(mistakes(data))
    assert says in found[path]


def test_pairs_are_not_packed() -> None:
    data = with_source(path="x", format="preference")
    assert "write packing: false" in dict(mistakes(data))["data.packing"]
    data["data"]["packing"] = False
    assert "data.packing" not in dict(mistakes(data))


def test_evaluation_data_of_the_hub_name_their_split() -> None:
    data = with_source(dataset="gsm8k")
    data["data"]["eval"] = [{"dataset": "gsm8k"}]
    ((path, message),) = mistakes(data)
    assert path == "data.eval.0.path"
    assert "add split: test" in message
    data["data"]["eval"] = [
        {"dataset": "gsm8k", "split": "test"},
        {"path": "hf://datasets/a/b/x.csv", "format": "text"},
    ]
    assert parse(data).data.eval[0].split == "test"


def test_labels_are_told_apart() -> None:
    for labels in (["a", "a"], ["a"]):
        found = dict(mistakes(with_source(path="x", format="classification", labels=labels)))
        assert "two labels or more" in found["data.train.0.labels"]


def test_every_format_says_which_columns_it_reads() -> None:
    assert all(set(row.optional) < set(row.columns) for _, row in FORMATS.items())


def test_the_schema_takes_a_data_set_instead_of_path_and_format() -> None:
    section = schema()["$defs"]["SourceSection"]
    assert section["required"] == []
    assert section["anyOf"] == [{"required": ["path", "format"]}, {"required": ["dataset"]}]
    assert set(section["properties"]["dataset"]["enum"]) == {*DATASETS, None}
    json.dumps(section)
