"""Slurm: a run is a job of ``slurm/train.sbatch``, which starts Ray on the job's nodes and requeues itself.

Only argument lists are made here: sbatch's options override the script's ``#SBATCH`` lines.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.job import ClusterError, ClusterJob, Say
from cluster.job_shape import JobShape

SCRIPT = Path(__file__).resolve().parents[1] / "slurm" / "train.sbatch"
CALL_S = 60.0
POLL_S = 2.0
CLEAN_UP_S = 40.0
PATIENCE_S = 300.0
"""How long slurmctld may not answer before following is given up; the job itself goes on."""
RESUMABLE = ("BOOT_FAIL", "CANCELLED", "DEADLINE", "NODE_FAIL", "PREEMPTED", "REVOKED", "TIMEOUT")
ENDED = ("COMPLETED", "FAILED", "OUT_OF_MEMORY", "SPECIAL_EXIT", *RESUMABLE)
"""Slurm's states of a job that is over (squeue's manual); in all others it waits, runs or is being moved."""
SCRIPT_OPTIONS = ("partition", "account", "qos", "time", "constraint")

Call = Callable[[Sequence[str], Mapping[str, str]], "subprocess.CompletedProcess[str]"]


def call(arguments: Sequence[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """One of Slurm's commands, without a shell; ClusterError when it is missing or does not end in time."""
    if shutil.which(arguments[0]) is None:
        raise ClusterError(
            f"there is no {arguments[0]} on this machine: run this where Slurm's commands are, or take the command of "
            "`muster render RECIPE --on slurm` there"
        )
    try:
        return subprocess.run(
            arguments, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=CALL_S
        )
    except subprocess.TimeoutExpired as error:
        raise ClusterError(f"{arguments[0]} did not answer within {CALL_S:.0f} s; is slurmctld up?", False) from error


class Slurm:
    """The cluster whose commands are on ``PATH``. A job's id is Slurm's number."""

    def __init__(self, environment: Mapping[str, str] = os.environ, call: Call = call) -> None:
        # The environment goes along with the job: the program that submits is the one that will run.
        path = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
        self._environment, self._call = {**environment, "PATH": path}, call

    def render(self, job: ClusterJob) -> str:
        variables = [f"{name}={value}" for name, value in container(job.settings).items()]
        asked = [*options(job), str(SCRIPT), *job.arguments]
        return shlex.join(["env", *variables, *asked] if variables else asked) + "\n"

    def address(self, job: ClusterJob) -> str | None:
        return None

    def submit(self, job: ClusterJob, recipe_path: str) -> str:
        command, *flags = job.command
        environment = {**self._environment, **container(job.settings), "MUSTER_COMMAND": command}
        told = self._run([*options(job), "--parsable", str(SCRIPT), recipe_path, *flags], environment)
        return told.split(";")[0].strip()

    def follow(self, job_id: str, say: Say) -> int:
        output, told = None, ""
        while True:
            found = self._patiently(job_id)
            if found is None:
                raise ClusterError(f"Slurm has forgotten job {job_id}; `muster status` tells how the run stands", False)
            output = output or Output(found["StdOut"])
            ended = found["JobState"] in ENDED
            for line in output.new(whole=ended):
                say(line)
            state = _state_text(found)
            if state != told:
                say(f"Slurm: job {job_id}: {state}")
                told = state
            if ended:
                return _exit_code(found)
            time.sleep(POLL_S)

    def state(self, job_id: str) -> str | None:
        found = self._show(job_id)
        return found["JobState"] if found else None

    def cancel(self, job_id: str, run_uri: str) -> None:
        """Cancels the job. A running job was requested to end through its run before; it gets time to clean up."""
        deadline = time.monotonic() + CLEAN_UP_S
        while (state := self.state(job_id)) in ("RUNNING", "COMPLETING") and time.monotonic() < deadline:
            time.sleep(POLL_S)
        if state not in (None, *ENDED):
            self._run(["scancel", job_id], self._environment)

    def _patiently(self, job_id: str) -> dict[str, str] | None:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                return self._show(job_id)
            except ClusterError as error:
                if error.usage or time.monotonic() >= deadline:
                    raise
                time.sleep(POLL_S)

    def _show(self, job_id: str) -> dict[str, str] | None:
        done = self._call(["scontrol", "--oneliner", "show", "job", job_id], self._environment)
        if done.returncode == 0:
            return fields(done.stdout)
        if "Invalid job id" in done.stderr:
            return None
        raise ClusterError(f"scontrol: {_last(done.stderr)}", False)

    def _run(self, arguments: Sequence[str], environment: Mapping[str, str]) -> str:
        done = self._call(arguments, environment)
        if done.returncode != 0:
            raise ClusterError(f"{arguments[0]} refused: {_last(done.stderr)}")
        return done.stdout


