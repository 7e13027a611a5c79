"""Small plug-ins as installed packages, and tables that forget them after a test."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from trainer.recipe.plugins import TABLES
from trainer.recipe.root import Recipe
from trainer.registry import IMPORTED

ROW = """
from pathlib import Path
from trainer.recipe.base import Section
from trainer.recipe.tasks import TaskRow

Path({mark!r}).touch()

class Settings(Section):
    gamma: float = 2.0
    "Exponent."

ROW = TaskRow("{module}.code:Task", ("prompted",), evaluates={{"sharpness": "max"}}, section=Settings)
"""
"""A module with the row of a task. It leaves a mark when it is imported."""


def install(folder: Path, name: str, files: Mapping[str, str], points: Mapping[str, Mapping[str, str]]) -> None:
    """Writes a package as pip would install it into ``folder``. ``points``: ``{group: {name: module:attribute}}``."""
    for file, text in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)
    about = folder / f"{name.replace('-', '_')}-1.2.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    tops = {file.split("/")[0].removesuffix(".py") for file in files}
    (about / "top_level.txt").write_text("\n".join(tops))
    lines = (f"[{group}]\n" + "".join(f"{n} = {v}\n" for n, v in named.items()) for group, named in points.items())
    (about / "entry_points.txt").write_text("\n".join(lines))


FIELDS = dict(Recipe.__pydantic_fields__)


def forget_rows() -> None:
    """Leaves the tables and the recipe as they are in a new process."""
    for table in TABLES.values():
        table._plugged.clear()
    Recipe.__pydantic_fields__.clear()
    Recipe.__pydantic_fields__.update(FIELDS)
    Recipe.model_rebuild(force=True)


@pytest.fixture
def no_plugins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Afterwards no table has rows of plug-ins, and the recipe has no settings of them."""
    modules = set(sys.modules)
    monkeypatch.setenv(IMPORTED, "")
    monkeypatch.delenv(IMPORTED)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    forget_rows()
    for name in sys.modules.keys() - modules:
        if name.split(".")[0].startswith("plugged"):
            del sys.modules[name]
