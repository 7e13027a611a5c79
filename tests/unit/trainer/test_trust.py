"""Code that a storage names runs only by the user's word: every command, without its option and with it."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import cluster
from launcher.cli.app import main
from launcher.submit import submit
from tests.support.code import model_with_code, reward_with_code, tokenizer_with_code
from tests.support.models import built
from tests.support.played import Played
from tests.support.saved import trained
from tests.support.tasks import task_recipe, write_task_data
from tests.support.training import run_of, small_recipe, train_here, write_pairs
from trainer.__main__ import main as torchrun
from trainer.adapters import targets
from trainer.artifacts import ArtifactRef, find, load, tokenizer_of
from trainer.artifacts.reward_model import check_reward, reward_model
from trainer.checkpoint.artifact_info import ArtifactInfo
from trainer.errors import InputError, UsageError
from trainer.model.placement import Placement
from trainer.recipe import Recipe, dump
from trainer.recipe.sections.data import checked_template
from trainer.recipe.trust import FLAG, Trust, code_of, without_code
from trainer.run import layout
from trainer.run.frozen import check_same_recipe, read_recipe, resumed_recipe
from trainer.run.recipe_url import recipe_at
from trainer.storage import open_storage

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trust")
    write_pairs(folder / "data" / "a.jsonl", 60)
    for task in ("ppo", "reward"):
        write_task_data(folder, task)
    return folder


@pytest.fixture(scope="module")
def honest(tiny_model: Path, folder: Path) -> Recipe:
    return trained("honest", tiny_model, folder)


def model_of(folder: Path) -> Path:
    """Names a folder like no other: transformers keeps the code of models by their folders' names."""
    return folder / f"model_{folder.name}"


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "it-ran"


@pytest.fixture
def run(honest: Recipe, tiny_model: Path, tmp_path: Path, mark: Path) -> Path:
    """A finished run in whose storage somebody has written: its recipe now names a base with code, and trusts it."""
    run = tmp_path / "runs" / "tampered"
    shutil.copytree(run_of(honest).url, run)
    model = model_with_code(tiny_model, model_of(tmp_path), mark)
    section = honest.model.model_copy(update={"path": str(model), "trust_remote_code": True})
    place = {"name": "tampered", "storage": str(tmp_path / "runs"), "tracking": ("tensorboard",)}
    (run / layout.RECIPE).write_text(dump(honest.model_copy(update={"model": section, **place})))
    told = json.loads((run / layout.ADAPTER / "muster.json").read_text())
    told["model"] = section.model_dump(mode="json")
    (run / layout.ADAPTER / "muster.json").write_text(json.dumps(told))
    log = run / layout.log_part(1, 0, 0)
    log.parent.mkdir(exist_ok=True)
    log.write_text("a line\n")
    return run


def muster(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["muster", *map(str, arguments)])
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    with pytest.raises(SystemExit) as left:
        main()
    return int(left.value.code or 0)


LOADING: dict[str, list[str]] = {
    "generate": ["generate", "--run", "RUN", "--prompt", "Rain", "--max-new-tokens", "2"],
    "generate from the adapter": ["generate", "--adapter", "RUN/adapter", "--prompt", "Rain", "--max-new-tokens", "2"],
    "generate from the model": ["generate", "--model", "MODEL", "--prompt", "Rain", "--max-new-tokens", "2"],
    "chat": ["chat", "--run", "RUN", "--max-new-tokens", "2"],
    "merge": ["merge", "--run", "RUN", "--out", "OUT"],
    "evaluate the model": ["evaluate", "RECIPE", "--model", "MODEL", "--limit", "1"],
    "inspect the model": ["inspect", "MODEL"],
}
"""Commands that build the model, whose code they cannot do without."""

READING: dict[str, list[str]] = {
    "status": ["status", "RUN"],
    "ls": ["ls", "RUNS"],
    "logs": ["logs", "RUN"],
    "report": ["report", "RUN", "-o", "OUT"],
    "track": ["track", "RUN"],
    "inspect the run": ["inspect", "RUN"],
    "inspect the adapter": ["inspect", "RUN/adapter"],
    "evaluate on an honest base": ["evaluate", "RECIPE", "--run", "RUN", "--limit", "1"],
    "cancel": ["cancel", "RUN"],
}
"""Commands that do what they are there for without it."""


