"""The small models of `make families`: their shapes, and that the checks of them can fail."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families import rows
from tests.families.bases import make_base, write_texts
from tests.families.checks import Difference, Trained, _compare_first_step, _train
from tests.families.plain import load
from tests.families.shrink import WINDOW, small_config

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("model_type", "kinds"),
    [
        ("qwen3_next", {"linear_attention", "full_attention"}),
        ("gemma3_text", {"sliding_attention", "full_attention"}),
        ("llama4_text", {"chunked_attention", "full_attention"}),
        ("nemotron_h", {"linear_attention", "moe", "full_attention", "mlp"}),
    ],
)
def test_a_small_model_has_few_layers_of_every_kind(model_type: str, kinds: set[str]) -> None:
    config = small_config(model_type)
    assert set(config.layer_types) == kinds
    assert config.num_hidden_layers == len(kinds)


def test_a_small_model_has_small_windows_few_experts_and_no_dropout() -> None:
    assert small_config("mistral").sliding_window == WINDOW
    assert small_config("mixtral").num_local_experts == 4
    assert small_config("gpt2").resid_pdrop == 0.0


def test_models_inside_a_model_are_shrunk_too() -> None:
    config = small_config("gemma3")
    assert (config.text_config.hidden_size, config.vision_config.hidden_size) == (64, 64)


def test_a_window_of_the_small_model_hides_tokens(tmp_path: Path) -> None:
    base = make_base("mistral", tmp_path)
    assert base.kinds == ["sliding"]
    model = load(tmp_path).eval()
    ids = torch.arange(4, 64)[None]
    with torch.no_grad():
        seen = [model(input_ids=ids).logits[0, -1]]
        ids[0, 0] = 200  # farther away than the windows of both layers reach
        seen.append(model(input_ids=ids).logits[0, -1])
    assert torch.equal(*seen)


@pytest.mark.parametrize(
    ("loss", "gradient", "wrong"),
    [
        (1.5, [1.0, 2.0], r"the first loss differs from the plain loop's by 5\.0e-01"),
        (1.0, [1.0, 3.0], r"the first gradient of w differs from the plain loop's by 4\.5e-01 of its norm"),
        (1.0, None, r"the first gradient of w differs from the plain loop's by 1\.0e\+00 of its norm"),
    ],
)
def test_a_first_step_that_differs_is_named(loss: float, gradient: list[float] | None, wrong: str) -> None:
    gradients = {} if gradient is None else {"w": torch.tensor(gradient)}
    trained = Trained([loss], 0.0, "sdpa", [], gradients, [], [], [])
    with pytest.raises(Difference, match=wrong):
        _compare_first_step(trained, 1.0, {"w": torch.tensor([1.0, 2.0])})


def test_a_trained_parameter_without_a_gradient_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer.tasks.sft import SFT

    make_base("llama", tmp_path / "base")
    write_texts(tmp_path)
    plain = SFT.attach

    def attach(self: Any, model: Any, *others: Any) -> None:
        plain(self, model, *others)
        layer = model.get_submodule("base_model.model.model.layers.1.mlp")
        inside = layer.forward
        layer.forward = lambda hidden: hidden + 0.0 * inside(hidden)

    assert _train(tmp_path, "sound", packing=True).lacking == []
    monkeypatch.setattr(SFT, "attach", attach)
    lacking = _train(tmp_path, "cut", packing=True).lacking
    assert lacking
    assert all("layers.1.mlp" in name for name in lacking)


def test_processes_that_use_the_processor_do_not_hang() -> None:
    stillness = rows.Stillness()
    assert not any(stillness.lasts(now / 10, now) for now in range(0, 1000, 50))
    assert [stillness.lasts(100.0, 1000 + s) for s in (0, rows.STILL_S - 1, rows.STILL_S + 1)] == [False, False, True]


def test_the_page_of_the_models_is_current() -> None:
    pages = runpy.run_path(str(ROOT / "docs" / ".site" / "models_table.py"))["pages"]
    for path, text in pages().items():
        assert (ROOT / path).read_text(encoding="utf-8") == text, f"{path} is stale: run make families"
