"""The fixtures that many tests share: the tiny model, and the S3 server moto."""

from __future__ import annotations

from pathlib import Path

from tests.support.s3 import BUCKETS, S3


def test_the_tiny_model_loads_and_its_tokenizer_reads_any_text(tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    text = "Ünïcode, 123 and\ttabs"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert max(ids) < model.config.vocab_size
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_chat_grows_by_appending(tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    question, answer = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada."}
    asked = tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
    answered = tokenizer.apply_chat_template([question, answer], tokenize=False)
    assert answered.startswith(asked)
    assert answered == asked + "Ada.</s>\n"


def test_moto_is_empty_and_reached_through_the_environment(moto: S3) -> None:
    import s3fs

    fs = s3fs.S3FileSystem()
    fs.pipe("corpus/a/b.txt", b"there")
    assert moto.filesystem().cat("corpus/a/b.txt") == b"there"
    assert sorted(fs.ls("")) == sorted(BUCKETS)


def test_moto_was_emptied_since(moto: S3) -> None:
    assert moto.filesystem().find("corpus") == []
