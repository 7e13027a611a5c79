from __future__ import annotations

import sys
from pathlib import Path

import pytest

# In a checkout and in an installed muster, the folder above `trainer` makes muster's modules importable.
sys.path.insert(0, str(next(folder for folder in Path(__file__).resolve().parents if (folder / "trainer").is_dir())))

from trainer.recipe.plugins import TABLES

ARGUMENTS = {
    "task_name": "muster.tasks",
    "method_name": "muster.methods",
    "format_name": "muster.formats",
    "optimizer_name": "muster.optimizers",
    "schedule_name": "muster.schedules",
    "strategy_name": "muster.strategies",
}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from .models import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("tiny-model"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Gives a test the names of the installed rows of the table that its argument is called by, or all of them."""
    rows = [(table, name) for table in dict.fromkeys(TABLES.values()) for name in table.offered()]
    if "table_and_name" in metafunc.fixturenames:
        metafunc.parametrize("table_and_name", rows, ids=[f"{table.group}-{name}" for table, name in rows])
    for argument, group in ARGUMENTS.items():
        if argument in metafunc.fixturenames:
            metafunc.parametrize(argument, [name for table, name in rows if table.group == group])
