"""A Ray cluster with one node on each of several hosts in namespaces."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from cluster.ray_nodes import NODE_SETTINGS
from tests.support.hosts import Hosts, Process
from tests.support.waiting import tail, wait_for

RAY = Path(sys.executable).with_name("ray")
LIMIT_S = 90
OBJECT_STORE_BYTES = 100_000_000

# Every node, driver and command line has to agree on these.
ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", **NODE_SETTINGS}


_HEAD = ["--head", "--port=6379", "--include-dashboard=true", "--dashboard-host=0.0.0.0"]

_ALIVE = """
import sys
from ray._raylet import GcsClient
nodes = GcsClient(sys.argv[1]).get_all_node_info(timeout=10).values()
print(*(node.node_manager_address for node in nodes if node.state == 0))
"""


class RayOnHosts:
    """``ray start --block`` on hosts; the head is on host 1, with its dashboard."""

    def __init__(self, hosts: Hosts, *, cpus: int = 4, env: Mapping[str, str] | None = None) -> None:
        self.hosts = hosts
        self.address = f"{hosts.address(1)}:6379"
        self.dashboard = f"http://{hosts.address(1)}:8265"
        self._cpus = cpus
        self._env = {"PATH": f"{RAY.parent}:{os.environ['PATH']}", **ENVIRONMENT, **(env or {})}
        self._nodes: dict[int, Process] = {}

    @property
    def env(self) -> dict[str, str]:
        """For drivers on the hosts. `ray job submit`, from anywhere, needs RAY_ADDRESS=``dashboard`` instead."""
        return {**self._env, "RAY_ADDRESS": self.address}

    def start_all(self) -> None:
        """The head, then all other hosts side by side; returns when every node is there."""
        self.start(1)
        self.await_started(1)
        others = self.hosts.numbers[1:]
        for k in others:
            self.start(k)
        self.await_started(*others)

    def start(self, k: int) -> None:
        """Starts the node on host ``k``, again after a reboot too; see ``await_started``."""
        role = _HEAD if k == 1 else [f"--address={self.address}"]
        common = [f"--num-cpus={self._cpus}", f"--object-store-memory={OBJECT_STORE_BYTES}", "--disable-usage-stats"]
        node = [f"--node-ip-address={self.hosts.address(k)}", *common, "--block"]
        with self._log(k).open("wb") as log:
            self._nodes[k] = self.hosts.popen(k, [RAY, "start", *role, *node], env=self._env, stdout=log)

    def await_started(self, *hosts: int) -> None:
        """Until ``ray start`` says so on these hosts, which it does once the head has registered the node."""

        def started(k: int) -> bool:
            node = self._nodes[k]
            assert node.poll() is None, f"ray start on host {k} ended with {node.returncode}:\n{self.logs()}"
            return "Ray runtime started" in self._log(k).read_text(errors="replace")

        wait_for(lambda: all(map(started, hosts)), f"Ray on hosts {hosts}", LIMIT_S, every_s=0.1, logs=self.logs)

    def alive(self) -> set[int]:
        """The hosts whose nodes the head counts as alive.

        Asked by a process of its own (about a second): a client in this one would end it when the head dies.
        """
        asked = self.hosts.run(1, [sys.executable, "-c", _ALIVE, self.address], env=self._env)
        assert asked.returncode == 0, f"{asked.stderr}\n{self.logs()}"
        addresses = asked.stdout.split()
        return {k for k in self.hosts.numbers if self.hosts.address(k) in addresses}

    def await_alive(self, *hosts: int, timeout_s: float = LIMIT_S) -> None:
        """Until exactly these hosts' nodes are alive."""
        wait_for(lambda: self.alive() == set(hosts), f"Ray on hosts {hosts} only", timeout_s, logs=self.logs)

    def logs(self) -> str:
        return "\n".join(tail(self._log(k)) for k in self._nodes)

    def _log(self, k: int) -> Path:
        return self.hosts.folder / f"ray.{self.hosts.name(k)}.log"
