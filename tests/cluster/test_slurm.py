"""Runs on a real Slurm: `sbatch slurm/train.sbatch RECIPE`, its time limits, lost nodes, requeues and cancellations."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.monitor.status import read_status
from tests.support.jobs import ROOT, start, write_recipe
from tests.support.slurm import SlurmCluster
from tests.support.training import adapter_bytes, losses, run_of, small_recipe, train_in_processes, write_pairs
from tests.support.waiting import tail
from trainer.recipe import Recipe
from trainer.run import layout
from trainer.run.jsonl import read_rows

pytestmark = pytest.mark.timeout(1200)
LONG = {"training.steps": 20000, "checkpoint.every_steps": 10**6}
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT")


class Site:
    """A Slurm with a program to run, and what tests ask of a run on it."""

    def __init__(self, slurm: SlurmCluster, folder: Path, model: Path) -> None:
        self.slurm, self.folder, self._model = slurm, folder, model
        write_pairs(folder / "data" / "a.jsonl", 90)

    def recipe(self, name: str, workers: Any, **changes: Any) -> Recipe:
        return small_recipe(name, self._model, self.folder, resources={"workers": workers}, **changes)

    def submit(self, script: str, recipe: Recipe, *options: str) -> str:
        """From a folder of the test's own, with the muster that is on PATH."""
        log, path = f"--output={self.log(recipe)}", ROOT / "slurm" / f"{script}.sbatch"
        return self.slurm.submit(*options, log, path, write_recipe(recipe, self.folder), cwd=self.folder)

    def log(self, recipe: Recipe) -> Path:
        return self.folder / f"{recipe.name}.log"

    def until(self, recipe: Recipe, condition: Callable[[], object], timeout_s: float, what: str) -> None:
        try:
            self.slurm.until(condition, timeout_s, what=f"{recipe.name}: {what}", every_s=0.3)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{tail(self.log(recipe))}") from None

    def until_step(self, recipe: Recipe, step: int, timeout_s: float = 120) -> None:
        self.until(recipe, lambda: max(losses(recipe), default=0) >= step, timeout_s, f"step {step}")

    def until_ended(self, recipe: Recipe, job: str, timeout_s: float = 150) -> str:
        self.until(recipe, lambda: self.slurm.job_state(job) in ENDED, timeout_s, "the job's end")
        return self.slurm.job_state(job)

    def said(self, recipe: Recipe) -> str:
        return self.log(recipe).read_text(errors="replace") if self.log(recipe).exists() else ""


