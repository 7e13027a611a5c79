"""A real Slurm on one machine: munge, a controller, and one slurmd on each of several hosts in namespaces.

Nothing of a system-wide Slurm or munge is used: configuration, key, socket, state and logs lie in a folder of the
cluster's own. The controller runs on the switch (host 0), so that its ports are free whatever else runs here; clients
run in the test's own process, with ``SlurmCluster.env``.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

from tests.support import requirements
from tests.support.hosts import SWITCH, Hosts, Process
from tests.support.waiting import tail, wait_for

LIMIT_S = 30
CPUS = 8
MEMORY_MB = 64_000


class SlurmCluster:
    """``nodes`` nodes, node1 and so on, all idle within the block.

    ``gpus`` are fake: devices that Slurm counts, schedules and names in CUDA_VISIBLE_DEVICES. ``settings`` are further
    lines of slurm.conf, or other values for those in ``_settings``.
    """

    def __init__(self, nodes: int, *, gpus: int = 0, settings: Mapping[str, object] | None = None) -> None:
        self.hosts = Hosts(nodes, name="node")
        self._gpus = gpus
        self._changed = dict(settings or {})

    def __enter__(self) -> SlurmCluster:
        requirements.require((requirements.IP, *requirements.SLURM))
        self.hosts.__enter__()
        try:
            self.folder = self.hosts.folder / "slurm"
            self.env = {"SLURM_CONF": str(self.folder / "slurm.conf")}
            self._write_files()
            self._start_controller()
            for k in self.hosts.numbers:
                self._start_node(k)
            self.until(self._all_idle, LIMIT_S, what=f"{self.hosts.count} idle nodes", every_s=0.05)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self.hosts.close()

    def run(self, *argv: str | Path, cwd: Path | None = None, timeout: float = 60) -> str:
        """A client command's standard output; fails with its errors when it does."""
        try:
            done = subprocess.run(
                list(map(str, argv)),
                env={**os.environ, **self.env},
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{argv} did not end within {timeout:g} s:\n{self.logs()}") from None
        assert done.returncode == 0, f"{argv} ended with {done.returncode}:\n{done.stderr}\n{done.stdout}"
        return done.stdout

    def submit(self, *argv: str | Path, cwd: Path | None = None) -> str:
        """``sbatch`` with these options, script and arguments; the job's id."""
        return self.run("sbatch", "--parsable", *argv, cwd=cwd).strip()

    def job(self, job: str) -> dict[str, str]:
        """The fields of ``scontrol show job``."""
        shown = self.run("scontrol", "--oneliner", "show", "job", job).strip()
        return dict(re.findall(r"(?:^| )([A-Z][\w/:]*)=(.*?)(?= [A-Z][\w/:]*=|$)", shown))

    def job_state(self, job: str) -> str:
        return self.job(job)["JobState"]

    def node_state(self, k: int) -> str:
        """idle, allocated, mixed, down, …; with a trailing * while the node does not answer."""
        return self.run("sinfo", "--noheader", "--Node", f"--nodes={self.hosts.name(k)}", "--format=%T").strip()

    def until(self, condition: Callable[[], object], timeout_s: float, *, what: str, every_s: float = 0.2) -> None:
        """Waits for ``condition``; when it does not come, the error ends with what the daemons wrote."""
        wait_for(condition, what, timeout_s, every_s, self.logs)

    def logs(self, size: int = 3000) -> str:
        """The ends of the daemons' logs; of what they printed, where one came to nothing before it had a log."""
        printed = sorted(self.folder.glob("*.out"))
        return "\n".join(tail(log if (log := out.with_suffix(".log")).exists() else out, size) for out in printed)

    def crash(self, k: int) -> None:
        """A power cut on node ``k``."""
        self.hosts.kill(k)

    def boot(self, k: int) -> None:
        """The node again, with its slurmd; it returns to service by itself once the controller has heard of it."""
        self.hosts.boot(k)
        self._start_node(k)

    def cut(self, k: int) -> None:
        self.hosts.cut(k)

    def heal(self, k: int) -> None:
        self.hosts.heal(k)

    def _start_controller(self) -> None:
        files = {name: self.folder / f"munge.{name}" for name in ("key", "socket", "pid", "seed")}
        files["key"].touch(mode=0o400)
        files["key"].write_bytes(secrets.token_bytes(128))
        places = [f"--{option}={files[name]}" for option, name in _MUNGE_OPTIONS.items()]
        munged = self._daemon(SWITCH, "munged", "--foreground", *places)
        self._await_daemon(munged, "munge", f"--socket={files['socket']}", "--no-input")
        slurmctld = self._daemon(SWITCH, "slurmctld", "-D", "-c")
        self._await_daemon(slurmctld, "scontrol", "ping")

    def _await_daemon(self, daemon: Process, *probe: str) -> None:
        def answers() -> bool:
            assert daemon.poll() is None, f"ended at its start with {daemon.returncode}:\n{self.logs()}"
            asked = subprocess.run(probe, env={**os.environ, **self.env}, capture_output=True, timeout=LIMIT_S)
            return asked.returncode == 0

        self.until(answers, LIMIT_S, what=f"an answer to {probe[0]}", every_s=0.02)

    def _start_node(self, k: int) -> None:
        self._daemon(k, "slurmd", "-D")

    def _daemon(self, k: int, *argv: str) -> Process:
        with (self.folder / f"{argv[0]}.{self.hosts.name(k)}.out").open("ab") as out:
            return self.hosts.popen(k, argv, env=self.env, cwd=self.folder, stdout=out)

    def _all_idle(self) -> bool:
        states = self.run("sinfo", "--noheader", "--Node", "--format=%T").split()
        return states == ["idle"] * self.hosts.count

    def _write_files(self) -> None:
        self.folder.mkdir()
        # munged insists that everyone can reach its socket.
        self.hosts.folder.chmod(0o755)
        (self.folder / "slurm.conf").write_text("\n".join([*self._settings(), *self._nodes(), ""]))
        gpus = [self.folder / f"nvidia{index}" for index in range(self._gpus)]
        for gpu in gpus:
            # A device, of any kind; the digit at its end becomes its index in CUDA_VISIBLE_DEVICES.
            os.mknod(gpu, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        lines = ["AutoDetect=off", *(f"Name=gpu File={gpu}" for gpu in gpus)]
        (self.folder / "gres.conf").write_text("".join(f"{line}\n" for line in lines))

    def _nodes(self) -> list[str]:
        each = f"CPUs={CPUS} RealMemory={MEMORY_MB} Gres=gpu:{self._gpus} State=UNKNOWN"
        nodes = [f"NodeName={self.hosts.name(k)} NodeAddr={self.hosts.address(k)} {each}" for k in self.hosts.numbers]
        return [*nodes, "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP"]

    def _settings(self) -> list[str]:
        """What differs from Slurm's defaults: no cgroups, no accounting, everything that waits made short."""
        settings = {
            "ClusterName": "muster",
            "SlurmctldHost": f"{self.hosts.name(SWITCH)}({self.hosts.address(SWITCH)})",
            "SlurmUser": "root",
            # Job credentials live for 5 s only: a requeued job does not start before the old ones have run out.
            "AuthInfo": f"socket={self.folder / 'munge.socket'},cred_expire=5",
            "StateSaveLocation": self.folder / "state",
            "SlurmdSpoolDir": self.folder / "spool.%n",
            "SlurmctldPidFile": self.folder / "slurmctld.pid",
            "SlurmdPidFile": self.folder / "slurmd.%n.pid",
            "SlurmctldLogFile": self.folder / f"slurmctld.{self.hosts.name(SWITCH)}.log",
            "SlurmdLogFile": self.folder / "slurmd.%n.log",
            "MailProg": "/bin/true",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "MpiDefault": "none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core_Memory",
            "DefMemPerCPU": 100,
            "GresTypes": "gpu",
            # Nodes have the CPUs and the memory that are written here, whatever the machine has.
            "SlurmdParameters": "config_overrides",
            "SchedulerParameters": "batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=0",
            "ReturnToService": 2,
            "SlurmdTimeout": 15,
            "MessageTimeout": 10,
            "KillWait": 5,
            "UnkillableStepTimeout": 30,
            "MinJobAge": 3600,
            "JobRequeue": 1,
            **self._changed,
        }
        return [f"{name}={value}" for name, value in settings.items()]


_MUNGE_OPTIONS = {"key-file": "key", "socket": "socket", "pid-file": "pid", "seed-file": "seed"}
