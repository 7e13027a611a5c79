"""Who may reach the Ray that a run starts on this machine, and the cluster that it joins."""

from __future__ import annotations

import ipaddress
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.support.jobs import muster_run
from tests.support.local_runs import LocalRun
from tests.support.training import losses, run_of, small_recipe, write_pairs
from tests.support.waiting import free_port, listening, wait_for
from trainer.checkpoint.publish import finished
from trainer.run.lease import read_lease

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
STEPS = 120
THEIRS = "b" * 64

CLIENT = """
import ray
ray.init(address={address!r}, log_to_driver=False)
print("joined", ray.get(ray.remote(lambda: 1).options(num_cpus=0).remote(), timeout=20))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_pairs(tmp_path / "data" / "a.jsonl", 90)
    return tmp_path


@pytest.fixture
def local(tiny_model: Path, folder: Path) -> Iterator[LocalRun]:
    """Begun by somebody whose home directory and environment hold another cluster's settings."""
    token = folder / "home" / ".ray" / "auth_token"
    token.parent.mkdir(parents=True)
    token.write_text(THEIRS)
    theirs = {"HOME": str(folder / "home"), "RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN_PATH": str(token)}
    recipe = small_recipe("local", tiny_model, folder, **{"training.steps": STEPS, "resources": {"workers": 2}})
    run = LocalRun(recipe, folder, theirs)
    yield run
    run.clean()


def listens(processes: list[psutil.Process]) -> dict[str, str]:
    """``{"address port": the process that listens there}``."""
    found = {}
    for process in processes:
        with suppress(psutil.Error):
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    found[f"{connection.laddr.ip} {connection.laddr.port}"] = process.name()
    return found


def command_of(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def is_loopback(address: str) -> bool:
    found = ipaddress.ip_address(address)
    mapped = getattr(found, "ipv4_mapped", None)
    return (mapped or found).is_loopback


def client(address: str, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {**os.environ, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", **environment}
    settings = {name: value for name, value in settings.items() if value}
    code = CLIENT.format(address=address)
    return subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, text=True, timeout=120)


@pytest.mark.night
def test_a_local_ray_is_reached_from_this_host_and_with_its_token_alone(local: LocalRun, folder: Path) -> None:
    local.reach(lambda: max(losses(local.recipe), default=0) >= 3, "the third step")
    local.command.process.send_signal(signal.SIGSTOP)  # the run stays as it is while it is looked at
    processes = local.processes()
    environment = next(p for p in processes if "gcs_server" in p.name()).environ()
    token = environment["RAY_AUTH_TOKEN"]
    found, commands = listens(processes), [command_of(process) for process in processes]
    assert len(found) > 8
    assert [place for place in found if not is_loopback(place.split()[0])] == []
    gcs = next(place.split()[1] for place, name in found.items() if name == "gcs_server")
    refused = client(f"127.0.0.1:{gcs}", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=THEIRS, RAY_AUTH_TOKEN_PATH="")
    assert refused.returncode != 0
    assert "joined" not in refused.stdout
    assert "AuthenticationError" in refused.stderr or "token" in refused.stderr.lower()
    assert not [command for command in commands if token in command]
    places = [folder, local.folder]
    kept = [
        path for place in places for path in place.rglob("*") if path.is_file() and token.encode() in path.read_bytes()
    ]
    assert kept == []
    local.command.process.send_signal(18)  # SIGCONT
    assert local.command.wait() == 0, local.command.output()[-3000:]
    assert finished(run_of(local.recipe)) is not None
    assert token not in local.command.output()


@pytest.fixture
def endless(tiny_model: Path, folder: Path) -> Iterator[LocalRun]:
    recipe = small_recipe("endless", tiny_model, folder, **{"training.steps": 10**6, "resources": {"workers": 2}})
    run = LocalRun(recipe, folder)
    yield run
    run.clean()


@pytest.mark.night
def test_a_ray_that_dies_is_one_sentence_and_the_run_can_go_on(endless: LocalRun) -> None:
    """Ray ends every process that uses it."""
    endless.reach(lambda: max(losses(endless.recipe), default=0) >= 3, "the third step")
    next(process for process in endless.processes() if process.name() == "raylet").kill()
    assert endless.command.wait() == 3, endless.command.output()[-3000:]
    assert endless.command.output().splitlines()[-1].startswith("muster: interrupted: this machine's Ray has gone")
    assert "core_worker" not in endless.command.output()
    assert "Traceback" not in endless.command.output()
    wait_for(lambda: not endless.processes(), "no process of the run", timeout_s=60)
    lease = read_lease(run_of(endless.recipe))
    assert lease is not None
    assert not lease.may_be_alive()


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a Ray head that asks for a token, which this environment has."""
    port = free_port()
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "c" * 64)
    ray = str(Path(sys.executable).with_name("ray"))
    command = [ray, "start", "--head", f"--port={port}", "--num-cpus=2", "--include-dashboard=false", "--block"]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as head:
        try:
            wait_for(lambda: listening(port), "the Ray head", timeout_s=60)
            monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
            yield f"127.0.0.1:{port}"
        finally:
            for process in [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]:
                process.kill()


@pytest.mark.night
def test_a_cluster_with_a_token_is_joined_with_it(guarded: str, tiny_model: Path, folder: Path) -> None:
    recipe = small_recipe("guarded", tiny_model, folder, **{"training.steps": 3})
    command = muster_run(recipe, folder)
    assert command.wait() == 0, command.output()[-3000:]
    assert max(losses(recipe)) == 3
