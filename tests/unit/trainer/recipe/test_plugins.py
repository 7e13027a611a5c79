"""Rows of plug-ins: where they come from, when their code is imported, and what is said when that fails."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.plugins import ROW, install, no_plugins
from tests.unit.trainer.recipe.test_methods import BASE
from trainer.errors import RecipeError, UsageError
from trainer.recipe import Recipe, differences, dump, load, loads, parse, schema
from trainer.recipe.plugins import providers
from trainer.recipe.rules.matrix import Cell, refusal
from trainer.recipe.tasks import TASKS, TaskRow, compared_metrics
from trainer.recipe.trackers import TRACKERS, TrackerRow
from trainer.recipe.trust import code_of, granted, without_code
from trainer.registry import IMPORTED

__all__ = ["no_plugins"]
pytestmark = pytest.mark.usefixtures("no_plugins")


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "imported"


@pytest.fixture
def site(tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages with one that offers the task ``focal``."""
    site = tmp_path / "site"
    files = {"plugged/__init__.py": "", "plugged/rows.py": ROW.format(mark=str(mark), module="plugged")}
    install(site, "muster-plugged", files, {"muster.tasks": {"focal": "plugged.rows:ROW"}})
    monkeypatch.syspath_prepend(str(site))
    return site


def mistakes(**changes: Any) -> list[str]:
    with pytest.raises(RecipeError) as refused:
        parse(BASE | changes)
    return [f"{m.path}: {m.message}" for m in refused.value.mistakes]


def test_an_entry_points_row_is_imported_when_the_recipe_names_it(site: Path, mark: Path) -> None:
    assert "focal" in TASKS.offered()
    parse(BASE)
    assert not mark.exists(), "its name alone imports nothing"
    recipe = parse(BASE | {"task": "focal", "focal": {"gamma": 3.0}})
    assert mark.exists()
    assert (recipe.task, recipe.focal.gamma) == ("focal", 3.0)  # type: ignore[attr-defined]
    assert compared_metrics(recipe) == {"eval_sharpness": "max"}
    assert refusal(Cell("lora", "none", "ddp", "focal")) is None
    assert "focal" in schema()["properties"]
    assert providers(recipe) == [{"key": "task", "name": "focal", "package": "muster-plugged 1.2"}]
    assert loads(dump(recipe), stored=True, imports=False) == recipe


def test_its_settings_are_as_strict_as_muster_s_own(site: Path) -> None:
    assert mistakes(task="focal", focal={"gama": 3.0}) == ["focal.gama: unknown key; did you mean 'gamma'?"]
    assert mistakes(task="focal", focal={"gamma": "x"}) == ["focal.gamma: takes a number, got the text 'x'"]
    assert mistakes(focal={"gamma": 3.0}) == ["focal.gamma: has no effect with task sft; leave it out"]
    assert "unknown key" in mistakes(task="focal", fokal={})[0]


def test_an_override_may_name_the_plug_in_and_its_settings(site: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(BASE))
    recipe = load(tmp_path / "r.yaml", ["focal.gamma=4", "task=focal"])
    assert recipe.focal.gamma == 4.0  # type: ignore[attr-defined]
    with pytest.raises(RecipeError, match=r"command line: focal.gama: unknown key"):
        load(tmp_path / "r.yaml", ["task=focal", "focal.gama=4"])


