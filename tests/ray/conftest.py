from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.waiting import free_port

RAY = Path(sys.executable).with_name("ray")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """The address of a Ray head with four logical CPUs, started for the session and stopped by its own processes."""
    import psutil

    port = free_port()
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    command = [str(RAY), "start", "--head", f"--port={port}", "--num-cpus=4", "--include-dashboard=false", "--block"]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as head:
        try:
            _await_head(port, head)
            yield f"127.0.0.1:{port}"
        finally:
            for process in [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]:
                process.kill()


def _await_head(port: int, head: subprocess.Popen[bytes]) -> None:
    from tests.support.waiting import listening, wait_for

    def started() -> bool:
        assert head.poll() is None, f"ray start ended with {head.returncode}"
        return listening(port)

    wait_for(started, "the Ray head", timeout_s=60)


@pytest.fixture
def joined(ray_cluster: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Commands that a test starts join the session's cluster."""
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    return ray_cluster
