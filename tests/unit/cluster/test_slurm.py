"""What is asked of Slurm, as argument lists, and what is made of its answers: nothing is started."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster import ClusterError, ClusterJob
from cluster.ray_nodes import NODE_SETTINGS
from cluster.slurm import SCRIPT, Slurm, call, fields
from trainer.recipe.sections.cluster import SlurmSection

ODD = 'it\'s $(touch x) `id` "q" ünï & ; |\n#'


def job(workers: tuple[int, int] = (8, 8), gpus: int = 1, cpus: int = 4, **settings: Any) -> ClusterJob:
    section = SlurmSection.model_validate(settings).model_dump(mode="json")
    return ClusterJob(
        "a-run", "/shared/runs/a-run", "name: a-run\n", workers, gpus, cpus, section, arguments=("r.yaml", "seed=3")
    )


def asked(made: ClusterJob) -> list[str]:
    return shlex.split(Slurm({}).render(made))


class Commands:
    """Slurm's commands, played: answers by the command's name."""

    def __init__(self, **answers: tuple[int, str, str] | list[tuple[int, str, str]]) -> None:
        self._answers, self.calls, self.environments = answers, list[list[str]](), list[Mapping[str, str]]()

    def __call__(self, arguments: Sequence[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        self.calls.append(list(arguments))
        self.environments.append(environment)
        answer = self._answers[arguments[0]]
        code, out, err = answer.pop(0) if isinstance(answer, list) else answer
        return subprocess.CompletedProcess(arguments, code, out, err)


def beside(made: ClusterJob, servers: int, gpus: int) -> ClusterJob:
    return replace(made, servers=servers, gpus_per_server=gpus)


@pytest.mark.parametrize(
    ("made", "nodes", "gpus", "cpus"),
    [
        (job(), "1", 8, 32),
        (job((16, 16)), "2", 8, 32),
        (job((12, 12)), "2", 6, 24),
        (job((4, 16)), "1-2", 8, 32),
        (job((4, 4), gpus=2, gpus_per_node=4), "2", 4, 8),
        (job((4, 4), gpus=0), "4", None, 4),
        (job((1, 3), gpus=0), "1-3", None, 4),
        (job((4, 4), gpus=0, nodes=2), "2", None, 8),
        (job((8, 8), nodes=4), "4", 2, 8),
        (job((4, 4), nodes=3), "3", 2, 8),
        (job((2, 8), nodes=4), "4", 2, 8),
        (beside(job((4, 4)), 1, 4), "1", 8, 32),
        (beside(job((4, 4)), 2, 4), "2", 8, 32),
        (beside(job((1, 1)), 3, 5), "3", 8, 32),  # 16 GPUs, and none of two nodes holds two servers
        (beside(job((2, 10)), 2, 2), "1-2", 8, 32),
        (beside(job((4, 4), gpus=2), 1, 3), "2", 8, 16),
        (beside(job((4, 4), gpus=0), 2, 0), "6", None, 4),
        (beside(job((1, 1), nodes=2), 4, 3), "2", 7, 28),
    ],
)
def test_nodes_have_what_their_workers_need(made: ClusterJob, nodes: str, gpus: int | None, cpus: int) -> None:
    words = asked(made)
    assert f"--nodes={nodes}" in words
    assert f"--cpus-per-task={cpus}" in words
    assert [w for w in words if w.startswith("--gpus")] == ([] if gpus is None else [f"--gpus-per-node={gpus}"])


@pytest.mark.parametrize(
    ("workers", "replicas", "gpus_per_node", "nodes", "per_node"),
    [
        ((64, 64), 8, 8, "8", 8),  # a replica is a node
        ((64, 64), 16, 8, "8", 8),  # a node has two replicas
        ((64, 64), 4, 8, "8", 8),  # a replica has two nodes
        ((24, 24), 4, 8, "4", 6),  # nodes of eight would share replicas of six
        ((36, 36), 3, 8, "6", 6),  # a replica of twelve has two nodes of six
        ((24, 48), 8, 8, "4-8", 6),
        ((22, 22), 2, 8, "3", 8),  # eleven workers are not divided evenly
    ],
)
def test_nodes_have_complete_replicas_or_replicas_complete_nodes(
    workers: tuple[int, int], replicas: int, gpus_per_node: int, nodes: str, per_node: int
) -> None:
    words = asked(replace(job(workers, gpus_per_node=gpus_per_node), replicas=replicas))
    assert f"--nodes={nodes}" in words
    assert f"--gpus-per-node={per_node}" in words


def test_a_worker_that_fits_on_no_node() -> None:
    with pytest.raises(ClusterError, match=r"takes 8 GPUs .*a node has 4 .*correct one"):
        asked(job(gpus=8, gpus_per_node=4))


def test_what_the_recipe_says_of_slurm_is_asked_for_word_by_word() -> None:
    settings = {"partition": "gpu", "account": "a b", "qos": "high", "time": "1-00:00:00", "memory_per_node": "0"}
    words = asked(job(**settings, constraint="a100&ib", options=["--reservation=c d", "--exclusive"]))
    assert words[0] == "sbatch"
    assert {"--partition=gpu", "--account=a b", "--qos=high", "--time=1-00:00:00", "--mem=0"} < set(words)
    assert {"--constraint=a100&ib", "--reservation=c d", "--exclusive", "--job-name=a-run"} < set(words)
    assert words[-3:] == [str(SCRIPT), "r.yaml", "seed=3"]
    with pytest.raises(ClusterError, match="'exclusive' is no option"):
        asked(job(options=["exclusive"]))


def test_a_container_is_named_to_the_script() -> None:
    made = job(container="my image.sqsh", container_mounts=["/data:/data:ro", "/scratch:/tmp/x"])
    words = asked(made)
    variables = ["MUSTER_CONTAINER=my image.sqsh", "MUSTER_CONTAINER_MOUNTS=/data:/data:ro,/scratch:/tmp/x"]
    assert words[:4] == ["env", *variables, "sbatch"]
    commands = Commands(sbatch=(0, "12\n", ""))
    Slurm({"MUSTER_CONTAINER": "another.sif"}, commands).submit(made, "r.yaml")
    assert commands.environments[0]["MUSTER_CONTAINER"] == "my image.sqsh"
    Slurm({"MUSTER_CONTAINER": "another.sif"}, commands).submit(job(), "r.yaml")
    assert commands.environments[1]["MUSTER_CONTAINER"] == "another.sif", "the shell's, where the recipe has none"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"container_mounts": ["/a:/b"]}, "there is no container"),
        ({"container": "a.sif", "container_mounts": ["/a"]}, "'/a' is not SOURCE:TARGET"),
        ({"container": "a.sif", "container_mounts": ["/a:/b,/c:/d"]}, "is not SOURCE:TARGET"),
    ],
)
def test_mounts_that_a_container_cannot_have(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ClusterError, match=told):
        asked(job(**settings))


def test_no_word_is_left_to_a_shell() -> None:
    """The printed command means the same to a shell; the submitted one never meets a shell."""
    odd = replace(job(), arguments=(ODD, f"name={ODD}"))
    assert asked(odd)[-2:] == [ODD, f"name={ODD}"]
    commands = Commands(sbatch=(0, "12;cluster\n", ""))
    assert Slurm({"PATH": "/bin"}, commands).submit(odd, ODD) == "12"
    assert commands.calls[0][-2:] == [str(SCRIPT), ODD]
    assert commands.environments[0]["MUSTER_COMMAND"] == "run"
    assert commands.environments[0]["PATH"].endswith(":/bin")


def test_options_of_the_command_go_along() -> None:
    commands = Commands(sbatch=(0, "12\n", ""))
    Slurm({}, commands).submit(replace(job(), command=("doctor", "--json")), "/r.yaml")
    assert commands.calls[0][-2:] == ["/r.yaml", "--json"]
    assert commands.environments[0]["MUSTER_COMMAND"] == "doctor"


def test_a_refusal_is_told_in_slurms_words() -> None:
    commands = Commands(sbatch=(1, "", "sbatch: error: a\nsbatch: error: invalid partition specified: nope\n"))
    with pytest.raises(ClusterError, match="sbatch refused: sbatch: error: invalid partition specified: nope"):
        Slurm({}, commands).submit(job(), "r.yaml")


def test_slurm_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ClusterError, match=r"no sbatch on this machine.*muster render RECIPE --on slurm"):
        call(["sbatch"], {})


def shown(state: str, code: str = "0:0", **more: str) -> tuple[int, str, str]:
    values = {"JobId": "7", "JobState": state, "Reason": "None", "ExitCode": code, "NodeList": "n[1-2]", **more}
    return 0, " ".join(f"{k}={v}" for k, v in values.items()) + "\n", ""


@pytest.mark.parametrize(
    ("state", "code", "expected"),
    [
        ("COMPLETED", "0:0", 0),
        ("FAILED", "1:0", 1),
        ("FAILED", "2:0", 2),
        ("FAILED", "3:0", 3),
        ("CANCELLED", "0:15", 3),
        ("TIMEOUT", "0:0", 3),
        ("NODE_FAIL", "0:0", 3),
        ("FAILED", "0:9", 3),
        ("OUT_OF_MEMORY", "0:0", 1),
        ("SPECIAL_EXIT", "0:0", 1),
        ("BOOT_FAIL", "0:0", 3),
    ],
)
def test_a_job_is_followed_through_its_requeue_to_its_exit_code(
    state: str, code: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.slurm.time.sleep", lambda s: None)
    output = tmp_path / "slurm 7.out"
    output.write_text("one\ntwo\nhalf")
    states = [shown(s, StdOut=str(output)) for s in ("RUNNING", "STOPPED", "PENDING", "RUNNING")]
    commands, said = Commands(scontrol=[*states, shown(state, code, StdOut=str(output))]), list[str]()
    assert Slurm({}, commands).follow("7", said.append) == expected
    assert said[:2] == ["one", "two"]
    assert said[-2] == "half", "what comes after the last line's end too"
    told = [line for line in said if line.startswith("Slurm")]
    assert [line.split(": ")[2].split(" ")[0] for line in told] == ["RUNNING", "STOPPED", "PENDING", "RUNNING", state]


def test_a_job_that_slurm_has_forgotten() -> None:
    gone = Commands(scontrol=(1, "", "slurm_load_jobs error: Invalid job id specified\n"))
    assert Slurm({}, gone).state("7") is None
    Slurm({}, gone).cancel("7", "/runs/r")
    assert [c[0] for c in gone.calls] == ["scontrol", "scontrol"]
    with pytest.raises(ClusterError, match="has forgotten job 7"):
        Slurm({}, gone).follow("7", print)
    down = Commands(scontrol=(1, "", "slurm_load_jobs error: Unable to contact slurm controller\n"))
    with pytest.raises(ClusterError, match="Unable to contact"):
        Slurm({}, down).state("7")


def test_a_controller_that_is_away_for_a_moment_is_asked_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("cluster.slurm.time.sleep", lambda s: None)
    away = (1, "", "slurm_load_jobs error: Unable to contact slurm controller\n")
    commands = Commands(scontrol=[away, away, shown("COMPLETED", StdOut=str(tmp_path / "none"))])
    assert Slurm({}, commands).follow("7", lambda line: None) == 0
    monkeypatch.setattr("cluster.slurm.PATIENCE_S", 0.0)
    with pytest.raises(ClusterError, match="Unable to contact"):
        Slurm({}, Commands(scontrol=away)).follow("7", print)


def test_a_job_that_goes_on_is_cancelled() -> None:
    commands = Commands(scontrol=shown("PENDING"), scancel=(0, "", ""))
    Slurm({}, commands).cancel("7", "/runs/r")
    assert commands.calls[-1] == ["scancel", "7"]


def test_a_job_that_is_ending_is_left_to_clean_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.slurm.time.sleep", lambda s: None)
    ending = Commands(scontrol=[shown("RUNNING"), shown("COMPLETING"), shown("FAILED", "3:0")])
    Slurm({}, ending).cancel("7", "/runs/r")
    assert not [c for c in ending.calls if c[0] == "scancel"]
    monkeypatch.setattr("cluster.slurm.CLEAN_UP_S", 0.0)
    going = Commands(scontrol=shown("RUNNING"), scancel=(0, "", ""))
    Slurm({}, going).cancel("7", "/runs/r")
    assert going.calls[-1] == ["scancel", "7"]


def test_values_with_spaces_are_whole() -> None:
    found = fields("JobId=7 JobName=x Comment=a b c WorkDir=/a b/c StdOut=/a b/o=1.out")
    assert (found["Comment"], found["WorkDir"], found["StdOut"]) == ("a b c", "/a b/c", "/a b/o=1.out")


def test_the_script_starts_ray_as_every_node_of_ours_is() -> None:
    found = dict(re.findall(r"\b(RAY_health_\w+)=(\d+)", SCRIPT.read_text()))
    assert found == NODE_SETTINGS


@pytest.mark.parametrize("name", ["train", "train_torchrun"])
def test_scripts_say_what_is_missing_and_ask_for_no_hardware(name: str) -> None:
    script = SCRIPT.with_name(f"{name}.sbatch")
    done = subprocess.run(
        ["bash", str(script)], capture_output=True, text=True, timeout=20, env={"PATH": "/usr/bin:/bin"}
    )
    assert done.returncode == 2
    assert "name a recipe: sbatch" in done.stderr
    outside = subprocess.run(
        ["bash", str(script), "r"], capture_output=True, text=True, timeout=20, env={"PATH": "/usr/bin:/bin"}
    )
    assert outside.returncode == 2
    assert "inside a Slurm job" in outside.stderr
    lines = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"#SBATCH --no-kill", "#SBATCH --requeue"} < set(lines)
    assert not re.search(r"--(gpus|gres|mem|exclusive)", "\n".join(lines))
    assert "$0" not in script.read_text()


STANDING_IN = """#!/bin/bash
# Notes the words of each call, and runs the command in them, outside of any container.
echo "$(basename "$0")" "$@" >>"$NOTES"
[[ $1 == --help ]] && {{ echo "{help}"; exit; }}
while [[ $1 == -* || $1 == exec || $1 == *.sif ]]; do [[ $1 == --bind || $1 == --pwd ]] && shift; shift; done
exec "$@"
"""


@pytest.mark.parametrize("name", ["train", "train_torchrun"])
@pytest.mark.parametrize(
    ("image", "told"),
    [("image.sif", ""), ("image.sqsh", ""), ("absent.sif", "there is no image absent.sif"), ("r#n:1", "pyxis")],
)
def test_the_scripts_look_at_the_recipe_in_the_container(name: str, image: str, told: str, tmp_path: Path) -> None:
    """Until the recipe is read, which ends the script here with 7."""
    helps = "" if "pyxis" in told else "--container-image=IMAGE"
    programs = {tool: STANDING_IN.format(help=helps) for tool in ("apptainer", "srun")}
    ends = '#!/bin/bash\n[[ " $* " == *" render "* ]] && exit 7\necho 1 2 3\n'
    programs |= dict.fromkeys(("muster", "ray", "python", "torchrun"), ends)
    for tool, text in programs.items():
        (tmp_path / tool).write_text(text)
        (tmp_path / tool).chmod(0o755)
    for file in ("image.sif", "image.sqsh"):
        (tmp_path / file).touch()
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "NOTES": str(tmp_path / "notes"),
        "SLURM_JOB_ID": "1",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURMD_NODENAME": "node7",
        "SLURM_GPUS_ON_NODE": "2",
        "MUSTER_CONTAINER": image,
        "MUSTER_CONTAINER_MOUNTS": "/data:/data:ro",
    }
    done = subprocess.run(
        ["bash", str(SCRIPT.with_name(f"{name}.sbatch")), "r.yaml"],
        env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    if told:
        assert done.returncode == 2, done.stderr
        assert told in done.stderr
        return
    assert done.returncode == 7, done.stderr
    call = next(line for line in (tmp_path / "notes").read_text().splitlines() if " render " in line)
    mounts = f"{tmp_path}:{tmp_path}{',/tmp:/tmp' if name == 'train' else ''},/data:/data:ro"
    if image == "image.sif":
        assert call.startswith(f"apptainer exec --bind {mounts} --pwd {tmp_path} --nv {tmp_path}/image.sif ")
    else:
        assert call.startswith("srun --overlap --no-kill --nodes=1 --ntasks=1 --nodelist=node7 ")
        inside = f"--container-image={tmp_path}/image.sqsh --container-mounts={mounts} --container-workdir={tmp_path} "
        assert inside in call


def test_scripts_are_clean() -> None:
    if shutil.which("shellcheck") is None:
        assert not os.environ.get("CI"), "CI installs shellcheck"
        pytest.skip("no shellcheck: apt-get install shellcheck")
    scripts = sorted(map(str, SCRIPT.parent.glob("*.sbatch")))
    done = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def test_a_server_that_no_node_holds_is_refused() -> None:
    with pytest.raises(ClusterError, match=r"a vLLM server takes 16 GPUs \(rollout.vllm.tensor_parallel\), and a node"):
        asked(beside(job(), 1, 16))
