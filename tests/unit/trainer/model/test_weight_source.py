"""Weights are read by ranges, once per host where they come from object storage, and never from torn copies."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from trainer.errors import CorruptObject, InputError
from trainer.model.files import weight_cache
from trainer.model.files.safetensors_index import read_headers
from trainer.model.files.weight_cache import BLOCK, WeightCache
from trainer.model.files.weight_source import WeightSource
from trainer.storage import open_storage

SIZE = 2 * BLOCK + 12345


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MUSTER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "weights"


@pytest.fixture(scope="module")
def body() -> bytes:
    return (
        torch.randint(0, 256, (SIZE,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)).numpy().tobytes()
    )


@pytest.fixture
def remote(tmp_path: Path, body: bytes) -> str:
    url = f"memory://weights-{tmp_path.name}"
    open_storage(url).write("w.safetensors", body)
    return url


RANGES = [(0, 8), (5, BLOCK + 5), (BLOCK - 1, BLOCK + 1), (2 * BLOCK, SIZE), (SIZE - 1, SIZE)]


def test_ranges_are_the_file_s(remote: str, body: bytes, tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(body)
    for location in (remote, str(tmp_path)):
        source = WeightSource(location)
        for start, stop in RANGES:
            assert source.read("w.safetensors", start, stop) == body[start:stop]
        with pytest.raises(CorruptObject, match="ends before byte"):
            source.read("w.safetensors", SIZE - 1, SIZE + 1)
        source.close()


def test_a_folder_is_read_to_the_byte_and_counted(tmp_path: Path, body: bytes, cache: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(body)
    source = WeightSource(str(tmp_path))
    source.read("w.safetensors", 3, 1003)
    assert source.bytes_fetched == 1000
    assert not cache.exists(), "what lies on this host needs no copy"


def test_ranks_of_one_host_fetch_each_byte_once(remote: str, body: bytes) -> None:
    ranks = [WeightSource(remote) for _ in range(4)]
    half = [(0, SIZE // 2), (SIZE // 2, SIZE)]

    def load(rank: int) -> bool:
        start, stop = half[rank % 2]
        ranks[rank].ahead([("w.safetensors", start, stop)])
        return ranks[rank].read("w.safetensors", start, stop) == body[start:stop]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(load, range(4)))
    for source in ranks:
        source.close()
    assert sum(source.bytes_fetched for source in ranks) == SIZE
    again = WeightSource(remote)
    assert again.read("w.safetensors", 0, SIZE) == body
    assert again.bytes_fetched == 0, "another attempt on this host reads nothing"


def test_one_fetch_at_a_time_per_block(tmp_path: Path) -> None:
    """Who comes second waits, and finds the block."""
    first, second = WeightCache(tmp_path / "m"), WeightCache(tmp_path / "m")
    fetching, go_on = threading.Event(), threading.Event()
    fetched: list[str] = []

    def slow(start: int, stop: int) -> bytes:
        fetched.append("first")
        fetching.set()
        assert go_on.wait(20)
        return b"x" * (stop - start)

    def never(start: int, stop: int) -> bytes:
        fetched.append("second")
        return b"y" * (stop - start)

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(first.get, "f", 0, 100, slow)
        assert fetching.wait(20)
        two = pool.submit(second.get, "f", 0, 100, never)
        go_on.set()
        assert one.result(20) == two.result(20) == b"x" * 100
    assert fetched == ["first"]


@pytest.mark.parametrize("harm", ["cut", "changed", "removed"])
def test_a_torn_or_evicted_block_is_fetched_again(remote: str, body: bytes, cache: Path, harm: str) -> None:
    source = WeightSource(remote)
    assert source.read("w.safetensors", 0, SIZE) == body
    source.close()
    block = next(cache.glob("*/w.safetensors.1"))
    raw = block.read_bytes()
    if harm == "cut":
        block.write_bytes(raw[:-100])
    elif harm == "changed":
        block.write_bytes(raw[:7] + bytes([raw[7] ^ 1]) + raw[8:])
    else:
        block.unlink()
    again = WeightSource(remote)
    assert again.read("w.safetensors", 0, SIZE) == body
    assert again.bytes_fetched == BLOCK
    assert block.read_bytes() == raw


def test_a_full_disk_is_a_warning(
    remote: str, body: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(weight_cache, "FREE_SHARE", 2.0)
    monkeypatch.setattr(weight_cache, "FREE_BYTES", 2**62)
    source = WeightSource(remote)
    with caplog.at_level(logging.WARNING):
        assert source.read("w.safetensors", 10, BLOCK + 10) == body[10 : BLOCK + 10]
        assert source.read("w.safetensors", 0, SIZE) == body
    said = [r.message for r in caplog.records if "MUSTER_CACHE" in r.message]
    assert len(said) == 1
    assert "would be left free" in said[0]


def test_a_cache_that_cannot_be_made_is_a_warning(
    remote: str, body: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MUSTER_CACHE", str(tmp_path / "file"))
    source = WeightSource(remote)
    source.ahead([("w.safetensors", 0, SIZE)])
    assert source.read("w.safetensors", 5, 50) == body[5:50]
    assert source.bytes_fetched == 45, "without a cache, exactly what is asked for"
    source.close()


def test_room_is_made_by_models_that_nobody_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, old, new = (WeightCache(tmp_path / name) for name in ("kept", "old", "new"))
    for cache in (kept, old):
        cache.get("f", 0, 10, lambda a, b: b"x" * (b - a))
    old.close()
    monkeypatch.setattr(weight_cache, "_has_room", lambda folder, size: not (tmp_path / "old").exists())
    new.get("f", 0, 10, lambda a, b: b"x" * (b - a))
    assert {f.name for f in tmp_path.iterdir()} == {"kept", "new"}
    assert not new.blocks.given_up


def test_a_model_that_changes_while_it_is_read_is_refused(remote: str) -> None:
    source = WeightSource(remote)
    source.read("w.safetensors", 0, 8)
    source.check_unchanged(["w.safetensors"])
    open_storage(remote).write("w.safetensors", b"other" * 1000)
    with pytest.raises(InputError, match=r"w\.safetensors changed while it was read"):
        source.check_unchanged(["w.safetensors"])


def save(folder: Path, tensors: dict[str, torch.Tensor], files: int = 1) -> None:
    names = list(tensors)
    if files == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    weight_map = {}
    for i in range(files):
        part = f"model-{i + 1:05d}-of-{files:05d}.safetensors"
        save_file({n: tensors[n] for n in names[i::files]}, folder / part, {"format": "pt"})
        weight_map |= dict.fromkeys(names[i::files], part)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@settings(max_examples=25)
@given(
    shapes=st.lists(st.lists(st.integers(0, 7), max_size=3), min_size=2, max_size=6),
    files=st.integers(1, 2),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.uint8]),
)
def test_headers_say_where_each_tensor_lies(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[list[int]], files: int, dtype: torch.dtype
) -> None:
    folder = tmp_path_factory.mktemp("headers")
    tensors = {f"t{i}": torch.randint(0, 200, tuple(shape)).to(dtype) for i, shape in enumerate(shapes)}
    save(folder, tensors, files)
    source = WeightSource(str(folder))
    found = read_headers(source, str(folder))
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        place = found[name]
        raw = source.read(place.file, place.start, place.start + place.bytes)
        assert (place.shape, place.dtype) == (tuple(tensor.shape), tensor.dtype)
        assert raw == tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else raw == b""
    source.close()


def _cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])


def _no_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)


def _empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _missing_part(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save(folder, tensors, 2)
    next(folder.glob("model-00002*")).unlink()


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (_cut, "is torn: it has"),
        (_no_header, "and no readable header"),
        (_empty, "is torn: it has 0 bytes and no readable header"),
        (_no_weights, "holds no weights in safetensors"),
        (_missing_part, "lacks weight files .model-00002"),
    ],
)
def test_broken_files_are_the_users_to_mend(tmp_path: Path, harm: Callable[[Path], None], said: str) -> None:
    save(tmp_path, {"a": torch.ones(3, 4), "b": torch.ones(5)})
    harm(tmp_path)
    source = WeightSource(str(tmp_path))
    with pytest.raises(InputError, match=said):
        read_headers(source, str(tmp_path))
    source.close()
    shutil.rmtree(tmp_path)
