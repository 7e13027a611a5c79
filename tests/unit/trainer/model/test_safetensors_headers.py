"""Headers of safetensors files that somebody has made up: one sentence from every reader, in bounds."""

from __future__ import annotations

import json
import shutil
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.saved import adapter_of, trained
from tests.support.training import write_pairs
from trainer.artifacts import ArtifactRef, find, load
from trainer.artifacts.inspect import describe
from trainer.errors import InputError
from trainer.model import check_weights
from trainer.model.files.safetensors_header import LARGEST_HEADER, BadHeader, read_header
from trainer.model.files.safetensors_index import read_headers
from trainer.model.files.weight_source import WeightSource
from trainer.model.placement import Placement
from trainer.recipe import ModelSection

F32 = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


def made(header: object, body: int = 16) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"\0" * body


def one(**changes: Any) -> bytes:
    return made({"a": {**F32, **changes}})


NESTED = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
WRONG: dict[str, tuple[bytes, str]] = {
    "a length of 2**60": (struct.pack("<Q", 2**60) + b"{}" + b"\0" * 16, "no readable header"),
    "a length of 2**64 - 1": (b"\xff" * 64, "no readable header"),
    "nothing": (b"", "it has 0 bytes and no readable header"),
    "no JSON": (made(b"{" * 9), "no readable header"),
    "no text": (made(b"\xff\xfe{}"), "no readable header"),
    "a list": (made([F32]), "no readable header"),
    "deep nesting": (made(NESTED), "no readable header"),
    "a number of 10,000 digits": (made(b'{"a":' + b"1" * 10_000 + b"}"), "no readable header"),
    "no mapping": (made({"a": 1}), "its tensor 'a' is no mapping"),
    "no offsets": (made({"a": {"dtype": "F32", "shape": [2, 2]}}), "has the invalid data_offsets None"),
    "offsets outside": (one(data_offsets=[2**40, 2**40 + 16]), "and its header describes"),
    "offsets backwards": (one(data_offsets=[16, 0]), r"has the invalid data_offsets \[16, 0\]"),
    "offsets below 0": (one(data_offsets=[-16, 0]), r"has the invalid data_offsets \[-16, 0\]"),
    "offsets of text": (one(data_offsets=["0", "16"]), "has the invalid data_offsets"),
    "offsets without end": (
        made(b'{"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,1e999]}}'),
        "has the invalid data_offsets",
    ),
    "a negative shape": (one(shape=[-2, -2]), r"has the invalid shape \[-2, -2\]"),
    "a huge shape": (one(shape=[2**62, 2**62]), "in 16 bytes"),
    "a shape of booleans": (one(shape=[True, 4]), "has the invalid shape"),
    "another size": (one(shape=[2, 3]), r"has the shape \[2, 3\] in 16 bytes"),
    "an unknown type": (one(dtype="F31"), "is of the unknown type 'F31'"),
    "a type that is a list": (one(dtype=["F32"]), "is of the unknown type"),
    "tensors over each other": (made({"a": F32, "b": F32}), "overlaps another, at byte"),
    "a hole": (made({"a": F32, "b": {**F32, "data_offsets": [32, 48]}}, 48), "begins after a gap, at byte"),
    "too few bytes": (made({"a": F32}, 8), "and its header describes"),
}


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("headers") / "model"
    shutil.copytree(tiny_model, folder)
    return folder


@pytest.mark.parametrize("what", WRONG)
def test_a_base_with_such_a_header_is_refused_in_a_sentence(what: str, model: Path, tmp_path: Path) -> None:
    raw, said = WRONG[what]
    (model / "model.safetensors").write_bytes(raw)
    section = ModelSection(path=str(model), dtype="float32")
    with pytest.raises(InputError, match=f"is torn: .*{said}.*; copy the model again"):
        check_weights(section)
    source = WeightSource(str(model))
    try:
        with pytest.raises(InputError, match=f"is torn: .*{said}.*; copy the model again"):
            read_headers(source, str(model))
    finally:
        source.close()
    with pytest.raises(InputError, match=r"model\.path .* cannot be loaded as a causal language model"):
        load(find(ArtifactRef(model=str(model)), tmp_path), Placement.on("cpu"), None)


def test_what_safetensors_writes_is_read(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(3, 4), "b": torch.ones(5, dtype=torch.bfloat16), "none": torch.empty(0, 7)}
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    raw = (tmp_path / "x.safetensors").read_bytes()
    found = read_header(lambda start, stop: raw[start:stop], len(raw))
    assert {n: e.shape for n, e in found.items()} == {n: tuple(t.shape) for n, t in tensors.items()}
    assert {n: e.stop - e.start for n, e in found.items()} == {n: t.nbytes for n, t in tensors.items()}


def test_a_header_of_100_mb_is_not_even_read() -> None:
    asked = []

    def read(start: int, stop: int) -> bytes:
        asked.append(stop - start)
        return struct.pack("<Q", 100 * 10**6)

    with pytest.raises(BadHeader, match=f"its header has 100000000 bytes, and {LARGEST_HEADER} are read at most"):
        read_header(read, 2 * 10**8)
    assert asked == [8]


@pytest.mark.parametrize("filling", [b"[],", b"{},", b"1,", b'"",', b"null,"])
def test_the_largest_header_takes_bounded_memory(filling: bytes) -> None:
    text = b"[" + filling * ((LARGEST_HEADER // 8 - 8) // len(filling)) + b"0]"
    raw = struct.pack("<Q", len(text)) + text
    tracemalloc.start()
    try:
        with pytest.raises(BadHeader):
            read_header(lambda start, stop: raw[start:stop], len(raw))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 40 * len(text), "of the largest: about a gigabyte"


@pytest.mark.parametrize("what", WRONG)
def test_an_adapter_with_such_a_header_is_refused_in_a_sentence(
    what: str, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    folder = _folder(tmp_path_factory)
    recipe = trained("headers", tiny_model, folder)
    adapter = tmp_path / "adapter"
    shutil.copytree(adapter_of(recipe), adapter)
    (adapter / "adapter_model.safetensors").write_bytes(WRONG[what][0])
    subject = find(ArtifactRef(adapters=(("default", str(adapter)),)), tmp_path / "found")
    with pytest.raises(InputError, match="the adapter does not fit the base"):
        load(subject, Placement.on("cpu"), None)
    found = describe(str(adapter))
    assert not found.whole
    assert all("\n" not in problem for problem in found.problems)
    assert load_file(adapter_of(recipe) / "adapter_model.safetensors")


_made: list[Path] = []


def _folder(factory: pytest.TempPathFactory) -> Path:
    if not _made:
        _made.append(factory.mktemp("headers-runs"))
        write_pairs(_made[0] / "data" / "a.jsonl", 60)
    return _made[0]
