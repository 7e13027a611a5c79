"""Every command that README and docs show: run where it can run here, in a folder with what it speaks of; its options
are at least read where it cannot. What is not run stands in ELSEWHERE with the reason, and nothing else does."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import typer
import yaml

from launcher.cli import app
from tests.support.saved import trained
from tests.support.training import write_pairs
from tests.unit.test_cli import Muster
from tests.unit.test_documents import DOCUMENTS
from trainer import layout
from trainer.recipe import dump
from trainer.storage import open_storage

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^ *```", flags=re.S | re.M)
SHELLS = ("sh", "console", "")
PROGRAMS = ("muster", "make", "python", "ray", "sbatch", "kubectl", "docker", "vllm", "torchrun", "pip")
COMMAND = re.compile(rf"^ *((?:echo [^|]*\| )?(?:\.venv/bin/)?(?:{'|'.join(PROGRAMS)}) [^#\n]+)", flags=re.M)
INDENTED = re.compile(r"(?:^ {4,}\S.*\n)+", flags=re.M)

ELSEWHERE = {
    r"make (quickstart|test)$": "installs, or is what runs this; tests/unit/test_quickstart.py, .ci/run",
    r"muster run .*--on (ray|slurm|kubernetes)": "needs that cluster; tests/cluster, tests/unit/test_submitting.py",
    r"muster doctor .*--on slurm": "needs Slurm; tests/cluster",
    r"muster doctor": "starts a Ray; tests/ray/test_doctor.py",
    r"muster run ": "starts a Ray; tests/ray/test_driver.py",
    r"muster push": "needs the Hub; tests/unit/test_push.py",
    r"vllm serve": "is not part of this; tests/unit/test_serving.py holds the words",
    r"sbatch ": "needs Slurm; tests/cluster/test_slurm.py",
    r"(ray start|kubectl|docker) ": "changes the machine, or needs a cluster",
    r"python -m pip wheel": "tests/packaging/test_wheel.py builds it",
    r"python benchmarks/": "minutes to an hour each",
    r"python -m pytest tests/gpu": "needs a GPU",
}
"""By a pattern, the commands that are not run here and why."""

STANDS_FOR = {"s3://runs": "runs", "=… ": "=runs/law/adapter ", "Qwen/Qwen2.5-0.5B": "org/model"}
"""What a page says, and what there is here: a folder for a bucket, a run for an ellipsis."""


class Shown(NamedTuple):
    text: str
    pages: tuple[str, ...]


def shown() -> list[Shown]:
    """Each command once, with the pages that it stands on."""
    pages: dict[str, list[str]] = {}
    for document in DOCUMENTS:
        text = document.read_text()
        blocks = [body for _, language, body in FENCE.findall(text) if language in SHELLS]
        blocks += INDENTED.findall(FENCE.sub("", text))
        for found in COMMAND.findall("\n".join(blocks)):
            line = found.strip().replace(".venv/bin/", "")
            pages.setdefault(line, []).append(str(document.relative_to(ROOT)))
    return [Shown(line, tuple(where)) for line, where in pages.items()]


def elsewhere(line: str) -> str | None:
    return next((pattern for pattern in ELSEWHERE if re.match(pattern, line)), None)


COMMANDS = shown()
HERE = [one for one in COMMANDS if elsewhere(one.text) is None]


def words_of(line: str) -> tuple[list[str], str]:
    """The command's words without its program's name, and what is put into it."""
    said, _, command = line.rpartition("| ")
    for word, meant in STANDS_FOR.items():
        command = command.replace(word, meant)
    return shlex.split(command)[1:], shlex.split(said)[1] + "\n" if said else ""


@pytest.fixture(scope="module")
def scene(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files and runs that the pages speak of."""
    folder = tmp_path_factory.mktemp("scene")
    write_pairs(folder / "data" / "pairs.jsonl", 30)
    evaluated = [{"path": f"{folder}/data/pairs.jsonl", "format": "completion"}]
    recipe = trained("my", tiny_model, folder, **{"data.eval": evaluated})
    for name in ("my-run", "my-first", "law", "med"):
        shutil.copytree(folder / "runs" / "my", folder / "runs" / name)
    for rank in (0, 3):
        open_storage(f"{folder}/runs/my-first").write(layout.log_part(1, rank, 0), b"as it was printed\n")
    for name in ("my", "my-first", "my-recipe", "recipe"):
        (folder / f"{name}.yaml").write_text(dump(recipe))
    (folder / "org").mkdir()
    (folder / "org" / "model").symlink_to(tiny_model)
    for name in ("recipes", "deepspeed", "slurm"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "questions.jsonl").write_text(json.dumps({"prompt": "Q1: "}) + "\n")
    theirs = {"base_model": "a/b", "learning_rate": 1e-4, "datasets": [{"path": "a/b", "type": "alpaca"}]}
    (folder / "qlora.yml").write_text(yaml.safe_dump(theirs))
    (folder / "llama3_lora_sft.yaml").write_text(
        yaml.safe_dump({"stage": "sft", "model_name_or_path": "a/b", "dataset": "own"})
    )
    (folder / "data" / "dataset_info.json").write_text(json.dumps({"own": {"file_name": "own.json"}}))
    return folder


@pytest.fixture
def muster(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, scene: Path) -> Muster:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.chdir(scene)
    return Muster(capsys, monkeypatch)


@pytest.mark.parametrize("one", HERE, ids=lambda one: one.text)
def test_it_runs(one: Shown, muster: Muster, monkeypatch: pytest.MonkeyPatch, scene: Path) -> None:
    before = {path.name for path in scene.iterdir()}
    assert one.text.partition("| ")[2].startswith("muster") or one.text.startswith("muster"), one.text
    words, said = words_of(one.text)
    monkeypatch.setattr(sys, "stdin", io.StringIO(said or "Q1: \n"))
    short = ["--max-new-tokens", "4"] if words[0] in ("generate", "chat") else []
    code = muster(*words, *short)
    assert code == 0, f"{one.pages}: {muster.err}"
    assert muster.out or muster.err
    for made in {path.name for path in scene.iterdir()} - before:
        shutil.rmtree(made) if os.path.isdir(made) else os.remove(made)


@pytest.mark.parametrize("one", COMMANDS, ids=lambda one: one.text)
def test_its_command_and_options_exist(one: Shown) -> None:
    if "muster " not in one.text:
        pytest.skip("another program's")
    (name, *words), _ = words_of(one.text)
    typer.main.get_command(app).commands[name].make_context(name, words)  # type: ignore[attr-defined]


def test_no_exception_is_without_a_command() -> None:
    assert {elsewhere(one.text) for one in COMMANDS} - {None} == set(ELSEWHERE)


def test_commands_were_found() -> None:
    named = {words_of(one.text)[0][0] for one in HERE}
    assert {"validate", "plan", "render", "status", "convert", "generate", "merge", "inspect", "evaluate"} <= named


def test_the_commands_that_the_text_names_exist() -> None:
    known = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    for document in DOCUMENTS:
        named = set(re.findall(r"`muster ([a-z]+)", document.read_text()))
        assert named <= known, document
