"""A run that begins from a trained adapter: what it begins with, what is refused, and what is recorded."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from launcher.driver.preflight import check_begins_from
from tests.support.looping import bench
from tests.support.nights import few_by_day
from tests.support.saved import adapter_of, trained
from tests.support.tasks import write_preferences
from tests.support.training import adapter_bytes, losses, run_of, small_recipe, train_here, write_pairs
from trainer.artifacts.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from trainer.checkpoint import list_commits
from trainer.errors import InputError
from trainer.progress.texts import event_text
from trainer.recipe import Recipe
from trainer.run import layout
from trainer.run.events import StartEvent
from trainer.run.jsonl import read_events
from trainer.worker.start.initial_weights import begin_from

Make = Callable[..., Recipe]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("begins")
    write_pairs(folder / "data" / "a.jsonl", 30)
    return folder


@pytest.fixture(scope="module")
def source(tiny_model: Path, folder: Path) -> Recipe:
    return trained("source", tiny_model, folder)


@pytest.fixture
def make(tiny_model: Path, folder: Path, tmp_path: Path) -> Make:
    def recipe(name: str = "begins", **changes: Any) -> Recipe:
        usual = {"training.steps": 3, "adapter.dropout": 0.0, "storage": str(tmp_path / "runs")}
        return small_recipe(name, tiny_model, folder, **{**usual, **changes})

    return recipe


@pytest.fixture
def copied(source: Recipe, tmp_path: Path) -> Path:
    """A copy of the adapter that a test may change."""
    return Path(shutil.copytree(adapter_of(source), tmp_path / "copied"))


def edit(folder: Path, **values: Any) -> str:
    path = folder / ADAPTER_CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return str(folder)


def saved(recipe: Recipe) -> dict[str, torch.Tensor]:
    return load_file(adapter_of(recipe) / ADAPTER_WEIGHTS)


def begun_with(recipe: Recipe) -> dict[str, torch.Tensor]:
    """Returns the tensors, by their saved names, that the built model has after its beginning."""
    uri = recipe.adapter.begins_from
    assert uri is not None
    with bench(recipe) as b:
        begin_from(b.parts, uri)
        names = b.adapter.saved_names(b.model)
        return {names[name]: tensor.clone() for name, tensor in b.strategy.weights()}


METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {},
    "dora": {},
    "loraplus": {},
    "adalora": {"adapter.rank": 4, "adapter.target_rank": 2},
    "ia3": {"adapter.rank": None, "adapter.alpha": None},
    "vera": {"adapter.alpha": None},
    "oft": {"adapter.rank": None, "adapter.alpha": None, "adapter.block_size": 4},
    "loha": {},
    "prompt": {"adapter.rank": None, "adapter.alpha": None, "data.packing": True},
    "prefix": {"adapter.rank": None, "adapter.alpha": None},
}


@pytest.mark.parametrize("method", few_by_day(METHODS, 3))
def test_every_method_begins_with_the_weights_of_the_file(
    method: str, tiny_model: Path, folder: Path, make: Make
) -> None:
    changes = {"adapter.method": method, **METHODS[method]}
    source = trained(f"of-{method}", tiny_model, folder, **changes)
    found, stored = begun_with(make(**changes, **{"adapter.from": run_of(source).url})), saved(source)
    assert found.keys() <= stored.keys()
    assert all(torch.equal(found[name], stored[name]) for name in found)
    check_begins_from(make(**changes, **{"adapter.from": run_of(source).url}), pytest.fail)


@pytest.mark.parametrize(
    "changes",
    few_by_day(
        [
            {"strategy.kind": "fsdp"},
            {"adapter.modules_to_save": ["lm_head"]},
            {"strategy.kind": "zero2"},
            {"model.quantization": "nf4", "model.dtype": "bfloat16"},
            {"adapter.trainable_tokens": [5, 9]},
            {"adapter.target_modules": ["q_proj", "v_proj"], "adapter.bias": "lora_only"},
        ],
        2,
    ),
)
def test_every_strategy_and_part_begins_with_the_weights_of_the_file(
    changes: dict[str, Any], tiny_model: Path, folder: Path, make: Make
) -> None:
    adapter = {key: value for key, value in changes.items() if key.startswith("adapter.")}
    name = "-".join(adapter).replace("adapter.", "").replace("_", "-") or "source"
    source = trained(name, tiny_model, folder, **adapter)
    found = begun_with(make(**changes, **{"adapter.from": run_of(source).url}))
    stored = saved(source)
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name], stored[name]) for name in found)


def test_a_run_continues_what_another_has_learnt_and_records_it(source: Recipe, make: Make) -> None:
    recipe = make(**{"adapter.from": run_of(source).url})
    assert train_here(recipe) == "succeeded"
    assert losses(recipe)[1] < losses(source)[1] - 0.02
    assert losses(recipe)[1] == pytest.approx(losses(source)[3], abs=0.3)
    run, (record, *_) = run_of(recipe), list_commits(run_of(source))
    expected = {
        "uri": run_of(source).url,
        "folder": run_of(source).uri(layout.ADAPTER),
        "step": 3,
        "sha256": record.files[ADAPTER_WEIGHTS]["sha256"],
    }
    assert json.loads(run.read("adapter/muster.json"))["begins_from"] == expected
    assert (
        f"| began from | {expected['uri']}, step 3 (sha256 {expected['sha256'][:16]}…) |"
        in run.read("adapter/README.md").decode()
    )
    (start,) = (event for event in read_events(run) if isinstance(event, StartEvent))
    assert start.begins_from == expected
    assert f"from the first step, with {expected['uri']} of step 3" in str(event_text(start))
    assert list_commits(run)[0].state["begins_from"] == expected


def test_the_source_may_be_gone_after_the_first_checkpoint(copied: Path, make: Make) -> None:
    changes = {"adapter.from": str(copied), "checkpoint.every_steps": 1}
    assert train_here(make("straight", **changes)) == "succeeded"
    assert train_here(make("resumed", **changes, **{"training.stop_after": 1})) == "interrupted"
    shutil.rmtree(copied)
    assert train_here(make("resumed", **changes)) == "succeeded"
    assert adapter_bytes(make("resumed", **changes)) == adapter_bytes(make("straight", **changes))
    begun = [
        json.loads(run_of(make(name)).read("adapter/muster.json"))["begins_from"] for name in ("resumed", "straight")
    ]
    assert begun[0] == begun[1]
    assert begun[0]["step"] is None


def test_a_source_that_changes_before_the_first_checkpoint_is_reported(
    copied: Path, make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = make(**{"adapter.from": str(copied)})
    with monkeypatch.context() as patch:
        patch.setattr("trainer.worker.loop.Loop.run", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train_here(recipe)
    before = load_file(copied / ADAPTER_WEIGHTS)
    save_file({name: tensor * 0.5 for name, tensor in before.items()}, copied / ADAPTER_WEIGHTS)
    with caplog.at_level(logging.WARNING):
        assert train_here(recipe, takeover=True) == "succeeded"
    assert f"adapter.from {copied} has changed since the attempt before" in caplog.text
    first, second = (event for event in read_events(run_of(recipe)) if isinstance(event, StartEvent))
    assert first.begins_from is not None
    assert second.begins_from is not None
    assert second.begins_from["was"] == first.begins_from["sha256"] != second.begins_from["sha256"]
    assert "which has changed since the attempt before" in str(event_text(second))


@pytest.mark.night
def test_a_run_that_trains_on_is_begun_from_at_the_same_step(
    tiny_model: Path, folder: Path, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first attempt, which has no checkpoint, and the next one begin from the same checkpoint of a run."""
    grows = make("grows", **{"training.steps": 6, "training.stop_after": 2})
    assert train_here(grows) == "interrupted"
    recipe = make(**{"adapter.from": run_of(grows).url})
    with monkeypatch.context() as patch:
        patch.setattr("trainer.worker.loop.Loop.run", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train_here(recipe)
    assert (
        train_here(make("grows", **{"training.steps": 6, "checkpoint.every_steps": 1, "training.stop_after": 4}))
        == "interrupted"
    )
    assert train_here(recipe, takeover=True) == "succeeded"
    first, second = (event.begins_from for event in read_events(run_of(recipe)) if isinstance(event, StartEvent))
    assert first == second
    assert first is not None
    assert first["step"] == 2


def test_the_reference_of_a_preference_is_the_adapter_that_it_begins_from(
    tiny_model: Path, folder: Path, source: Recipe, tmp_path: Path
) -> None:
    """Also for an attempt that finds a checkpoint and no stored reference."""
    write_preferences(folder / "pairs.jsonl", 24)

    def recipe(name: str, **changes: Any) -> Recipe:
        data = [{"path": f"{folder}/pairs.jsonl", "format": "preference"}]
        usual = {"task": "dpo", "data.train": data, "data.packing": False, "training.steps": 4, "adapter.dropout": 0.0}
        begins = {"adapter.from": run_of(source).url, "storage": str(tmp_path / "runs"), "checkpoint.every_steps": 2}
        return small_recipe(name, tiny_model, folder, **{**usual, **begins, **changes})

    straight = recipe("straight")
    assert train_here(straight) == "succeeded"
    assert losses(straight)[1] == pytest.approx(math.log(2), rel=1e-5)
    assert train_here(recipe("resumed", **{"training.stop_after": 2})) == "interrupted"
    for stored in (tmp_path / "runs" / layout.PREPARED).glob("*/outputs-*"):
        shutil.rmtree(stored)
    assert train_here(recipe("resumed")) == "succeeded"
    assert adapter_bytes(recipe("resumed")) == adapter_bytes(straight)


def interrupt(*given: Any) -> Any:
    raise KeyboardInterrupt


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"adapter.rank": 8}, r"r is 4 there and 8 here \(adapter.rank\)"),
    "alpha": ({"adapter.alpha": 4}, r"lora_alpha is 8 there and 4 here \(adapter.alpha\)"),
    "dora": ({"adapter.method": "dora"}, r"use_dora is False there and True here \(adapter.method\)"),
    "rslora": ({"adapter.method": "rslora"}, r"use_rslora is False there and True here"),
    "method": (
        {"adapter.method": "ia3", "adapter.rank": None, "adapter.alpha": None},
        r"peft_type is LORA there and IA3 here \(adapter.method\)",
    ),
    "fewer targets": ({"adapter.target_modules": ["q_proj"]}, r"24 of its 28 tensors have no place"),
    "tokens": ({"adapter.trainable_tokens": [5]}, r"trainable_token_indices is None there and \[5\] here"),
    "mlp": (
        {"adapter.method": "p_tuning", "adapter.rank": None, "adapter.alpha": None},
        r"its file holds what a trained MLP computes",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_before_and_in_the_workers(case: str, source: Recipe, make: Make) -> None:
    changes, message = REFUSED[case]
    recipe = make(**{**changes, "adapter.from": run_of(source).url})
    for check in (lambda: check_begins_from(recipe, pytest.fail), lambda: begun_with(recipe)):
        with pytest.raises(InputError, match=rf"^adapter.from \S+[^\n]*{message}[^\n]*$"):
            check()


def test_a_part_that_the_file_lacks_is_refused_by_the_workers(source: Recipe, make: Make) -> None:
    recipe = make(**{"adapter.modules_to_save": ["lm_head"], "adapter.from": run_of(source).url})
    with pytest.raises(InputError, match=r"lacks 1 of the 29 tensors .*lm_head.weight"):
        begun_with(recipe)
    named = make(**{"adapter.target_modules": ["q_proj", "k_proj"], "adapter.from": str(adapter_of(source))})
    with pytest.raises(InputError, match="have no place"):
        check_begins_from(named, pytest.fail)


def damage(name: str, folder: Path) -> str:
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    first = next(iter(tensors))
    if name == "shape":
        tensors[first] = tensors[first][:, :3].contiguous()
    elif name == "not finite":
        tensors[first][0, 0] = float("nan")
    elif name == "integers":
        tensors[first] = tensors[first].to(torch.int32)
    elif name == "more":
        tensors["base_model.model.score.weight"] = torch.ones(2, 2)
    else:
        del tensors[first]
    save_file(tensors, folder / ADAPTER_WEIGHTS)
    return str(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shape", r"has the shape \[\d+, 3\], and this recipe gives"),
        ("not finite", "holds values that are not finite"),
        ("integers", "holds values that are not finite numbers"),
        ("more", r"1 of its 29 tensors have no place .*score.weight"),
        ("less", r"lacks 1 of the 28 tensors"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(name: str, message: str, copied: Path, make: Make) -> None:
    with pytest.raises(InputError, match=message):
        begun_with(make(**{"adapter.from": damage(name, copied)}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"alora_invocation_tokens": [1]}, r"alora_invocation_tokens is \[1\] there and None here"),
        ({"rank_pattern": {"q_proj": 2}}, r"rank_pattern is .* there and \{\} here"),
        ({"use_what_comes_next": True}, r"use_what_comes_next is True there and None here"),
    ],
)
def test_a_setting_that_this_recipe_cannot_have_is_refused(
    values: dict[str, Any], message: str, copied: Path, make: Make
) -> None:
    with pytest.raises(InputError, match=message):
        begun_with(make(**{"adapter.from": edit(copied, **values)}))


def test_what_an_older_peft_left_out_is_no_difference(copied: Path, make: Make) -> None:
    path = copied / ADAPTER_CONFIG
    config = json.loads(path.read_text())
    old = ("peft_type", "task_type", "r", "lora_alpha", "target_modules", "bias", "base_model_name_or_path")
    path.write_text(json.dumps({name: config[name] for name in old}))
    assert begun_with(make(**{"adapter.from": str(copied)}))


def test_another_base_model_is_refused_and_an_unknown_one_is_a_warning(
    copied: Path, tiny_model: Path, make: Make, tmp_path: Path
) -> None:
    recipe = make(**{"adapter.from": str(copied)})
    info = json.loads((copied / "muster.json").read_text())
    info["base"]["weights"] = "0" * 32
    (copied / "muster.json").write_text(json.dumps(info))
    with pytest.raises(InputError, match=r"was trained on another base model than model.path .*weights 0000"):
        check_begins_from(recipe, pytest.fail)
    with pytest.raises(InputError, match="was trained on another base model"):
        begun_with(recipe)
    (copied / "muster.json").unlink()
    check_begins_from(recipe, pytest.fail)  # the names are the same
    edit(copied, base_model_name_or_path="org/other")
    odd: list[str] = []
    check_begins_from(recipe, odd.append)
    assert [text for text in odd if "names the base model org/other, and model.path is" in text] == odd != []


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("nothing", "holds no adapter_config.json; name a run or the folder of an adapter"),
        ("model", "or a complete model in model.path"),
        ("bin", "has adapter_config.json and no adapter_model.safetensors"),
        ("empty run", "has neither a final adapter nor a complete checkpoint yet: train it first"),
    ],
)
def test_a_place_without_an_adapter_is_refused(
    place: str, message: str, copied: Path, tiny_model: Path, make: Make, tmp_path: Path
) -> None:
    where = {
        "nothing": tmp_path / "nothing",
        "model": tiny_model,
        "bin": copied,
        "empty run": tmp_path / "runs" / "new",
    }
    if place == "bin":
        (copied / ADAPTER_WEIGHTS).unlink()
    elif place == "empty run":
        run_of(make("new")).write(layout.RECIPE, b"name: new")
    recipe = make(**{"adapter.from": str(where[place])})
    for check in (lambda: check_begins_from(recipe, pytest.fail), lambda: begun_with(recipe)):
        with pytest.raises(InputError, match=message):
            check()


