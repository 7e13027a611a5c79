"""The clusters that other tests trust do what they say: what is cut is cut, what is killed is dead, nothing stays."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.support import requirements
from tests.support.hosts import Hosts
from tests.support.ray_hosts import RayOnHosts
from tests.support.slurm import SlurmCluster
from tests.support.waiting import wait_for

ROOT = Path(__file__).resolve().parents[2]
PORT = 8000
SERVE = (sys.executable, "-m", "http.server", str(PORT))


def reachable(hosts: Hosts, k: int, limit_s: float = 1) -> bool:
    with suppress(OSError), socket.create_connection((hosts.address(k), PORT), limit_s):
        return True
    return False


def reachable_from(hosts: Hosts, source: int, k: int) -> bool:
    connect = f"import socket; socket.create_connection(('{hosts.name(k)}', {PORT}), 1)"
    return hosts.run(source, [sys.executable, "-c", connect]).returncode == 0


def serve(hosts: Hosts, k: int) -> None:
    hosts.popen(k, SERVE)
    wait_for(lambda: reachable(hosts, k), f"a server on host {k}")


def inhabitants(inits: Iterable[int]) -> list[psutil.Process]:
    """All processes of the hosts that these are the processes 1 of. (Numbers of namespaces are soon used again.)"""
    spaces = {os.readlink(f"/proc/{pid}/ns/pid") for pid in inits}
    found = []
    for process in psutil.process_iter():
        with suppress(OSError):
            if os.readlink(f"/proc/{process.pid}/ns/pid") in spaces:
                found.append(process)
    return found


def running(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    return [process for process in processes if process.is_running()]


def test_each_host_has_what_is_its_own(hosts: Hosts) -> None:
    about = (
        "hostname; cat /proc/sys/kernel/random/boot_id; touch /dev/shm/mine /tmp/ray/mine; ls /dev/shm /tmp/ray; ps ax"
    )
    first, second = (hosts.run(k, ["bash", "-c", about]).stdout.splitlines() for k in (1, 2))
    assert [first[0], second[0]] == [hosts.name(1), hosts.name(2)]
    assert first[1] != second[1], "one boot id"
    # Only what bash and its children are: no process of another host, none of this machine.
    assert max(len(first), len(second)) < 15
    assert not Path("/dev/shm/mine").exists()
    assert not Path("/tmp/ray/mine").exists()
    assert hosts.run(1, ["getent", "hosts", hosts.name(3)]).stdout.split()[0] == hosts.address(3)
    assert hosts.run(1, ["getent", "hosts", "no-such-host.example"], timeout=2).returncode != 0


def test_a_cut_host_is_unreachable_until_it_is_healed(hosts: Hosts) -> None:
    serve(hosts, 1)
    assert reachable_from(hosts, 2, 1)
    hosts.cut(1)
    assert not reachable(hosts, 1)
    assert not reachable_from(hosts, 2, 1)
    assert hosts.run(1, ["cat", "/sys/class/net/lo/ifindex"]).returncode == 0, "a cut host runs on"
    hosts.heal(1)
    wait_for(lambda: reachable(hosts, 1), "the healed host", 10)
    assert reachable_from(hosts, 2, 1)


def test_a_killed_host_runs_nothing_and_tells_nobody(hosts: Hosts) -> None:
    serve(hosts, 1)
    before = inhabitants([hosts.init(1)])
    assert len(before) == 2, "the host's process 1 and the server"
    with socket.create_connection((hosts.address(1), PORT)) as connection:
        hosts.kill(1)
        assert not running(before)
        connection.settimeout(0.5)
        with pytest.raises(TimeoutError):
            connection.recv(1)
    assert not reachable(hosts, 1)


def test_a_killed_host_boots_anew(hosts: Hosts) -> None:
    boot_id = ["cat", "/proc/sys/kernel/random/boot_id"]
    before = hosts.run(1, boot_id).stdout
    hosts.run(1, ["bash", "-c", "touch /tmp/ray/disk /dev/shm/memory"])
    hosts.kill(1)
    hosts.boot(1)
    assert hosts.run(1, boot_id).stdout != before
    assert float(hosts.run(1, ["cat", "/proc/uptime"]).stdout.split()[0]) < 10
    assert hosts.run(1, ["bash", "-c", "ls /tmp/ray /dev/shm"]).stdout.split() == ["/dev/shm:", "/tmp/ray:", "disk"]
    serve(hosts, 1)
    assert reachable_from(hosts, 2, 1)


def test_a_signal_reaches_the_command_and_a_late_one_is_killed(hosts: Hosts) -> None:
    sleeping = hosts.popen(
        1, ["bash", "-c", "trap 'exit 7' TERM; echo ready; sleep 1000 & wait"], stdout=subprocess.PIPE
    )
    assert sleeping.stdout
    with sleeping.stdout as said:
        assert said.readline() == "ready\n"
        sleeping.terminate()
        assert sleeping.wait(10) == 7
    with pytest.raises(AssertionError, match=r"did not end within 0.5 s:\nhello"):
        hosts.run(2, ["bash", "-c", "echo hello; exec sleep 1000"], timeout=0.5)
    assert "1000" not in hosts.run(2, ["ps", "ax"]).stdout


def test_two_sets_of_hosts_do_not_meet(hosts: Hosts) -> None:
    serve(hosts, 1)
    with Hosts(1) as others:
        assert not reachable_from(others, 1, 1)
        connect = f"import socket; socket.create_connection(('{hosts.address(1)}', {PORT}), 1)"
        assert others.run(1, [sys.executable, "-c", connect]).returncode != 0
    assert reachable(hosts, 1)


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left(fails: bool) -> None:
    with suppress(ZeroDivisionError), SlurmCluster(2) as slurm:
        hosts = slurm.hosts
        before = inhabitants(map(hosts.init, (0, *hosts.numbers)))
        assert {"munged", "slurmctld", "slurmd"} < {process.name() for process in before}
        if fails:
            raise ZeroDivisionError
    assert not running(before)
    assert not Path("/sys/class/net", hosts.link).exists()
    assert not hosts.folder.exists()


def test_nothing_runs_on_when_the_tests_are_killed() -> None:
    requirements.require()
    script = (
        "import json, time\n"
        "from tests.support.hosts import Hosts\n"
        "with Hosts(2) as hosts:\n"
        "    hosts.run(1, ['bash', '-c', 'setsid sleep 1000 >/dev/null 2>&1 &'])\n"
        "    print(json.dumps([hosts.link, str(hosts.folder), *map(hosts.init, (0, 1, 2))]), flush=True)\n"
        "    time.sleep(1000)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert owner.stdout
        with owner.stdout as out:
            link, folder, *inits = json.loads(out.readline())
        before = inhabitants(inits)
        assert len(before) == 4, "three times process 1, and the command"
    finally:
        owner.kill()
        owner.wait(10)
    wait_for(lambda: not running(before), "the end of the hosts", 10)
    wait_for(lambda: not Path("/sys/class/net", link).exists(), "the end of the link", 10)
    subprocess.run(["rm", "-r", folder], check=True)


def test_slurm_runs_a_job_on_two_nodes(slurm: SlurmCluster, tmp_path: Path) -> None:
    script = tmp_path / "job.sbatch"
    script.write_text(
        "#!/bin/bash\nsrun hostname\nsrun --nodes=1 --ntasks=1 bash -c 'echo gpus=$CUDA_VISIBLE_DEVICES'\n"
    )
    # srun's own words go apart: on a busy machine the second step waits for the end of the first, and says so.
    job = slurm.submit("--nodes=2", "--gpus-per-node=2", "--error=errors", script, cwd=tmp_path)
    slurm.until(lambda: slurm.job_state(job) == "COMPLETED", 30, what="the job's end")
    said = Path(slurm.job(job)["StdOut"]).read_text().split()
    assert sorted(said[:2]) == ["node1", "node2"]
    assert said[2:] == ["gpus=0,1"]


@pytest.mark.night
def test_slurm_notices_a_crashed_node_and_requeues_its_job(tmp_path: Path) -> None:
    with SlurmCluster(2, settings={"SlurmdTimeout": 3, "MessageTimeout": 3}) as slurm:
        output = tmp_path / "output"
        endless = "srun --unbuffered bash -c 'hostname; sleep 1000'"
        job = slurm.submit("--nodes=2", "--requeue", f"--output={output}", f"--wrap={endless}", cwd=tmp_path)
        slurm.until(lambda: output.exists() and "node2" in output.read_text(), 30, what="the task on node2")
        slurm.crash(2)
        slurm.until(lambda: slurm.node_state(2).startswith("down"), 40, what="node2 down")
        slurm.until(lambda: slurm.job(job)["Restarts"] == "1", 10, what="the job in the queue again")
        slurm.boot(2)
        slurm.until(lambda: not slurm.node_state(2).startswith("down"), 30, what="node2 back in service")


def test_what_does_not_come_is_told_with_the_logs(slurm: SlurmCluster) -> None:
    with pytest.raises(AssertionError, match=r"(?s)a wonder: not within 0 s\n.*slurmctld version.*slurmd version"):
        slurm.until(lambda: False, 0, what="a wonder")


@pytest.mark.night
@pytest.mark.ray
def test_ray_notices_a_killed_host() -> None:
    with Hosts(2) as hosts:
        ray = RayOnHosts(hosts, cpus=1)
        ray.start_all()
        assert ray.alive() == {1, 2}
        hosts.kill(2)
        ray.await_alive(1, timeout_s=30)