@pytest.fixture
def words(run: Path, honest: Recipe, tmp_path: Path) -> Any:
    own = tmp_path / "own.yaml"
    data = honest.data.model_copy(update={"eval": honest.data.train})
    own.write_text(dump(honest.model_copy(update={"data": data, "storage": str(tmp_path / "elsewhere")})))
    names = {"RUNS": run.parent, "RUN": run, "MODEL": model_of(tmp_path), "OUT": tmp_path / "out", "RECIPE": own}

    def filled(command: list[str]) -> list[str]:
        for name, value in names.items():
            command = [word.replace(name, str(value)) if word.isupper() or "/" in word else word for word in command]
        return command

    return filled


@pytest.mark.parametrize("command", LOADING)
def test_a_stored_base_brings_no_code_unless_the_command_says_so(
    command: str, words: Any, mark: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    given = words(LOADING[command])
    code = muster(monkeypatch, *given)
    said = capfd.readouterr()
    assert not mark.exists(), "it ran"
    assert code == (1 if command.startswith("inspect") else 2), said.err
    assert f"code that comes with it, which was not run: look at its Python files, then give {FLAG}" in " ".join(
        (said.err + said.out).split()
    )
    assert muster(monkeypatch, *given, FLAG) == 0, capfd.readouterr().err
    assert mark.exists()


@pytest.mark.parametrize("command", READING)
def test_what_reads_a_run_needs_none_of_its_code(
    command: str, words: Any, mark: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if command == "track":
        pytest.importorskip("tensorboardX")
    code = muster(monkeypatch, *words(READING[command]))
    said = capfd.readouterr().err
    assert code == (1 if command == "inspect the run" else 0), said
    if code:
        assert "is not complete: muster.json is not what was committed" in said
    assert not mark.exists()


RESUMING: dict[str, Any] = {
    "run of a stored recipe": lambda patch, url: muster(patch, "run", f"{url}/recipe.yaml"),
    "render of a stored recipe": lambda patch, url: muster(patch, "render", f"{url}/recipe.yaml", "--on", "local"),
    "doctor of a stored recipe": lambda patch, url: muster(patch, "doctor", f"{url}/recipe.yaml"),
    "torchrun of a run": lambda patch, url: torchrun([url]),
    "torchrun of a stored recipe": lambda patch, url: torchrun([f"{url}/recipe.yaml"]),
}


@pytest.mark.parametrize("command", RESUMING)
def test_a_stored_recipe_with_code_is_trained_only_by_the_users_word(
    command: str, run: Path, mark: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert RESUMING[command](monkeypatch, f"file://{run}") == 2
    said = capfd.readouterr().err
    assert "recipe.yaml is read from a storage and would run the code that comes with model.path" in said
    assert f"then give {FLAG}, or name a recipe file of your own" in said
    assert len([line for line in said.splitlines() if line.startswith("muster:")]) == 1
    assert not mark.exists()


def test_by_the_users_word_a_stored_run_is_resumed_with_its_code(
    honest: Recipe, tiny_model: Path, tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run was begun by a recipe of the user's own, which trusts the base; then it is known by its address alone."""
    model = model_with_code(tiny_model, model_of(tmp_path), mark)
    section = honest.model.model_copy(update={"path": str(model), "trust_remote_code": True})
    changes = {"model": section, "storage": str(tmp_path / "runs"), "name": "own"}
    training = honest.training.model_copy(update={"stop_after": 1})
    recipe = honest.model_copy(update={**changes, "training": training})
    assert train_here(recipe) == "interrupted"
    assert mark.exists(), "a user's own recipe needs no option"
    stored = run_of(recipe)
    check_same_recipe(stored, recipe)  # what is compared is the whole recipe, its trust included
    assert resumed_recipe(stored, trust=True).model == section
    with pytest.raises(UsageError, match="would run the code"):
        resumed_recipe(stored)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert torchrun([stored.url, FLAG]) == 0
    assert Path(stored.url, layout.ADAPTER, "adapter_model.safetensors").is_file()


def test_a_stored_reward_function_is_not_imported(
    tiny_model: Path, folder: Path, tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    function = reward_with_code(tmp_path / "rate.py", mark)
    recipe = task_recipe("ppo", "code", tiny_model, folder, **{"ppo.reward": {"function": function}})
    run = tmp_path / "run"
    run.mkdir()
    (run / layout.RECIPE).write_text(dump(recipe))
    for url in (str(run), f"file://{run}/recipe.yaml"):
        assert torchrun([url]) == 2
    assert read_recipe(open_storage(str(run))).ppo.reward.function is None
    with pytest.raises(UsageError, match=f"would run ppo.reward.function {function}"):
        recipe_at(f"file://{run}/recipe.yaml")
    assert not mark.exists()
    granted = recipe_at(f"file://{run}/recipe.yaml", trust=True)
    assert granted == recipe == recipe_at(str(run / "recipe.yaml")), "a file is its user's word"
    check_reward(granted)
    assert mark.exists()
    shipped = task_recipe("ppo", "x", tiny_model, folder, **{"ppo.reward": {"function": SHIPPED}})
    assert (without_code(shipped), code_of(shipped)) == (shipped, []), "what comes with muster is nobody else's code"


def test_a_stored_optimizer_is_not_imported(tiny_model: Path, folder: Path, tmp_path: Path) -> None:
    recipe = small_recipe("own", tiny_model, folder, **{"optimizer": {"name": "mine:Own", "lr": 1e-3}})
    run = tmp_path / "run"
    run.mkdir()
    (run / layout.RECIPE).write_text(dump(recipe))
    assert read_recipe(open_storage(str(run))).optimizer.name == "adamw"
    with pytest.raises(UsageError, match=r"would run optimizer.name mine:Own"):
        recipe_at(f"file://{run}/recipe.yaml")
    assert recipe_at(f"file://{run}/recipe.yaml", trust=True) == recipe == recipe_at(str(run / "recipe.yaml"))


def test_the_variables_of_a_stored_recipe_are_not_set(honest: Recipe, tmp_path: Path) -> None:
    """Some of them name a library to load (NCCL_NET_PLUGIN), or the server that gets a token (HF_ENDPOINT)."""
    variables = {"HF_ENDPOINT": "http://evil.example"}
    recipe = honest.model_copy(update={"cluster": honest.cluster.model_copy(update={"env": variables})})
    (tmp_path / layout.RECIPE).write_text(dump(recipe))
    run = open_storage(str(tmp_path))
    assert read_recipe(run).cluster.env == {}
    for refused in (lambda: resumed_recipe(run), lambda: recipe_at(f"file://{tmp_path}/recipe.yaml")):
        with pytest.raises(UsageError, match=r"would run libraries with the variables of cluster\.env \(HF_ENDPOINT\)"):
            refused()
    assert resumed_recipe(run, trust=True) == recipe == recipe_at(str(tmp_path / layout.RECIPE))


SHIPPED = "trainer.tasks.ppo.rewards:gsm8k"


def test_a_stored_reward_model_brings_code_only_as_the_policys_own_trusted_base(
    tiny_model: Path, folder: Path, tmp_path: Path, mark: Path
) -> None:
    honest = trained("reward-honest", tiny_model, folder, **_of_task("reward", folder))
    run = tmp_path / "runs" / "reward"
    shutil.copytree(run_of(honest).url, run)
    base = model_with_code(tiny_model, model_of(tmp_path), mark)
    section = honest.model.model_copy(update={"path": str(base), "trust_remote_code": True})
    (run / layout.RECIPE).write_text(dump(honest.model_copy(update={"model": section})))
    recipe = task_recipe("ppo", "asks", tiny_model, folder, **{"ppo.reward": {"model": str(run)}})
    check_reward(recipe)
    with pytest.raises(InputError, match="code that comes with it, which was not run"):
        reward_model(recipe, CPU)
    tokenizer_with_code(run / layout.ADAPTER, mark)
    trusting = recipe.model_copy(update={"model": section})
    found = find(ArtifactRef(run=str(run)), tmp_path / "found", trust=Trust(model=trusting.model))
    assert (found.section.trust_remote_code, found.trusted) == (True, False)
    with pytest.raises(InputError, match=r"the tokenizer in .* is code that comes with it"):
        tokenizer_of(replace(found, adapters={"default": run / layout.ADAPTER}))
    assert not mark.exists()


def _of_task(task: str, folder: Path) -> dict[str, Any]:
    recipe = task_recipe(task, "x", folder, folder)
    return {"task": task, "data.train": recipe.model_dump(mode="json")["data"]["train"], "data.packing": False}


def test_code_beside_an_adapter_runs_by_the_command_alone(
    honest: Recipe, tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    adapter = tmp_path / f"adapter_{tmp_path.name}"
    shutil.copytree(Path(run_of(honest).url, layout.ADAPTER), adapter)
    tokenizer_with_code(adapter, mark)
    words = ["generate", "--adapter", adapter, "--prompt", "Rain", "--max-new-tokens", 2]
    assert muster(monkeypatch, *words) == 2
    assert f"is code that comes with it, which was not run: look at its Python files, then give {FLAG}" in " ".join(
        capfd.readouterr().err.split()
    )
    assert not mark.exists()
    assert muster(monkeypatch, *words, FLAG) == 0
    assert mark.exists()


def test_where_transformers_has_the_model_its_code_is_left_alone_aloud(
    honest: Recipe, tiny_model: Path, tmp_path: Path, mark: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = model_with_code(tiny_model, model_of(tmp_path), mark, kind="llama")
    subject = find(ArtifactRef(model=str(model)), tmp_path / "found")
    load(subject, Placement.on(CPU), None)
    assert "brings code that was not run; transformers' own takes its place" in caplog.text
    assert not mark.exists()


@pytest.mark.parametrize(
    ("section", "settings"),
    [
        ("slurm", {"options": ("--export=MUSTER_ACTIVATE=/tmp/evil",)}),
        ("slurm", {"container": "registry.example#evil"}),
        ("kubernetes", {"image": "registry.example/evil"}),
        ("kubernetes", {"pod": {"containers": [{"name": "evil", "image": "registry.example/evil"}]}}),
        ("kubernetes", {"head_pod": {"automountServiceAccountToken": True}}),
        ("ray", {"address": "http://evil.example:8265"}),
        ("ray", {"runtime_env": {"pip": ["evil"]}}),
        ("skypilot", {"setup": "curl evil"}),
        ("skypilot", {"options": {"workdir": "/"}}),
    ],
)
def test_a_stored_recipe_is_not_submitted_as_it_likes(
    section: str, settings: dict[str, Any], honest: Recipe, tmp_path: Path
) -> None:
    inner = getattr(honest.cluster, section).model_copy(update=settings)
    recipe = honest.model_copy(update={"cluster": honest.cluster.model_copy(update={section: inner})})
    (tmp_path / "recipe.yaml").write_text(dump(recipe))
    with pytest.raises(UsageError, match=rf"would run cluster\.{section}\.{next(iter(settings))} "):
        recipe_at(f"file://{tmp_path}/recipe.yaml")
    assert recipe_at(f"file://{tmp_path}/recipe.yaml", trust=True) == recipe == recipe_at(f"{tmp_path}/recipe.yaml")
    assert resumed_recipe(open_storage(str(tmp_path))) == recipe, "torchrun submits nothing"


def test_a_recipe_trusts_its_own_base_and_no_other(tmp_path: Path, honest: Recipe) -> None:
    own = honest.model.model_copy(update={"trust_remote_code": True})
    trust = Trust(model=own)
    assert trust.grant(honest.model).trust_remote_code
    for change in ({"path": "other"}, {"revision": "other"}):
        assert not trust.grant(own.model_copy(update=change)).trust_remote_code
    assert not Trust(model=honest.model).grant(own).trust_remote_code
    assert not Trust().grant(own).trust_remote_code
    assert Trust(everything=True).grant(honest.model).trust_remote_code


def test_the_users_word_goes_along_with_a_job_that_reads_its_recipe_from_the_storage(
    honest: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("ray", "slurm", "kubernetes"):
        monkeypatch.setitem(cluster.KINDS, kind, cluster.KINDS[kind]._replace(code="tests.support.played:Played"))
    Played.reset()
    section = honest.model.model_copy(update={"trust_remote_code": True})
    trusting = honest.model_copy(update={"model": section, "storage": str(tmp_path / "runs"), "name": "sent"})
    for kind in ("slurm", "ray", "kubernetes"):
        submit.run_elsewhere(trusting, kind, [], None, detach=True)
    plain = trusting.model_copy(update={"model": honest.model})
    submit.run_elsewhere(plain, "slurm", [], None, detach=True)
    commands = [job.command for job, _ in Played.submitted]
    assert commands == [("run", FLAG), ("run",), ("run",), ("run",)]
    _, place = Played.submitted[0]
    assert recipe_at(f"file://{place}", trust=True) == trusting
    with pytest.raises(UsageError, match="would run the code"):
        recipe_at(f"file://{place}")
    text = Path(place).read_text()
    Path(place).write_text(text.replace(honest.model.path, str(tmp_path / "evil")))
    for changed in (place, f"file://{place}"):
        with pytest.raises(InputError, match="is not the recipe that was submitted: it was changed since"):
            recipe_at(changed, trust=True)


@pytest.mark.parametrize("script", ["train", "train_torchrun"])
def test_slurms_scripts_give_the_users_word_where_they_read_the_recipe(script: str, tmp_path: Path) -> None:
    """Once, from the storage; what they keep of it is a file of the job's own."""
    for name in ("muster", "ray", "python", "torchrun"):
        (tmp_path / name).write_text(
            f'#!/bin/bash\n[[ " $* " == *" render "* ]] || exit 0\necho "$@" >{tmp_path}/given\nexit 7\n'
        )
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": str(tmp_path)}
    url = "s3://runs/r/submitted/x.yaml"
    done = subprocess.run(
        ["bash", str(ROOT / "slurm" / f"{script}.sbatch"), url, FLAG, "--takeover"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 7, done.stderr
    assert (tmp_path / "given").read_text().split()[-5:] == ["render", "--on", "local", FLAG, url]


@pytest.mark.parametrize("template", ["{prompt:>99999}", "{prompt:{width}}", "{prompt.__class__}", "{0}", 5, ["{a}"]])
def test_a_stored_template_fills_in_a_column_and_no_more(template: Any, honest: Recipe, tmp_path: Path) -> None:
    ArtifactInfo.of(honest).write(tmp_path)
    assert ArtifactInfo.read(tmp_path) == ArtifactInfo.of(honest)
    told = json.loads((tmp_path / "muster.json").read_text())
    (tmp_path / "muster.json").write_text(json.dumps({**told, "template": template}))
    assert ArtifactInfo.read(tmp_path) is None
    if isinstance(template, str):
        with pytest.raises(ValueError, match=r"pads a column|names no column"):
            checked_template(template)


@pytest.mark.parametrize("field", ["megatron_config", "megatron_core"])
def test_no_field_of_a_method_names_code(field: str, tiny_model: Path, folder: Path) -> None:
    method = {"peft": "LORA", "r": 4, field: {"a": 1} if field == "megatron_config" else "this"}
    recipe = small_recipe("megatron", tiny_model, folder, **{"adapter": {"method": method}})
    with pytest.raises(InputError, match=f"LORA has no field '{field}'"):
        built(recipe)


def test_an_endless_expression_of_a_recipe_comes_to_an_end(
    tiny_model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "MATCHING_S", 0.5)
    recipe = small_recipe("endless", tiny_model, folder, **{"adapter.target_modules": "(([a-z_.0-9]+)+)+!"})
    with pytest.raises(InputError, match="takes too long on this model's names; name the modules"):
        built(recipe)
