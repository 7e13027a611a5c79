"""Several hosts on one machine: namespaces joined by a bridge, whose power and network cables tests can pull.

A host has its own network, processes, host name, uptime, shared memory and boot id; it shares the file system, but for
the folders that are named ``private``. Host 0 is the switch: it holds the bridge, and controllers may run on it.

Nothing outlives the process that made it, however that one ends: a host's init ends when its standard input closes,
the kernel then ends what runs there, and network interfaces go with the namespace that they are in.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from ipaddress import IPv4Network
from pathlib import Path
from types import TracebackType
from typing import IO

import psutil

from tests.support.requirements import NAMESPACES, require
from tests.support.waiting import tail, wait_for

SWITCH = 0
LIMIT_S = 20

# Process 1 of a host: sets up what is its own, then reaps orphans, as bash does, until its standard input ends.
# Names are looked up in files only: without an answer from a DNS, c10d loses 10 s on a reverse look-up.
_INIT = r"""
set -e
common=$1 own=$2 name=$3
shift 3
mount --make-rprivate /
for file in hosts nsswitch.conf resolv.conf; do mount --bind "$common/$file" "/etc/$file"; done
mount --bind "$own/boot_id" /proc/sys/kernel/random/boot_id
mount -t tmpfs -o mode=1777,size=2g shm /dev/shm
for folder in "$@"; do
  mkdir -p "$folder" "$own/private/$folder"
  mount --bind "$own/private/$folder" "$folder"