def test_a_row_by_its_place_needs_no_entry_point(tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plugged_here.py").write_text(ROW.format(mark=str(mark), module="plugged_here"))
    monkeypatch.chdir(tmp_path)
    recipe = parse(BASE | {"task": "plugged_here:ROW", "row": {"gamma": 1.5}})
    assert TASKS[recipe.task].evaluates == {"sharpness": "max"}
    assert providers(recipe) == [{"key": "task", "name": "plugged_here:ROW", "package": ""}]
    assert code_of(recipe) == ["the plug-in task plugged_here:ROW"]
    assert mistakes(task="plugged_here:Settings") == [
        "task: plugged_here:Settings is no row of a task: plugged_here Settings is ModelMetaclass, not TaskRow"
    ]


def test_a_module_that_the_recipe_lists_adds_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = (
        "from trainer.recipe.trackers import TRACKERS, TrackerRow\nTRACKERS.add('paper', TrackerRow('plugged_p:Paper'))"
    )
    (tmp_path / "plugged_p.py").write_text(body)
    monkeypatch.chdir(tmp_path)
    recipe = parse(BASE | {"plugins": ["plugged_p"], "tracking": ["paper"]})
    assert TRACKERS["paper"] == TrackerRow("plugged_p:Paper")
    assert differences(recipe, parse(BASE)) == [], "neither decides the result"


def test_a_child_process_imports_the_same_and_nothing_else(tmp_path: Path, mark: Path, site: Path) -> None:
    recipe = parse(BASE | {"task": "focal"})
    code = (
        "import pickle, sys; from trainer.recipe.tasks import TASKS\n"
        "recipe = pickle.loads(bytes.fromhex(sys.argv[1]))\n"
        "print(TASKS[recipe.task].evaluates, recipe.focal.gamma)"
    )
    path = os.pathsep.join([str(site), str(Path(__file__).resolve().parents[4])])
    words = [sys.executable, "-c", code, pickle.dumps(recipe).hex()]
    child = subprocess.run(words, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert child.stdout == "{'sharpness': 'max'} 2.0\n", child.stderr
    told = {**os.environ, "PYTHONPATH": path, IMPORTED: ""}
    child = subprocess.run(words, env=told, capture_output=True, text=True)
    assert "task 'focal' is not one of" in child.stderr


def test_what_cannot_be_imported_is_one_mistake(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (site / "plugged" / "rows.py").write_text("import nothing_of_this_name")
    [said] = mistakes(task="focal", focal={"gamma": 3.0})
    assert said.startswith("task: the plug-in plugged.rows (of muster-plugged 1.2) cannot be imported from ")
    assert said.endswith("ModuleNotFoundError: No module named 'nothing_of_this_name'")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plugged_bad.py").write_text("1 / 0")
    [said] = mistakes(plugins=["plugged_bad"], task="its_task", its_task={"a": 1})
    assert said.startswith("plugins.0: the plug-in plugged_bad cannot be imported")
    assert said.endswith("ZeroDivisionError: division by zero")
    assert "no Python module; write its name" in mistakes(plugins=["a b"])[0]


def test_an_unknown_name_lists_what_is_offered(site: Path, mark: Path) -> None:
    assert mistakes(task="fokal")[0].endswith("distill, focal; did you mean 'focal'?")
    assert not mark.exists()


def test_a_plug_in_takes_no_name_of_muster_s(site: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = site.parent / "other"
    install(other, "muster-other", {"plugged2.py": "1 / 0"}, {"muster.tasks": {"sft": "plugged2:ROW"}})
    sys.path.insert(0, str(other))
    assert parse(BASE | {"task": "focal"}).task == "focal"
    assert "muster-other 1.2 offers the task 'sft', which is muster's own and stays it" in caplog.text
    assert TASKS.load("sft").__name__ == "SFT"
    with pytest.raises(UsageError, match="'sft' is a task of muster"):
        TASKS.add("sft", TaskRow("x:Y", ()))


def test_two_packages_with_one_name_are_refused(site: Path) -> None:
    other = site.parent / "other"
    install(other, "muster-other", {"plugged2.py": ""}, {"muster.tasks": {"focal": "plugged2:ROW"}})
    sys.path.insert(0, str(other))
    said = "task: muster-other 1.2 and muster-plugged 1.2 offer the task 'focal'; uninstall all but one, or write "
    assert mistakes(task="focal")[0].startswith(said)


def test_settings_with_a_key_of_the_recipe_are_refused(tmp_path: Path, mark: Path) -> None:
    (tmp_path / "plugged_k.py").write_text(ROW.format(mark=str(mark), module="plugged_k").replace("ROW =", "MODEL ="))
    sys.path.insert(0, str(tmp_path))
    assert "have the key 'model' in a recipe, which is taken" in mistakes(task="plugged_k:MODEL")[0]


STORED = BASE | {"task": "focal", "focal": {"gamma": 3.0}, "plugins": ["plugged_p"]}


def test_a_stored_recipe_imports_nothing(site: Path, mark: Path) -> None:
    stored = loads(yaml.safe_dump(STORED), stored=True, imports=False)
    assert stored.task == "focal"
    assert not mark.exists()
    assert code_of(stored) == ["the plug-in task focal, plugins plugged_p"]
    with pytest.raises(UsageError, match="would run the plug-in task focal, plugins plugged_p: check"):
        granted(stored, "s3://runs/a", trust=False)
    with pytest.raises(UsageError, match="a stored run named it: it was not imported"):
        TASKS.load(stored.task)
    assert without_code(stored).plugins == ()
    assert "focal" not in TASKS.names()
    assert IMPORTED not in os.environ
    own = parse(BASE | {"task": "focal", "focal": {"gamma": 3.0}})
    assert mark.exists(), "the user's own recipe names it"
    again = loads(yaml.safe_dump(STORED), stored=True, imports=False)
    assert differences(again, own) == []


def test_a_stored_recipe_is_read_where_its_plug_in_is_not_installed(mark: Path) -> None:
    text = yaml.safe_dump(STORED | {"adapter": {"method": "own", "lr_ratio": 3.0}})
    with pytest.raises(RecipeError, match="task 'focal' is not one of"):
        loads(text, stored=True, imports=False)
    stored = loads(text, stored=True, imports=False, known=["focal", "own"])
    assert (stored.task, stored.adapter.method, stored.adapter.lr_ratio) == ("focal", "own", 3.0)
    assert compared_metrics(stored) == {"eval_loss": "min"}


def test_plain_data_is_not_changed(site: Path) -> None:
    data: dict[str, Any] = BASE | {"task": "focal", "focal": {"gamma": 3.0}}
    before = copy.deepcopy(data)
    assert isinstance(parse(data), Recipe)
    assert data == before