def test_a_name_on_the_hub_is_fetched(
    source: Recipe, make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its cache has links in place of files."""
    asked: list[Any] = []
    cache = tmp_path / "snapshots"
    cache.mkdir()
    for file in adapter_of(source).iterdir():
        (cache / file.name).symlink_to(file)

    def download(name: str, **given: Any) -> str:
        asked.append((name, sorted(given["allow_patterns"])))
        if name == "org/nothing":
            raise huggingface_hub.errors.LocalEntryNotFoundError("no")
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found, stored = begun_with(make(**{"adapter.from": "org/adapter"})), saved(source)
    assert all(torch.equal(found[name], stored[name]) for name in stored)
    assert asked == [("org/adapter", [ADAPTER_CONFIG, ADAPTER_WEIGHTS, "muster.json"])]
    with pytest.raises(
        InputError, match=r"adapter.from 'org/nothing' is neither a folder here nor an adapter that the Hub"
    ):
        begun_with(make(**{"adapter.from": "org/nothing"}))


def test_a_damaged_final_adapter_is_passed_over(
    tiny_model: Path, folder: Path, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    source = trained("spoilt", tiny_model, folder)
    (adapter_of(source) / ADAPTER_WEIGHTS).write_bytes(b"spoilt")
    with caplog.at_level(logging.WARNING):
        found = begun_with(make(**{"adapter.from": run_of(source).url}))
    assert "is skipped" in caplog.text
    record = list_commits(run_of(source))[0]
    stored = load_file(Path(run_of(source).url, record.file_key(ADAPTER_WEIGHTS)))
    assert all(torch.equal(found[name], stored[name]) for name in found)


def test_a_head_is_loaded_with_its_adapter(tiny_model: Path, folder: Path, tmp_path: Path) -> None:
    from tests.support.tasks import task_recipe, write_task_data

    write_task_data(folder, "reward")
    changes: dict[str, Any] = {"training.steps": 2, "checkpoint.every_steps": 2}
    source = task_recipe("reward", "rates", tiny_model, folder, **changes)
    assert train_here(source) == "succeeded"
    found = begun_with(
        task_recipe("reward", "on", tiny_model, folder, **changes, **{"adapter.from": run_of(source).url})
    )
    stored = saved(source)
    assert found.keys() == stored.keys()
    assert any("score" in name for name in found)
    assert all(torch.equal(found[name], stored[name]) for name in found)