@pytest.fixture
def site(slurm: SlurmCluster, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("MUSTER_RAY_TMP", str(slurm.hosts.folder))
    for name, value in slurm.env.items():
        monkeypatch.setenv(name, value)
    return Site(slurm, tmp_path, tiny_model)


def hosts_by_attempt(recipe: Recipe) -> dict[int, list[str]]:
    return {e["attempt"]: e["hosts"] for e in read_rows(run_of(recipe), layout.EVENTS) if e["event"] == "start"}


@pytest.mark.night
def test_before_its_time_limit_a_job_commits_and_requeues_itself_and_cancelled_it_does_not(site: Site) -> None:
    recipe = site.recipe("limit", 2, **LONG)
    job = site.submit("train", recipe, "--nodes=2")
    site.until_step(recipe, 5)
    Path(site.folder, "limit.yaml").write_text("name: the-next-experiment\n")
    assert len(set(hosts_by_attempt(recipe)[1])) == 2
    site.slurm.run("scancel", "--batch", "--signal=USR1", job)  # as Slurm does before the limit
    site.until(recipe, lambda: "requeued" in site.said(recipe), 60, "the end of the first start")
    committed = read_status(run_of(recipe)).checkpoints[-1].step
    assert committed >= 5
    site.until(recipe, lambda: 2 in hosts_by_attempt(recipe), 90, "the second start")
    assert site.slurm.job(job)["Restarts"] == "1"
    site.until_step(recipe, committed + 5)
    status = read_status(run_of(recipe))
    assert (status.state, status.job, status.attempts) == ("running", f"slurm:{job}", 2)

    cancelled = start(["-m", "launcher", "cancel", run_of(recipe).url])
    assert cancelled.wait(60) == 0, cancelled.output()
    assert site.until_ended(recipe, job, 60) in ("FAILED", "CANCELLED")
    assert site.slurm.job(job)["Restarts"] == "1"
    status = read_status(run_of(recipe))
    assert status.state == "interrupted"
    assert status.checkpoints[-1].step == status.step > committed, "it committed before it ended"
    assert not list(site.slurm.hosts.folder.glob("muster-*")), "what Ray wrote on the nodes is gone"
    assert not list(site.folder.glob(".muster-*"))


@pytest.mark.night
def test_an_elastic_run_goes_on_without_a_node_that_crashed(site: Site) -> None:
    recipe = site.recipe("crash", [1, 2], **{"training.steps": 300, "checkpoint.every_steps": 5})
    job = site.submit("train", recipe, "--nodes=2")
    site.until_step(recipe, 12)
    last = site.slurm.run("scontrol", "show", "hostnames", site.slurm.job(job)["NodeList"]).split()[-1]
    site.slurm.crash(int(last.removeprefix("node")))
    site.until(recipe, lambda: 2 in hosts_by_attempt(recipe), 90, "the second attempt")
    assert site.until_ended(recipe, job) == "COMPLETED", site.said(recipe)
    status = read_status(run_of(recipe))
    assert (status.state, status.world_size, status.step) == ("succeeded", 1, 300)
    assert site.slurm.job(job)["Restarts"] == "0"


@pytest.mark.night
def test_torchrun_requeues_before_the_limit_and_ends_with_musters_exit_codes(site: Site) -> None:
    wrong = site.recipe("wrong", 2)
    wrong = wrong.model_copy(update={"model": wrong.model.model_copy(update={"path": str(site.folder / "no-model")})})
    job = site.submit("train_torchrun", wrong, "--nodes=2")
    assert site.until_ended(wrong, job) == "FAILED"
    assert (site.slurm.job(job)["ExitCode"], site.slurm.job(job)["Restarts"]) == ("2:0", "0"), site.said(wrong)

    recipe = site.recipe("cancelled", 2, **LONG)
    job = site.submit("train_torchrun", recipe, "--nodes=2")
    site.until_step(recipe, 5)
    site.slurm.run("scancel", "--batch", "--signal=USR1", job)
    site.until(recipe, lambda: 2 in hosts_by_attempt(recipe), 120, "the second start")
    assert len(set(hosts_by_attempt(recipe)[2])) == 2
    site.until_step(recipe, read_status(run_of(recipe)).checkpoints[-1].step + 3)
    cancelled = start(["-m", "launcher", "cancel", run_of(recipe).url])
    assert cancelled.wait(60) == 0, cancelled.output()
    site.until_ended(recipe, job, 60)
    assert site.slurm.job(job)["Restarts"] == "1"
    status = read_status(run_of(recipe))
    assert (status.state, status.attempts) == ("interrupted", 2)
    assert status.checkpoints[-1].step == status.step
    assert not list(site.folder.glob(".muster-*"))


def test_submitted_by_muster_it_is_followed_to_its_end(site: Site) -> None:
    """The name of a folder is no word of any shell."""
    site.folder = site.folder / 'it\'s $(touch owned) & "so" ünï'
    site.folder.mkdir()
    write_pairs(site.folder / "data" / "a.jsonl", 90)
    recipe = site.recipe("followed", 1)
    command = start(["-m", "launcher", "run", write_recipe(recipe, site.folder), "--on", "slurm"])
    assert command.wait(150) == 0, command.output()
    job = read_status(run_of(recipe)).job
    assert f"submitted as {job}" in command.output()
    assert "finished: the adapter is" in command.output()
    assert not list(ROOT.rglob("owned"))
    Path(site.slurm.job(str(job).removeprefix("slurm:"))["StdOut"]).unlink()


@pytest.mark.night
def test_a_run_of_a_fixed_size_that_lost_a_node_is_requeued_on_another(site: Site) -> None:
    recipe = site.recipe("moved", 2, **{"training.steps": 2000, "checkpoint.every_steps": 5})
    job = site.submit("train", recipe, "--nodes=2")
    site.until_step(recipe, 12)
    _, last = site.slurm.run("scontrol", "show", "hostnames", site.slurm.job(job)["NodeList"]).split()
    site.slurm.crash(int(last.removeprefix("node")))
    site.until(recipe, lambda: "requeued" in site.said(recipe), 150, "that it gives up on two of three nodes")
    assert f"lost {last}" in site.said(recipe)
    site.until(recipe, lambda: last not in hosts_by_attempt(recipe).get(2, [last]), 120, "a start on other nodes")
    site.slurm.run("scancel", job)
    site.until_ended(recipe, job, 60)


@pytest.mark.night
def test_a_job_that_is_cancelled_while_it_requeues_itself_does_not_come_back(site: Site) -> None:
    recipe = site.recipe("cancelled-late", 1, **LONG)
    job = site.submit("train", recipe)
    site.until_step(recipe, 3)
    site.slurm.run("scancel", "--batch", "--signal=USR1", job)
    site.until(recipe, lambda: "requeued" in site.said(recipe), 60, "the end of the first start")
    site.slurm.run("scancel", job)
    assert site.until_ended(recipe, job, 60) == "CANCELLED"
    assert site.slurm.job(job)["Restarts"] == "0"


@pytest.mark.night
def test_a_warning_while_data_is_prepared_is_heard(site: Site) -> None:
    recipe = site.recipe("early", 1, **LONG)
    job = site.submit("train", recipe)
    site.until(recipe, lambda: "are checked" in site.said(recipe), 60, "the driver")
    site.slurm.run("scancel", "--batch", "--signal=USR1", job)
    site.until(recipe, lambda: "requeued" in site.said(recipe), 60, "the end of the first start")
    site.until_step(recipe, 3)
    site.slurm.run("scancel", job)
    site.until_ended(recipe, job, 60)


@pytest.mark.night
def test_a_node_that_was_cut_off_comes_back(site: Site) -> None:
    recipe = site.recipe("cut", [1, 2], **{"training.steps": 10**6, "checkpoint.every_steps": 5})
    job = site.submit("train", recipe, "--nodes=2")
    site.until_step(recipe, 12)
    last = site.slurm.run("scontrol", "show", "hostnames", site.slurm.job(job)["NodeList"]).split()[-1]
    site.slurm.cut(int(last.removeprefix("node")))
    site.until(recipe, lambda: 2 in hosts_by_attempt(recipe), 90, "a start without it")
    assert hosts_by_attempt(recipe)[2] != [last]
    site.slurm.heal(int(last.removeprefix("node")))
    site.until(recipe, lambda: last in hosts_by_attempt(recipe).get(3, []), 150, "a start with it")
    site.slurm.run("scancel", job)
    site.until_ended(recipe, job, 60)


@pytest.mark.night
def test_a_killed_driver_and_a_lost_head_start_again_by_themselves(site: Site) -> None:
    recipe = site.recipe("head", 2, **{"training.steps": 20000, "checkpoint.every_steps": 5})
    job = site.submit("train", recipe, "--nodes=2")
    site.until_step(recipe, 12)
    head = int(site.slurm.job(job)["BatchHost"].removeprefix("node"))
    site.slurm.hosts.run(head, ["pkill", "-KILL", "-f", "launcher run"])
    site.until(recipe, lambda: 2 in hosts_by_attempt(recipe), 150, "a start after the driver was killed")
    site.slurm.crash(int(site.slurm.job(job)["BatchHost"].removeprefix("node")))
    site.until(recipe, lambda: 3 in hosts_by_attempt(recipe), 200, "a start after the head's node crashed")
    site.slurm.run("scancel", job)
    site.until_ended(recipe, job, 60)


@pytest.mark.night
def test_torchrun_is_requeued_when_a_node_crashes(site: Site) -> None:
    recipe = site.recipe("torchrun-crash", 2, **{"training.steps": 20000, "checkpoint.every_steps": 5})
    job = site.submit("train_torchrun", recipe, "--nodes=2")
    site.until_step(recipe, 12)
    last = site.slurm.run("scontrol", "show", "hostnames", site.slurm.job(job)["NodeList"]).split()[-1]
    site.slurm.crash(int(last.removeprefix("node")))
    site.until(recipe, lambda: 2 in hosts_by_attempt(recipe), 240, "a start on other nodes")
    site.slurm.run("scancel", job)
    site.until_ended(recipe, job, 60)


@pytest.mark.night
def test_a_worker_gets_the_gpus_of_the_job_and_only_those(site: Site) -> None:
    """These GPUs are files: what torch says of them shows that Ray had one to give."""
    for options, told in ((["--gpus-per-node=1"], "torch"), ([], "missing: 1 GPU")):
        recipe = site.recipe(f"gpu{len(options)}", 1).model_copy()
        resources = recipe.resources.model_copy(update={"gpus_per_worker": 1})
        job = site.submit("train", recipe.model_copy(update={"resources": resources}), *options)
        assert site.until_ended(recipe, job) == "FAILED"
        assert site.slurm.job(job)["ExitCode"] == "2:0"
        assert told in site.said(recipe)


@pytest.mark.night
def test_doctor_looks_at_the_nodes_of_a_job(site: Site) -> None:
    recipe = site.recipe("looked-at", 2)
    command = start(["-m", "launcher", "doctor", write_recipe(recipe, site.folder), "--on", "slurm", "--json"])
    assert command.wait(120) in (0, 1), command.output()
    (line,) = [line for line in command.output().splitlines() if line.startswith("{")]
    told = json.loads(line)
    assert [host["state"] for host in told["hosts"]] == ["ok", "ok"]
    assert not read_rows(run_of(recipe), layout.EVENTS)
    for log in ROOT.glob("slurm-*.out"):
        log.unlink()


@pytest.mark.night
def test_torchrun_commits_before_the_limit_and_ends_with_the_same_bytes(site: Site) -> None:
    changes = {"training.steps": 400, "checkpoint.every_steps": 10**6}
    recipe, undisturbed = (site.recipe(name, 2, **changes) for name in ("torchrun", "undisturbed"))
    train_in_processes([undisturbed], 2)
    job = site.submit("train_torchrun", recipe, "--nodes=2")
    site.until_step(recipe, 5)
    site.slurm.run("scancel", "--batch", "--signal=USR1", job)
    site.until(recipe, lambda: 2 in hosts_by_attempt(recipe), 120, "the second start")
    assert site.until_ended(recipe, job) == "COMPLETED", site.said(recipe)
    assert len(set(hosts_by_attempt(recipe)[2])) == 2
    assert read_status(run_of(recipe)).state == "succeeded"
    assert adapter_bytes(recipe) == adapter_bytes(undisturbed)


STAND_INS = {
    "srun": """#!/bin/bash
# pyxis is not installed here: notes its options, and runs the step without a container.
echo srun "$@" >>"$NOTES"
[[ $1 != --help ]] || { echo "  --container-image=[USER@][REGISTRY#]IMAGE[:TAG]|PATH"; exit; }
words=()
for word in "$@"; do [[ $word == --container-* ]] || words+=("$word"); done
exec REAL "${words[@]}"
""",
    "apptainer": """#!/bin/bash
# Apptainer is not installed here: notes its options, and runs the command without a container.
echo apptainer "$@" >>"$NOTES"
until [[ $1 == *.sif ]]; do shift; done
exec "${@:2}"
""",
}


@pytest.mark.night
@pytest.mark.parametrize(
    ("script", "image", "driver"),
    [
        ("train", "image.sif", "apptainer exec "),
        ("train", "image.sqsh", "srun --overlap "),
        ("train_torchrun", "image.sqsh", "srun --no-kill --wait=60 "),
        ("train_torchrun", "image.sif", "srun --no-kill --wait=60 "),
    ],
)
def test_a_job_in_a_container_hears_the_warning_and_requeues_itself(
    script: str, image: str, driver: str, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With stand-ins for the programs that make the container: the command lines, signals and exit codes are real."""
    (tmp_path / "bin").mkdir()
    for name, text in STAND_INS.items():
        (tmp_path / "bin" / name).write_text(text.replace("REAL", str(shutil.which("srun"))))
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / image).touch()
    for name, value in {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "NOTES": str(tmp_path / "notes"),
        "MUSTER_CONTAINER": image,
    }.items():
        monkeypatch.setenv(name, value)
    recipe = site.recipe("boxed", 2, **LONG)
    job = site.submit(script, recipe, "--nodes=2")
    site.until_step(recipe, 5)
    site.slurm.run("scancel", "--batch", "--signal=USR1", job)
    site.until(recipe, lambda: 2 in hosts_by_attempt(recipe), 150, "the second start")
    assert "requeued" in site.said(recipe)
    assert read_status(run_of(recipe)).checkpoints[-1].step >= 5
    site.slurm.run("scancel", job)
    site.until_ended(recipe, job, 60)
    noted = (tmp_path / "notes").read_text().splitlines()
    started = [line for line in noted if line.startswith(driver) and (script != "train" or " --on ray " in line)]
    assert len(started) == 2, noted
    assert all(str(tmp_path / image) in line for line in started), started


@pytest.mark.night
def test_the_jobs_of_an_array_are_requeued_and_cancelled_one_by_one(site: Site) -> None:
    recipe = site.recipe("array", 1, **LONG)
    path, script = write_recipe(recipe, site.folder), ROOT / "slurm" / "train.sbatch"
    array = site.slurm.submit(
        "--array=0-1", f"--output={site.folder}/%a.log", script, path, "name=array-%a", "seed=%a", cwd=site.folder
    )
    recipes = [recipe.model_copy(update={"name": f"array-{index}", "seed": index}) for index in (0, 1)]
    for one in recipes:
        site.until_step(one, 3)
    # The array's own number is also that of its last job.
    for index, one in enumerate(recipes):
        assert read_status(run_of(one)).job == f"slurm:{array}_{index}"
        site.slurm.run("scancel", "--batch", "--signal=USR1", f"{array}_{index}")
        site.until(one, lambda one=one: 2 in hosts_by_attempt(one), 120, "the second start")
        assert site.slurm.job(f"{array}_{index}")["Restarts"] == "1"
        assert len(hosts_by_attempt(recipes[1 - index])) == index + 1, "the other one was left alone"
    site.until_step(recipes[1], read_status(run_of(recipes[1])).checkpoints[-1].step + 3)
    cancelled = start(["-m", "launcher", "cancel", run_of(recipes[1]).url])
    assert cancelled.wait(60) == 0, cancelled.output()
    site.until(recipes[1], lambda: site.slurm.job_state(f"{array}_1") in ENDED, 60, "the end of the second")
    assert site.slurm.job_state(f"{array}_0") == "RUNNING"
    site.slurm.run("scancel", array)
    site.until(recipes[0], lambda: site.slurm.job_state(f"{array}_0") in ENDED, 60, "the end of the first")
