"""The examples of docs/python.md, run one after the other as one program."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.training import small_recipe, write_pairs
from trainer.recipe import dump

PAGE = Path(__file__).resolve().parents[3] / "docs" / "python.md"


def test_they_run(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pairs(tmp_path / "data" / "a.jsonl", 40)
    (tmp_path / "my.yaml").write_text(dump(small_recipe("my", tiny_model, tmp_path, **{"resources": {"workers": 1}})))
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.S | re.M)
    assert len(examples) == 5
    known: dict[str, Any] = {}
    for example in examples:
        exec(compile(example, "docs/python.md", "exec"), known)
    assert (known["state"], known["fits"]) == ("succeeded", True)
    assert list(known["losses"]["step"]) == list(range(1, 21))
    assert [event.attempt for event in known["starts"]] == [1]
    assert Path(known["newest"]).is_dir()
    assert known["model"].active_adapters == ["default"]
    told = capsys.readouterr().out
    assert "peak on the device" in told
    assert "optimizer.lr: 0.0001 -> 0.0002" in told
