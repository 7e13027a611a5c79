"""Nothing that lies in a storage or a model folder is unpickled: whoever can write there must not run code here."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import pytest

from tests.support.training import run_of, small_recipe, train_here, write_pairs
from trainer.checkpoint import CommitRecord, list_commits
from trainer.checkpoint.blobs import entry_of
from trainer.errors import InputError
from trainer.model import build
from trainer.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
UNPICKLES = re.compile(
    r"^\s*(import|from) (pickle|cloudpickle|dill|joblib|shelve|marshal)\b"
    r"|torch\.(load|save)\(|pickle\.(load|dump)|read_pickle|allow_pickle=True",
    re.MULTILINE,
)


class Malicious:
    """Makes the file ``mark`` where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.mark,)


@pytest.fixture
def bomb(tmp_path: Path) -> tuple[bytes, Path]:
    mark = tmp_path / "executed"
    return pickle.dumps(Malicious(mark)), mark


def test_the_bomb_works(bomb: tuple[bytes, Path]) -> None:
    data, mark = bomb
    pickle.loads(data)
    assert mark.exists()


@pytest.mark.parametrize("package", ["trainer", "launcher", "cluster"])
def test_no_module_loads_or_saves_pickles(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    found = [str(f.relative_to(ROOT)) for f in files if UNPICKLES.search(f.read_text())]
    assert found == []


@pytest.fixture
def recipe(tiny_model: Path, tmp_path: Path) -> Recipe:
    write_pairs(tmp_path / "data" / "a.jsonl", 12)
    training = {"steps": 4, "global_batch": 2, "micro_batch": 2}
    return small_recipe("a-run", tiny_model, tmp_path, training=training, checkpoint={"every_steps": 2})


@pytest.mark.parametrize("name", ["optimizer.safetensors", "adapter_model.safetensors"])
def test_a_malicious_checkpoint_is_refused_and_runs_nothing(
    name: str, recipe: Recipe, bomb: tuple[bytes, Path]
) -> None:
    """Its record, rewritten too, vouches for the bytes; what reads them is the last defence."""
    data, mark = bomb
    stopped = recipe.model_copy(update={"training": recipe.training.model_copy(update={"stop_after": 2})})
    assert train_here(stopped) == "interrupted"
    run = run_of(recipe)
    (record,) = list_commits(run)
    run.write(record.file_key(name), data)
    body = {**json.loads(record.to_json()), "files": {**record.files, name: entry_of(data)}}
    del body["sha256"]
    run.write(record.key, CommitRecord(**body).to_json())
    with pytest.raises(Exception, match=r"(?i)header|safetensor"):
        train_here(recipe)
    assert not mark.exists()


def test_a_base_model_in_pickles_is_refused(tiny_model: Path, tmp_path: Path, bomb: tuple[bytes, Path]) -> None:
    import torch

    data, mark = bomb
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    (folder / "pytorch_model.bin").write_bytes(data)
    recipe = small_recipe("x", folder, tmp_path)
    with pytest.raises((InputError, OSError), match="safetensors"):
        build(recipe.model, folder, torch.device("cpu"), full=False, checkpointing=False)
    assert not mark.exists()
