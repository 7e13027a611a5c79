"""What docs/extending/ says is so: each page's file and lines are put in place, and what they add is run."""

from __future__ import annotations

import importlib
import json
import re
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.support.training import losses, small_recipe, train_here, write_pairs
from trainer.recipe.formats import FORMATS
from trainer.recipe.methods import METHODS
from trainer.recipe.strategies import STRATEGIES
from trainer.recipe.tasks import TASKS
from trainer.registry import Registry

ROOT = Path(__file__).resolve().parents[3]
PAGES = {path.stem: path for path in sorted((ROOT / "docs" / "extending").glob("*.md"))}
BLOCK = re.compile(r'```python title="([^"]+)"\n(.*?)```', flags=re.S)


class Example(NamedTuple):
    """``module``: where the page's file goes; ``lines``: the entries of each table that the page adds to."""

    module: str
    source: str
    lines: dict[str, str]


def example(page: Path) -> Example:
    blocks = dict(BLOCK.findall(page.read_text()))
    ((file, source),) = [(title, text) for title, text in blocks.items() if ": " not in title]
    return Example(file.removesuffix(".py").replace("/", "."), source, {t: b for t, b in blocks.items() if ": " in t})


def put_in_place(page: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The page's module, importable under its name, with its lines in their tables until the test ends."""
    made = example(page)
    file = ROOT / (made.module.replace(".", "/") + ".py")
    assert not file.exists(), f"{page.name} adds what is there already"
    module = types.ModuleType(made.module)
    module.__file__ = str(file)
    monkeypatch.setitem(sys.modules, made.module, module)
    exec(compile(made.source, str(page), "exec"), module.__dict__)
    for title, text in made.lines.items():
        path, name = title.split(": ")
        home = importlib.import_module(path.removesuffix("/__init__.py").removesuffix(".py").replace("/", "."))
        table = getattr(home, name)
        table = table._rows if isinstance(table, Registry) else table
        for key, value in eval("{" + text + "}", vars(home)).items():
            monkeypatch.setitem(table, key, value)
    return module


@pytest.mark.parametrize("page", PAGES.values(), ids=lambda p: p.stem)
def test_a_page_is_a_file_and_lines_in_tables_that_lead_to_it(page: Path) -> None:
    made = example(page)
    assert any(f'"{made.module}:' in text for text in made.lines.values())
    assert f"({page.parent.name}/{page.name})" in (ROOT / "docs" / "extending.md").read_text()


def test_the_format(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_in_place(PAGES["format"], monkeypatch)
    assert "translation" in FORMATS
    rows = [{"english": f"good morning {i}", "fr": f"bonjour {i}"} for i in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(tmp_path / "pairs.jsonl"), "format": "translation", "columns": {"en": "english"}}
    recipe = small_recipe("translated", tiny_model, tmp_path, **{"data.train": [source], "training.steps": 3})
    assert train_here(recipe) == "succeeded"
    assert len(losses(recipe)) == 3


@pytest.mark.parametrize(
    ("page", "registry", "changes"),
    [
        ("method", METHODS, {"adapter": {"method": "miss", "rank": 4}}),
        ("task", TASKS, {"task": "focal"}),
        ("strategy", STRATEGIES, {"strategy.kind": "ddp_half"}),
    ],
)
def test_what_trains(
    page: str,
    registry: Registry[Any],
    changes: dict[str, Any],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = put_in_place(PAGES[page], monkeypatch)
    (name,) = [name for name in registry.names() if registry[name].code.startswith(f"{made.__name__}:")]
    write_pairs(tmp_path / "data" / "pairs.jsonl", 40)
    recipe = small_recipe(name, tiny_model, tmp_path, **changes)
    plain = small_recipe("plain", tiny_model, tmp_path, **({"adapter.dropout": 0.0} if page == "method" else {}))
    assert train_here(recipe) == train_here(plain) == "succeeded"
    assert losses(recipe)[10] < losses(recipe)[1]
    assert losses(recipe) != losses(plain), f"{name} does what was there before"


def test_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    from cluster import ClusterJob, cluster_of

    put_in_place(PAGES["cluster"], monkeypatch)
    background, said = cluster_of("background"), []
    job = ClusterJob("a", "runs/a", "", (1, 1), 0, 1, {}, ("validate",), ("recipes/quickstart.yaml",))
    assert background.render(job).endswith("-m launcher validate recipes/quickstart.yaml\n")
    first = background.submit(job, "recipes/quickstart.yaml")
    assert background.state(first) == "RUNNING"
    assert background.follow(first, said.append) == 0
    assert background.state(first) is None
    assert background.follow(background.submit(job, "nowhere.yaml"), said.append) == 2
    background.cancel(first, job.run_uri)
    assert said
