"""A server that is kept alive, and the command for people, with a package `vllm` that contains nothing of vLLM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.fake_vllm_program import make_package
from tests.support.waiting import wait_for
from trainer.errors import EngineFailed
from trainer.inference.host import API_KEY, ServerHost
from trainer.inference.host_client import find_host
from trainer.inference.patience import Bounds
from trainer.inference.server import Restarts, VLLMServer

Make = Callable[..., ServerHost]


def server(package: dict[str, str], model: Path, folder: Path, key: str, **others: Any) -> VLLMServer:
    given: dict[str, Any] = {"lora_rank": 8, "dtype": "float32", "max_model_len": 64, "log": folder / "vllm.log"}
    given |= {"device": "cpu", "variables": package, "api_key": key, "temporary": folder}
    return VLLMServer(sys.executable, model, **{**given, **others})


@pytest.fixture
def package(tmp_path: Path) -> dict[str, str]:
    return make_package(tmp_path)


@pytest.fixture
def make(tmp_path: Path, package: dict[str, str]) -> Iterator[Make]:
    made: list[ServerHost] = []

    def make(**others: Any) -> ServerHost:
        made.append(ServerHost(partial(server, package, tmp_path / "model", **others)))
        made[-1].start()
        return made[-1]

    yield make
    for host in made:
        host.close()


def notes(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "notes").read_text().splitlines()]


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_server_that_dies_is_started_again_and_keeps_its_address_and_adapters(make: Make, tmp_path: Path) -> None:
    host = make()
    assert host.wait_ready(60)
    client = find_host(host.address, Bounds(), host.api_key)
    assert client is not None
    assert client.server == host.server.address
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    client.send("a", adapter)
    os.kill(notes(tmp_path)[0]["server"], signal.SIGKILL)
    wait_for(lambda: not host.server.alive or len(notes(tmp_path)) > 1, "the server's end")
    client.watch()
    assert len(notes(tmp_path)) == 2
    assert host.state()["state"] == "ready"
    assert Path(client.folder("a"), "adapter_config.json").exists()


def test_adapters_in_use_are_kept_however_many_they_are(make: Make, tmp_path: Path) -> None:
    host = make(adapters=10)
    client = find_host(host.address, Bounds(), host.api_key)
    assert client is not None
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    for number in range(21):
        client.send(f"a{number}", adapter)
    assert [number for number in range(21) if Path(client.folder(f"a{number}")).exists()] == list(range(1, 21))


def test_a_start_again_that_fails_is_tried_once_more(make: Make, tmp_path: Path) -> None:
    host = make()
    host.wait_ready(60)
    (tmp_path / "notes.fails").touch()
    os.kill(notes(tmp_path)[0]["server"], signal.SIGKILL)
    wait_for(lambda: len(notes(tmp_path)) == 2 and host.state()["state"] == "ready", "the second start", timeout_s=60)
    assert not (tmp_path / "notes.fails").exists()
    host.check()


def test_a_server_is_given_up_with_its_log(make: Make, tmp_path: Path) -> None:
    host = make(restarts=Restarts(most=0))
    host.wait_ready(60)
    client = find_host(host.address, Bounds(), host.api_key)
    assert client is not None
    os.kill(notes(tmp_path)[0]["server"], signal.SIGKILL)
    wait_for(lambda: host.state()["state"] == "failed", "the end of hope")
    with pytest.raises(EngineFailed, match=r"given its server up: the vLLM server was started again 0 times") as found:
        client.watch()
    assert "starting with" in str(found.value)
    assert host.api_key not in str(found.value)


def test_a_closed_host_leaves_nothing(make: Make, tmp_path: Path) -> None:
    host = make()
    host.wait_ready(60)
    folder = host.server.log.parent
    host.close()
    assert not folder.exists()
    assert is_gone(notes(tmp_path)[0]["server"])


def test_the_folder_of_a_host_that_was_killed_is_removed_by_the_next(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    killed, another = tmp_path / "muster-vllm-killed", tmp_path / "muster-vllm-of-another-program"
    killed.mkdir()
    another.mkdir()
    (killed / "lock").touch()
    first = make()
    assert not killed.exists()
    assert another.exists()
    make()
    assert first.server.log.parent.exists()


def command(tmp_path: Path, package: dict[str, str], **environment: str) -> subprocess.Popen[str]:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={package["PYTHONPATH"]} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    words = ["--python", str(python), "--model", str(tmp_path / "model"), "--lora-rank", "16", "--max-model-len", "64"]
    more = ["--host", "127.0.0.1", "--device", "cpu", "--", "--max-num-seqs", "8"]
    given = {**os.environ, "FAKE_NOTES": package["FAKE_NOTES"], "TMPDIR": str(tmp_path), **environment}
    return subprocess.Popen(
        [sys.executable, "-m", "trainer.inference.host", *words, *more],
        env=given,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_command_serves_until_it_is_ended(tmp_path: Path, package: dict[str, str], number: int) -> None:
    with command(tmp_path, package) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(5)]
        address = lines[2].partition("addresses: [")[2].rstrip("]}\n")
        key = lines[4].strip().removeprefix(f"export {API_KEY}=")
        assert find_host(address, Bounds(), key) is not None
        (note,) = notes(tmp_path)
        assert note["arguments"][-2:] == ["--max-num-seqs", "8"]
        process.send_signal(number)
        assert process.wait(60) == (0 if number == signal.SIGTERM else -number)
    wait_for(lambda: is_gone(note["server"]) and is_gone(note["engine"]), "the server's end")
    wait_for(lambda: not list(tmp_path.glob("muster-vllm-*")), "the removal of its folder")


def test_a_key_that_is_given_is_not_printed(tmp_path: Path, package: dict[str, str]) -> None:
    with command(tmp_path, package, **{API_KEY: "a-secret-of-this-test"}) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(3)]
        address = lines[2].partition("addresses: [")[2].rstrip("]}\n")
        assert find_host(address, Bounds(), "a-secret-of-this-test") is not None
        process.terminate()
        assert "secret" not in "".join(lines) + process.stdout.read()


def test_the_command_names_what_is_wrong(tmp_path: Path, package: dict[str, str]) -> None:
    with command(tmp_path, package, FAKE_FAILS="2") as process:
        assert process.stdout is not None
        said = process.stdout.read()
        assert process.wait(60) == 2
    assert "fake: cannot start: 2" in said
    model = ["--model", str(tmp_path / "none"), "--python", "p", "--lora-rank", "8", "--max-model-len", "64"]
    wrong = subprocess.run([sys.executable, "-m", "trainer.inference.host", *model], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "is no folder with a config.json" in wrong.stderr
