"""The example of a plug-in, installed from its wheel: it is held to the contracts, and trains everywhere."""

from __future__ import annotations

import json
import os
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest

from tests.support.packages import LIBRARIES, ROOT, run
from trainer.run import layout
from trainer.run.jsonl import read_rows
from trainer.storage import open_storage

pytestmark = pytest.mark.timeout(300)
TRAINS_S = 240
EXAMPLE = ROOT / "docs" / "extending" / "plugin"
NAMES = {"task": "focal", "adapter.method": "miss", "data.train.0.format": "translation", "optimizer.name": "signsgd"}


@pytest.fixture
def words(tiny_model: Path, tmp_path: Path) -> list[str]:
    """The example's recipe, with the changes that make it small. Its data lie in the working folder."""
    rows = [{"en": f"good morning {i}", "fr": f"bonjour {i}"} for i in range(60)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = ["training.steps=4", "training.global_batch=4", "training.micro_batch=2", "optimizer.lr=1e-3"]
    changes += [f"model.path={tiny_model}", "model.dtype=float32", "adapter.rank=4", "data.sequence_length=64"]
    return [str(EXAMPLE / "recipe.yaml"), *changes]


def trained(folder: Path) -> dict[str, float]:
    """The losses by step of the run in ``folder``."""
    run = open_storage(str(folder / "runs")).child("translated")
    assert json.loads(run.read(f"{layout.ADAPTER}/muster.json"))["task"] == "focal"
    return {row["step"]: row["loss"] for row in read_rows(run, layout.METRICS) if "loss" in row}


def paths(*folders: Path) -> str:
    return os.pathsep.join(map(str, [*folders, ROOT]))


CONTRACTS = "format or optimizer or code_of_a_row"


@pytest.mark.parametrize("chosen", [CONTRACTS, pytest.param(f"not ({CONTRACTS})", marks=pytest.mark.night)])
def test_the_rows_of_a_plug_in_keep_the_contracts_where_muster_is_installed(
    chosen: str, installed: Path, plugin: Path, tmp_path: Path
) -> None:
    words = ["-m", "pytest", "-q", "-rN", "-p", "no:cacheprovider", "--pyargs", "muster.testing", "-k", chosen]
    tested = run(
        installed / "bin" / "python", *words, cwd=tmp_path, timeout_s=TRAINS_S, PYTHONPATH=f"{plugin}:{LIBRARIES}"
    )
    assert tested.returncode == 0, tested.stdout + tested.stderr
    assert "passed" in tested.stdout


@pytest.mark.night
def test_a_row_that_breaks_its_contract_is_found(installed: Path, plugin: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(plugin, tmp_path / "broken") / "muster_example"
    optimizer = (broken / "sign_sgd.py").read_text()
    (broken / "sign_sgd.py").write_text(optimizer.replace("self.state[parameter].setdefault", "{}.setdefault"))
    (broken / "rows.py").write_text("import torch\n" + (broken / "rows.py").read_text())
    words = ["-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider", "--pyargs", "muster.testing"]
    words += ["-k", "signsgd and (heavy or saved_state)"]
    tested = run(
        installed / "bin" / "python",
        *words,
        cwd=tmp_path,
        timeout_s=TRAINS_S,
        PYTHONPATH=f"{broken.parent}:{LIBRARIES}",
    )
    assert tested.returncode == 1, tested.stderr
    assert "import them in the module of the code, not in that of the row" in tested.stdout
    assert "test_an_optimizer[signsgd-continues_from_its_saved_state_to_the_bit]" in tested.stdout


def test_a_recipe_of_a_plug_in_is_checked_and_described_without_heavy_libraries(
    plugin: Path, words: list[str], tmp_path: Path
) -> None:
    code = (
        "import sys; from launcher.cli.app import main\n"
        "try: main()\n"
        "finally: print(*(n for n in ('torch', 'ray', 'peft') if n in sys.modules), file=sys.stderr)"
    )
    valid = run(sys.executable, "-c", code, "validate", *words, cwd=tmp_path, PYTHONPATH=paths(plugin))
    assert valid.returncode == 0, valid.stderr
    assert valid.stderr.splitlines()[-1] == ""
    muster = partial(run, sys.executable, "-m", "launcher", cwd=tmp_path, PYTHONPATH=paths(plugin))
    wrong = muster("validate", *words, "focal.gama=2")
    assert wrong.returncode == 2
    assert "focal.gama: unknown key; did you mean 'gamma'?" in wrong.stderr
    matrix = muster("matrix", "--plugins", "--json")
    assert {"focal", "sft"} <= {row["task"] for row in json.loads(matrix.stdout)}, matrix.stderr
    schema = muster("schema", "--plugins")
    assert "gamma" in json.loads(schema.stdout)["$defs"]["FocalSection"]["properties"]


def test_it_trains_by_torchrun_on_two_ranks(plugin: Path, words: list[str], tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "trainer")
    result = run(
        sys.executable,
        *torchrun,
        *words,
        cwd=tmp_path,
        timeout_s=TRAINS_S,
        PYTHONPATH=paths(plugin),
        OMP_NUM_THREADS="1",
    )
    assert result.returncode == 0, result.stderr[-3000:]
    losses = trained(tmp_path)
    assert losses[4] < losses[1]
    stored = open_storage(str(tmp_path / "runs")).child("translated").read_json(layout.PROVENANCE)["plugins"]
    assert stored == [{"key": key, "name": name, "package": "muster-example 1.0"} for key, name in NAMES.items()]


WORKERS = [1, pytest.param(2, marks=pytest.mark.ray)]


@pytest.mark.night
@pytest.mark.parametrize("workers", WORKERS)
def test_it_trains_by_muster_run(workers: int, plugin: Path, words: list[str], tmp_path: Path) -> None:
    """One worker is a process of its own, two are Ray's."""
    words = ["-m", "launcher", "run", *words, f"resources.workers={workers}", "--on", "local"]
    result = run(
        sys.executable, *words, cwd=tmp_path, timeout_s=TRAINS_S, PYTHONPATH=paths(plugin), OMP_NUM_THREADS="1"
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert sorted(trained(tmp_path)) == [1, 2, 3, 4]


@pytest.mark.night
@pytest.mark.parametrize("workers", WORKERS)
def test_files_of_the_working_folder_are_a_plug_in_too(
    workers: int, plugin: Path, words: list[str], tmp_path: Path
) -> None:
    shutil.copytree(plugin / "muster_example", tmp_path / "muster_example")
    (tmp_path / "extras.py").write_text(
        "from muster_example import rows\nfrom trainer.recipe.tasks import TASKS\n"
        "from trainer.recipe.optimizers import OPTIMIZERS\n"
        "TASKS.add('focal', rows.FOCAL)\nOPTIMIZERS.add('signsgd', rows.SIGN_SGD)\n"
    )
    named = ["plugins=[extras]", "adapter.method=muster_example.rows:MISS"]
    named += ["data.train.0.format=muster_example.rows:TRANSLATION"]
    words = ["-m", "launcher", "run", *words, *named, f"resources.workers={workers}", "--on", "local"]
    result = run(
        sys.executable, "-P", *words, cwd=tmp_path, timeout_s=TRAINS_S, PYTHONPATH=paths(), OMP_NUM_THREADS="1"
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert sorted(trained(tmp_path)) == [1, 2, 3, 4]