class Output:
    """The new lines of the job's output file, as far as this machine sees it."""

    def __init__(self, path: str) -> None:
        self._path, self._told, self._rest = path, 0, ""

    def new(self, *, whole: bool = False) -> list[str]:
        """Lines that are whole, and with ``whole`` what comes after them."""
        try:
            with open(self._path, "rb") as file:
                file.seek(self._told)
                data = file.read()
        except OSError:
            return []
        self._told += len(data)
        *lines, self._rest = (self._rest + data.decode(errors="replace")).split("\n")
        return [*lines, self._rest] if whole and self._rest else lines


def options(job: ClusterJob) -> list[str]:
    """Returns ``sbatch`` and its options: nodes, GPUs and CPUs as the workers need them, then the recipe's settings for
    Slurm."""
    settings = job.settings
    shape = JobShape.of(job, "cluster.slurm")
    asked = ["sbatch", f"--job-name={job.name}", f"--nodes={shape.nodes}", f"--cpus-per-task={shape.cpus_per_node}"]
    if shape.gpus_per_node:
        asked.append(f"--gpus-per-node={shape.gpus_per_node}")
    asked += [f"--{name}={settings[name]}" for name in SCRIPT_OPTIONS if settings.get(name) is not None]
    if settings.get("memory_per_node") is not None:
        asked.append(f"--mem={settings['memory_per_node']}")
    for option in settings.get("options", ()):
        if not option.startswith("-"):
            raise ClusterError(f"cluster.slurm.options: {option!r} is no option of sbatch; write it as --name=value")
        asked.append(option)
    return asked


def container(settings: Mapping[str, Any]) -> dict[str, str]:
    """Returns the variables by which the script knows the container; those of the submission's environment stay where
    the recipe has none. Raises ClusterError."""
    image, mounts = settings["container"], settings["container_mounts"]
    if image is None:
        if mounts:
            raise ClusterError("cluster.slurm.container_mounts has folders for a container, and there is no container")
        return {}
    for mount in mounts:
        if not 2 <= len(mount.split(":")) <= 3 or "," in mount:
            raise ClusterError(
                f"cluster.slurm.container_mounts: {mount!r} is not SOURCE:TARGET or SOURCE:TARGET:OPTIONS"
            )
    return {"MUSTER_CONTAINER": image, "MUSTER_CONTAINER_MOUNTS": ",".join(mounts)}


def workers_per_node(job: ClusterJob) -> int:
    return JobShape.of(job, "cluster.slurm").workers_per_node


def fields(line: str) -> dict[str, str]:
    """Returns the ``Name=value`` pairs of ``scontrol --oneliner``; a value ends before the next word that looks like a
    name."""
    found: dict[str, str] = {}
    last = None
    for word in line.split():
        name, separator, value = word.partition("=")
        if separator and name[:1].isupper():
            found[name], last = value, name
        elif last:
            found[last] += f" {word}"
    return found


def _state_text(found: Mapping[str, str]) -> str:
    reason = found.get("Reason", "None")
    where = found.get("NodeList", "(null)")
    parts = [found["JobState"], f"on {where}" if where != "(null)" else "", f"({reason})" if reason != "None" else ""]
    return " ".join(filter(None, parts))


def _exit_code(found: Mapping[str, str]) -> int:
    """The script's own, which is muster's; a job that Slurm itself ended may be submitted again: 3."""
    code, _, signal = found.get("ExitCode", "1:0").partition(":")
    if found["JobState"] in RESUMABLE or signal not in ("", "0"):
        return 3
    return int(code) if found["JobState"] == "COMPLETED" else int(code) or 1


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"
