"""The settings of the adapter methods: filled in, refused where they have no effect, told where they may stay."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.errors import RecipeError
from trainer.recipe import AdapterSection, Recipe, parse
from trainer.recipe.methods import METHODS, methods_with

BASE: dict[str, Any] = {
    "name": "methods",
    "model": {"path": "models/base"},
    "data": {"train": [{"path": "data/*.jsonl", "format": "completion"}]},
    "training": {"steps": 10, "global_batch": 8, "micro_batch": 2, "gradient_checkpointing": False},
    "optimizer": {"lr": 1e-4},
    "storage": "runs",
}


def recipe(method: Any, **settings: Any) -> Recipe:
    return parse(BASE | {"adapter": {"method": method, **settings}})


def mistakes(method: Any, **settings: Any) -> list[tuple[str, str]]:
    with pytest.raises(RecipeError) as refused:
        recipe(method, **settings)
    return [(m.path, m.message) for m in refused.value.mistakes]


@pytest.mark.parametrize("method", [m for m in METHODS.names() if m not in ("peft", "none")])
def test_what_is_left_out_is_the_methods_default(method: str) -> None:
    section = recipe(method).adapter
    for name, default in METHODS[method].settings.items():
        assert getattr(section, name) == default
    assert section.idle() == []


def test_lora_is_the_default_and_has_kept_its_own() -> None:
    section = AdapterSection()
    assert (section.method, section.rank, section.alpha, section.dropout) == ("lora", 16, 32, 0.05)
    assert (section.target_modules, section.bias) == ("all-linear", "none")


def test_what_is_given_wins_and_null_is_left_out() -> None:
    section = recipe("rslora", rank=8, alpha=None).adapter
    assert (section.rank, section.alpha) == (8, 16)
    assert recipe(None) == recipe("lora")


def test_a_key_that_is_not_known_is_a_mistake_without_a_value_too() -> None:
    assert mistakes("lora", rnak=None) == [("adapter.rnak", "unknown key; did you mean 'rank'?")]


@pytest.mark.parametrize(
    ("method", "settings", "idle"),
    [
        ("none", {"rank": 16, "alpha": 32, "dropout": 0.05, "target_modules": "all-linear"}, 4),
        ("prefix", {"rank": 16, "bias": "none"}, 2),
        ("ia3", {"rank": 16, "target_modules": ["k_proj"]}, 1),
        ("lora", {"rank": 16}, 0),
    ],
)
def test_common_settings_may_stay_when_the_method_is_exchanged(method: str, settings: Any, idle: int) -> None:
    assert len(recipe(method, **settings).adapter.idle()) == idle


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("lora", {"lr_ratio": 16.0}),
        ("lora", {"virtual_tokens": 20}),
        ("ia3", {"trainable_tokens": [3]}),
        ("adaption_prompt", {"modules_to_save": ["lm_head"]}),
        ("none", {"modules_to_save": ["lm_head"]}),
        ("prompt", {"encoder_hidden": 128}),
        ({"peft": "MISS"}, {"block_size": 8}),
    ],
)
def test_a_setting_of_another_method_is_refused(method: Any, settings: dict[str, Any]) -> None:
    [(path, message)] = mistakes(method, **settings)
    [name] = settings
    assert path == f"adapter.{name}"
    assert "has no effect with method" in message
    assert methods_with(name)[0] in message


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (5, "takes text, or a mapping such as {peft: MISS, r: 8}, got 5"),
        ("peft", "names the method in a mapping"),
        ({"r": 8}, "names the method, such as {peft: MISS, r: 8}"),
        ({"peft": 3}, "names the method, such as {peft: MISS, r: 8}"),
        ("pisa", "did you mean 'pissa'?"),
    ],
)
def test_a_method_that_is_none(method: Any, words: str) -> None:
    [(path, message)] = mistakes(method)
    assert path == "adapter.method"
    assert words in message


def test_a_method_by_name_is_kept_with_its_fields() -> None:
    section = recipe({"peft": "MISS", "r": 8}).adapter
    assert (section.kind, section.label, section.target_modules) == ("peft", "MISS", "all-linear")
    assert section.method == {"peft": "MISS", "r": 8}


@pytest.mark.parametrize(
    ("settings", "path"),
    [
        ({"rank": 8, "target_rank": 8}, "adapter.target_rank"),
        ({"prune_start": 0.5, "prune_end": 0.5}, "adapter.prune_start"),
    ],
)
def test_a_budget_that_cannot_fall_is_refused(settings: dict[str, Any], path: str) -> None:
    assert [p for p, _ in mistakes("adalora", **settings)] == [path]


def test_prefix_does_not_go_with_layers_that_are_computed_again() -> None:
    again = BASE | {"adapter": {"method": "prefix"}, "training": BASE["training"] | {"gradient_checkpointing": True}}
    with pytest.raises(RecipeError, match=r"set training\.gradient_checkpointing to false"):
        parse(again)
