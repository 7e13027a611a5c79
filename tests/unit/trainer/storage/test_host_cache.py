"""One cache folder of several users: side by side, or a sentence; and what a killed process has left there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.unit.trainer.data.data_support import memory
from trainer.data.loading.disk_cache import cache_root, open_cache
from trainer.errors import InputError
from trainer.model import fetch_model
from trainer.model.files.weight_cache import open_weight_cache, weights_root
from trainer.recipe import ModelSection
from trainer.storage import open_storage
from trainer.storage.host_cache import host_cache, make_own
from trainer.storage.locks import hold_folder

OTHER = 65534
ELSEWHERE = open_storage("s3://bucket/data")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")


@contextmanager
def user(uid: int) -> Iterator[None]:
    """The process as another user, to whom the files that it makes belong. What it imports has to be imported before:
    the checkout need not be readable for them."""
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def url(tiny_model: Path) -> str:
    storage = memory()
    for file in tiny_model.iterdir():
        storage.upload(file.name, file)
    return storage.url


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that everybody may write to, as a site has it, outside of what pytest keeps from others."""
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="muster-shared-"))
    folder.chmod(0o1777)
    monkeypatch.setenv("MUSTER_CACHE", str(folder))
    yield folder
    shutil.rmtree(folder)


@as_root
def test_two_users_of_one_folder_work_side_by_side(shared: Path, url: str) -> None:
    section = ModelSection(path=url)
    first = fetch_model(section)
    assert first.folder.parent == shared / "models"
    with user(OTHER):
        second = fetch_model(section)
        assert (second.folder / "config.json").is_file()
        assert second.fetched_bytes == first.fetched_bytes
        assert fetch_model(section).fetched_bytes == 0
        cache = open_weight_cache(weights_root() / "m")
        assert cache is not None
        assert cache.get("w", 0, 3, lambda a, b: b"abc") == b"abc"
        assert not cache.blocks.given_up
        cache.close()
        blocks = open_cache(ELSEWHERE, "d", 1 << 20)
        assert blocks is not None
        blocks.close()
    assert second.folder.parent == shared / f"user-{OTHER}" / "models"
    assert cache_root() == shared / "blocks"
    assert fetch_model(section) == type(first)(first.folder)


@as_root
def test_a_folder_that_another_user_has_closed_is_a_sentence(shared: Path, url: str) -> None:
    fetch_model(ModelSection(path=url))
    shared.chmod(0o700)
    with user(OTHER):
        with pytest.raises(InputError, match=r"model cache .* cannot take .* set MUSTER_CACHE to a writable folder"):
            fetch_model(ModelSection(path=url))
        assert open_weight_cache(weights_root() / "m") is None  # a warning: the weights are read from their source
        assert open_cache(ELSEWHERE, "d", 1 << 20) is None


@as_root
def test_a_folder_that_another_user_made_in_ones_name_is_not_trusted(shared: Path, url: str) -> None:
    own = shared / "models"
    own.mkdir()
    os.chown(own, OTHER, OTHER)
    with pytest.raises(InputError, match="belongs to another user"):
        fetch_model(ModelSection(path=url))
    with pytest.raises(PermissionError, match="belongs to another user"):
        make_own(own)


def test_who_made_the_folder_uses_it_as_it_is_and_others_have_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MUSTER_CACHE", str(tmp_path))
    assert host_cache(Path("x")) == tmp_path
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    assert host_cache(Path("x")) == tmp_path / "user-4711"
    monkeypatch.delenv("MUSTER_CACHE")
    assert host_cache(tmp_path / "new") == tmp_path / "new"


def test_what_a_killed_process_left_of_a_model_is_cleared_and_not_used(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MUSTER_CACHE", str(tmp_path))
    whole = fetch_model(ModelSection(path=url)).folder
    half = whole.with_name(f"{whole.name}.abcdefgh")
    whole.rename(half)
    (half / "config.json").write_text('{"half": ')
    again = fetch_model(ModelSection(path=url))
    assert again.fetched_bytes > 0
    assert again.folder == whole
    assert [path.name for path in whole.parent.iterdir() if path.is_dir()] == [whole.name]


def test_folders_that_are_made_are_for_their_user_alone(tmp_path: Path) -> None:
    make_own(tmp_path / "a" / "b")
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("a", "a/b")] == [0o700, 0o700]
    os.close(hold_folder(tmp_path / "a" / "b" / "c"))
