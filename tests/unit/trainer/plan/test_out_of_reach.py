"""A plan does not wait for a storage or a Hub that never answers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from tests.support.training import small_recipe
from trainer.errors import InputError
from trainer.plan import config, run_length
from trainer.plan.config import read_base
from trainer.plan.run_length import RunLength, RunLengthQuery
from trainer.recipe.sections.model import ModelSection


@pytest.fixture
def silent() -> Iterator[threading.Event]:
    """Waited for by a call that does not answer; set at the end of the test."""
    released = threading.Event()
    yield released
    released.set()


def test_what_is_not_answered_in_time_is_left_out(
    tmp_path: Path, silent: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small_recipe("slow", tmp_path / "model", tmp_path)
    monkeypatch.setattr(run_length, "ANSWER_S", 0.05)
    monkeypatch.setattr(run_length, "_length", lambda _: silent.wait())
    assert RunLengthQuery(recipe, 7.0).outlook() == RunLength(steps=recipe.training.steps, tokens_per_s=7.0)


def test_what_fails_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = small_recipe("broken", tmp_path / "model", tmp_path)
    monkeypatch.setattr(run_length, "_length", lambda _: 1 // 0)
    assert RunLengthQuery(recipe, 5.0).outlook() == RunLength(steps=recipe.training.steps, tokens_per_s=5.0)


@pytest.mark.parametrize("fails", [False, True])
def test_a_hub_that_does_not_answer_is_an_error(
    fails: bool, silent: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*_: Any, local_files_only: bool, **__: Any) -> str:
        if local_files_only or fails:
            raise OSError("no such\nfile")
        silent.wait()
        return ""

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(config, "REACH_S", 1)
    with pytest.raises(InputError, match=r"cannot be read from the Hub: no (answer within 1 s|such file)"):
        read_base(ModelSection(path="nobody/unknown"))
