"""ZeRO settings: the shipped files, and what does not belong in them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.trainer.recipe.test_mistakes import GOOD, mistakes
from trainer.recipe import parse, zero


def strategy(**section: Any) -> dict[str, Any]:
    return GOOD | {"strategy": section}


@pytest.mark.parametrize("name", zero.names())
def test_the_shipped_files_hold_zero_settings_and_nothing_else(name: str) -> None:
    kind = name.split("_")[0]
    assert list(zero.mistakes(kind, name)) == []
    settings = zero.zero_settings(kind, name)
    places = {settings.get(part, {}).get("device", "none") for part in zero.OFFLOADS}
    assert ("cpu" in places) == name.endswith("_offload")


def test_without_a_name_the_kind_has_its_own_file() -> None:
    assert zero.zero_settings("zero3", None) == zero.zero_settings("zero3", "zero3")
    assert parse(strategy(kind="zero2")).strategy.deepspeed is None


def test_settings_may_stand_in_the_recipe() -> None:
    section = parse(strategy(kind="zero3", deepspeed={"stage3_param_persistence_threshold": 0})).strategy
    assert zero.zero_settings(section.kind, section.deepspeed) == {"stage3_param_persistence_threshold": 0, "stage": 3}


@pytest.mark.parametrize(
    ("section", "path", "words"),
    [
        ({"kind": "zero3", "deepspeed": "zero3_ofload"}, "strategy.deepspeed", "did you mean 'zero3_offload'"),
        ({"kind": "zero2", "deepspeed": "zero3"}, "strategy.deepspeed", "stage 3, and strategy.kind zero2 is stage 2"),
        ({"kind": "zero3", "deepspeed": {"train_batch_size": 8}}, "strategy.deepspeed", "training.global_batch"),
        ({"kind": "zero3", "deepspeed": {"bf16": {"enabled": True}}}, "strategy.deepspeed", "model.dtype"),
        (
            {"kind": "zero3", "deepspeed": {"offload_optimizer": {"device": "nvme"}}},
            "strategy.deepspeed",
            "'nvme' is not one of: none, cpu",
        ),
        (
            {"kind": "zero2", "deepspeed": {"offload_param": {"device": "cpu"}}},
            "strategy.deepspeed",
            "needs strategy.kind zero3",
        ),
        ({"kind": "fsdp", "deepspeed": "zero3"}, "strategy.deepspeed", "has no effect with strategy.kind fsdp"),
        ({"kind": "zero3", "offload": True}, "strategy.offload", "zero3_offload"),
        ({"kind": "ddp", "reshard_after_forward": False}, "strategy.reshard_after_forward", "has no effect"),
    ],
)
def test_what_is_wrong_is_said(section: dict[str, Any], path: str, words: str) -> None:
    [(where, message)] = mistakes(strategy(**section))
    assert where == path
    assert words in message


def test_a_file_that_holds_more_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "zero3.json").write_text('{"zero_optimization": {"stage": 3}, "gradient_clipping": 1.0, "steps": 4}')
    (tmp_path / "torn.json").write_text('{"zero_optimization": ')
    monkeypatch.setattr(zero, "FOLDER", tmp_path)
    first, second = zero.mistakes("zero3", "zero3")
    assert "training.max_grad_norm" in first
    assert "only ZeRO settings" in second
    [torn] = zero.mistakes("zero3", "torn")
    assert "is not JSON" in torn