done
hostname "$name"
ip link set lo up
echo ready
read -r _
"""


class Process(subprocess.Popen[str]):
    """A command on a host. What is signalled is the command itself, not the nsenter that waits for it outside."""

    def send_signal(self, sig: int) -> None:
        with suppress(psutil.NoSuchProcess):
            inside = psutil.Process(self.pid).children()
            for process in inside:
                process.send_signal(sig)
            if not inside:
                super().send_signal(sig)


@dataclass
class _Running:
    """A host that is up: the unshare that made it, and process 1 in it (psutil knows it by pid and start time)."""

    outer: subprocess.Popen[bytes]
    init: psutil.Process


class Hosts:
    """Hosts 1 to ``count``, up within the block.

    ``network`` is the first three parts of their addresses; without it, one that is not in use here. ``private``
    folders are different ones on each host; they survive its reboot, as a disk does.
    """

    def __init__(
        self, count: int, network: str = "", name: str = "host", private: Sequence[str] = ("/tmp/ray",)
    ) -> None:
        self.count = count
        self._name = name
        self._private = private
        self._network = network
        self.link = f"mu{secrets.token_hex(4)}"
        self._running: dict[int, _Running] = {}
        self._processes: list[Process] = []

    def __enter__(self) -> Hosts:
        require()
        self._network = self._network or _unused_network()
        self.folder = Path(tempfile.mkdtemp(prefix="mu-", dir="/tmp"))
        try:
            self._write_files()
            for k in (SWITCH, *self.numbers):
                self._start(k)
            self._connect_switch()
            for k in self.numbers:
                self._connect(k)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Removes all that was made, the switch after the hosts; a step that fails does not keep the others from it."""
        with ExitStack() as steps:
            steps.callback(shutil.rmtree, self.folder, ignore_errors=True)
            steps.callback(_ip, None, f"link del {self.link}", check=False)
            for process in self._processes:
                steps.callback(process.wait, LIMIT_S)
            for k in sorted(self._running):
                steps.callback(self.kill, k)

    @property
    def numbers(self) -> range:
        return range(1, self.count + 1)

    def name(self, k: int) -> str:
        return f"{self._name}{k}"

    def address(self, k: int) -> str:
        return f"{self._network}.{k or 254}"

    @property
    def gateway(self) -> str:
        """Where the hosts reach this machine itself: bind an S3 server for them to it."""
        return f"{self._network}.253"

    def init(self, k: int) -> int:
        """Pid of the host's process 1, seen from here."""
        return int(self._running[k].init.pid)

    def run(
        self,
        k: int,
        argv: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout: float = 60,
    ) -> subprocess.CompletedProcess[str]:
        """As ``subprocess.run`` with captured output; a command that does not end in time is killed, and that fails."""
        with self.popen(k, argv, env=env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            try:
                out, err = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired as late:
                process.kill()
                said = b"".join(part for part in (late.stdout, late.stderr) if isinstance(part, bytes))
                what = f"{self.name(k)}: {argv} did not end within {timeout:g} s"
                raise AssertionError(f"{what}:\n{said.decode(errors='replace')[-2000:]}") from None
        return subprocess.CompletedProcess(argv, process.returncode, out, err)

    def popen(
        self,
        k: int,
        argv: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        stdout: int | IO[str] | IO[bytes] = subprocess.DEVNULL,
        stderr: int | IO[str] | IO[bytes] = subprocess.STDOUT,
    ) -> Process:
        """A command on host ``k``, in this process's environment and ``env``; it ends with the host at the latest."""
        enter = ["nsenter", f"--target={self.init(k)}", "--net", "--pid", "--mount", "--uts", "--ipc", "--time", "--"]
        process = Process(
            # The folder is entered from inside: private folders are seen there only.
            [*enter, "env", f"--chdir={cwd or Path.cwd()}", *map(str, argv)],
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )
        self._processes.append(process)
        return process

    def kill(self, k: int) -> None:
        """A power cut: nothing on the host runs any more, and nobody is told (no connection is closed)."""
        if k not in self._running:
            return
        host = self._running.pop(k)
        if k != SWITCH:
            with suppress(AssertionError):
                self.cut(k)
        with suppress(psutil.NoSuchProcess):
            host.init.kill()
        # Process 1 ends when everything in its namespace has ended, and unshare ends after it.
        host.outer.wait(LIMIT_S)
        assert host.outer.stdin
        host.outer.stdin.close()
        if k != SWITCH:
            _ip(self.init(SWITCH), f"link del port{k}", check=False)

    def boot(self, k: int) -> None:
        """Turns a killed host on again: a new boot id, an uptime of zero, no processes."""
        assert k not in self._running, f"{self.name(k)} is running"
        self._start(k)
        self._connect(k)

    def cut(self, k: int) -> None:
        """A network partition: the host runs on and reaches nobody. It does not see that its cable is pulled."""
        _ip(self.init(SWITCH), f"link set port{k} nomaster")

    def heal(self, k: int) -> None:
        _ip(self.init(SWITCH), f"link set port{k} master bridge")

    def _write_files(self) -> None:
        names = "".join(f"{self.address(k)} {self.name(k)}\n" for k in (SWITCH, *self.numbers))
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        (self.folder / "nsswitch.conf").write_text("passwd: files\ngroup: files\nshadow: files\nhosts: files\n")
        # Refused at once, for what asks a name server all the same.
        (self.folder / "resolv.conf").write_text("nameserver 127.0.0.1\n")

    def _start(self, k: int) -> None:
        own = self.folder / self.name(k)
        own.mkdir(exist_ok=True)
        (own / "boot_id").write_text(f"{uuid.uuid4()}\n")
        just_booted = f"--boottime=-{int(time.clock_gettime(time.CLOCK_BOOTTIME))}"
        init: list[str | Path] = ["bash", "-c", _INIT, "init", self.folder, own, self.name(k), *self._private]
        log = own / "init.log"
        with log.open("wb") as out:
            outer = subprocess.Popen(
                ["unshare", *NAMESPACES, just_booted, *init],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

        def ready() -> bool:
            assert outer.poll() is None, f"{self.name(k)} did not start: {log.read_text()}"
            return "ready" in log.read_text()

        try:
            wait_for(ready, self.name(k), LIMIT_S, every_s=0.005, logs=lambda: tail(log))
            self._running[k] = _Running(outer, psutil.Process(outer.pid).children()[0])
        except BaseException:
            outer.kill()
            outer.wait(LIMIT_S)
            raise

    def _connect_switch(self) -> None:
        """The bridge, and a cable from it to this machine. Hardware addresses are fixed: neighbours remember them."""
        switch = self.init(SWITCH)
        _ip(switch, f"link add bridge address {_hardware(254)} type bridge")
        _ip(switch, f"addr add {self.address(SWITCH)}/24 dev bridge")
        _ip(None, f"link add {self.link} type veth peer name outside netns {switch}")
        _ip(None, f"addr add {self.gateway}/24 dev {self.link}", f"link set {self.link} up")
        _ip(switch, "link set outside master bridge up", "link set bridge up", f"route add default via {self.gateway}")

    def _connect(self, k: int) -> None:
        switch, host = self.init(SWITCH), self.init(k)
        _ip(switch, f"link add port{k} type veth peer name eth0 address {_hardware(k)} netns {host}")
        _ip(switch, f"link set port{k} master bridge up")
        _ip(
            host,
            f"addr add {self.address(k)}/24 dev eth0",
            "link set eth0 up",
            # Nothing is forwarded there; but programs find their own address by the route to a far one.
            f"route add default via {self.gateway}",
        )


def _ip(pid: int | None, *commands: str, check: bool = True) -> None:
    """``ip`` commands in the network namespace of ``pid``, or in this process's own."""
    enter = ["nsenter", f"--target={pid}", "--net", "--"] if pid else []
    text = "\n".join(commands)
    done = subprocess.run([*enter, "ip", "-batch", "-"], input=text, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0 or not check, f"ip {text}: {done.stderr}"


def _hardware(k: int) -> str:
    return f"02:00:00:00:00:{k:02x}"


def _unused_network() -> str:
    """The first three parts of a network from 10.128.0.0/9 that no route of this machine touches."""
    routes = subprocess.run(["ip", "-4", "route"], capture_output=True, text=True, check=True, timeout=LIMIT_S).stdout
    used = [IPv4Network(line.split()[0], strict=False) for line in routes.splitlines() if line[0].isdigit()]
    while True:
        network = f"10.{128 + secrets.randbelow(128)}.{secrets.randbelow(256)}"
        if not any(IPv4Network(f"{network}.0/24").overlaps(other) for other in used):
            return network
