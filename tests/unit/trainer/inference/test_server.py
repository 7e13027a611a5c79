"""Start, watch and end of a server, with a package `vllm` that contains nothing of vLLM."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.fake_vllm_program import make_package
from tests.support.waiting import listening, wait_for
from trainer.errors import EngineFailed, InputError
from trainer.inference import guard
from trainer.inference.lora_ranks import lora_room
from trainer.inference.server import Restarts, VLLMServer

Make = Callable[..., VLLMServer]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Makes a server. All are closed in the end."""
    made: list[VLLMServer] = []
    package = make_package(tmp_path)

    def make(variables: dict[str, str] | None = None, **others: Any) -> VLLMServer:
        given = {"lora_rank": 12, "dtype": "float32", "max_model_len": 64, "log": tmp_path / "logs" / "vllm.log"}
        given |= {"device": "cpu", "variables": {**package, **(variables or {})}}
        made.append(VLLMServer(sys.executable, tmp_path / "model", **{**given, **others}))
        return made[-1]

    yield make
    for server in made:
        server.close()


def notes(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "notes").read_text().splitlines()]


def are_gone(note: dict[str, Any]) -> bool:
    return not any(is_running(note[part]) for part in ("server", "engine"))


def is_running(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_a_server_is_started_found_ready_and_ended(make: Make, tmp_path: Path) -> None:
    server = make()
    assert not server.alive
    server.start()
    server.wait_ready(60)
    server.check()
    (note,) = notes(tmp_path)
    server.close()
    assert are_gone(note)
    assert not server.alive
    assert not listening(int(server.address.rsplit(":", 1)[1]))


def test_the_command(make: Make, tmp_path: Path) -> None:
    server = make(arguments=["--max-num-seqs", "8"], gpu_memory_utilization=0.5, tensor_parallel=2)
    server.start()
    server.wait_ready(60)
    (note,) = notes(tmp_path)
    words = note["arguments"]
    pairs = dict(itertools.pairwise(words))
    assert pairs["--model"] == str(tmp_path / "model")
    assert pairs["--host"] == "127.0.0.1"
    assert pairs["--max-lora-rank"] == "16"
    assert pairs["--logprobs-mode"] == "processed_logprobs"
    assert pairs["--generation-config"] == "vllm"
    assert (pairs["--max-num-seqs"], pairs["--tensor-parallel-size"]) == ("8", "2")
    assert "--enforce-eager" in words
    assert "--gpu-memory-utilization" not in words  # there is no GPU
    assert "--gpu-memory-utilization" in make(device="cuda", gpu_memory_utilization=0.5)._command


def test_the_environment(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-1")
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "0")
    server = make()
    server.start()
    server.wait_ready(60)
    (note,) = notes(tmp_path)
    seen = note["environment"]
    assert not {"TORCHELASTIC_USE_AGENT_STORE", "RANK", "VIRTUAL_ENV"} & seen.keys()
    assert (seen["VLLM_CPU_OMP_THREADS_BIND"], seen["VLLM_CPU_KVCACHE_SPACE"]) == ("0-1", "1")
    assert seen["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert seen["VLLM_API_KEY"] == server.api_key
    assert len(server.api_key) >= 32
    everything = [word for process in psutil.Process().children(recursive=True) for word in process.cmdline()]
    assert not any(server.api_key in word for word in everything)
    assert server.api_key not in server.log.read_text()


@pytest.mark.night
def test_an_engine_that_does_not_listen_is_killed(make: Make, tmp_path: Path) -> None:
    server = make({"FAKE_DEAF": "1"})
    server.start()
    server.wait_ready(60)
    (note,) = notes(tmp_path)
    server.close()
    assert are_gone(note)


@pytest.mark.parametrize("which", ["server", "guard"])
def test_nothing_is_left_when_a_part_is_killed(make: Make, tmp_path: Path, which: str) -> None:
    server = make()
    server.start()
    server.wait_ready(60)
    (note,) = notes(tmp_path)
    (process,) = (child for child in psutil.Process().children() if "trainer.inference.guard" in child.cmdline())
    os.kill(note["server"] if which == "server" else process.pid, signal.SIGKILL)
    wait_for(lambda: not server.alive, "the death is seen", 60)
    if which == "server":
        with pytest.raises(EngineFailed, match=r"was killed by SIGKILL; its log is .*vllm\.log"):
            server.check()
    server.close()
    assert are_gone(note)


@pytest.mark.parametrize("way", ["killed", "forked"])
def test_a_server_ends_with_the_process_that_started_it(tmp_path: Path, way: str) -> None:
    """Also where a process that was forked from that one lives on with its pipes."""
    package = make_package(tmp_path)
    program = f"""
import os, sys, time
from pathlib import Path
from trainer.inference.server import VLLMServer
server = VLLMServer(sys.executable, "model", lora_rank=8, dtype="auto", max_model_len=64, device="cpu",
                    log=Path({str(tmp_path / "log")!r}), variables={package!r})
server.start()
server.wait_ready(60)
if {way == "forked"} and os.fork() == 0:
    time.sleep(60)
    os._exit(0)
print("ready", flush=True)
time.sleep(3600)
"""
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "ready\n"
    (note,) = notes(tmp_path)
    forked = [child for child in psutil.Process(parent.pid).children() if "guard" not in " ".join(child.cmdline())]
    parent.kill()
    parent.wait()
    try:
        assert len(forked) == (way == "forked")
        wait_for(lambda: are_gone(note), "the server and its engine are gone", 60)
    finally:
        for child in forked:
            child.kill()


def test_a_server_is_started_again_with_the_same_address_a_few_times(make: Make, tmp_path: Path) -> None:
    now = [0.0]
    server = make(restarts=Restarts(2, 100.0), clock=lambda: now[0])
    server.start()
    server.wait_ready(60)
    address = server.address
    for _ in range(2):
        os.kill(notes(tmp_path)[-1]["server"], signal.SIGKILL)
        wait_for(lambda: not server.alive, "the death is seen", 60)
        server.restart()
        server.wait_ready(60)
        assert server.address == address
    with pytest.raises(EngineFailed, match="started again 2 times within 2 minutes"):
        server.restart()
    now[0] = 101.0
    server.restart()
    server.wait_ready(60)
    assert len(notes(tmp_path)) == 4


def test_a_server_that_has_ended_is_revived_once_by_many_threads(make: Make, tmp_path: Path) -> None:
    server = make()
    server.start()
    server.wait_ready(60)
    assert not server.revive()
    os.kill(notes(tmp_path)[-1]["server"], signal.SIGKILL)
    wait_for(lambda: not server.alive, "the death is seen", 60)
    with ThreadPoolExecutor(4) as pool:
        revived = list(pool.map(lambda _: server.revive(), range(4)))
    assert sorted(revived) == [False, False, False, True]
    assert len(notes(tmp_path)) == 2


def test_the_end_of_the_log_is_in_the_error(make: Make) -> None:
    server = make({"FAKE_FAILS": "1"})
    server.start()
    with pytest.raises(EngineFailed, match=r"ended with exit code 1") as raised:
        server.wait_ready(60)
    assert "fake: cannot start: 1" in str(raised.value)
    unknown = make({"FAKE_FAILS": "2"})  # argparse's exit code
    unknown.start()
    with pytest.raises(InputError, match="ended with exit code 2"):
        unknown.wait_ready(60)


def test_a_server_that_says_nothing_is_given_up(make: Make) -> None:
    server = make({"FAKE_SILENT": "1"})
    server.start()
    with pytest.raises(EngineFailed, match=r"was not ready after \d+ s, and its log has not grown for"):
        server.wait_ready(60, silence_s=2)
    with pytest.raises(EngineFailed, match=r"was not ready after \d+ s; its log"):
        server.wait_ready(2)


def test_a_python_without_vllm(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"lora_rank": 8, "dtype": "auto", "max_model_len": 64, "log": tmp_path / "log"}
    with pytest.raises(InputError, match="has no vLLM; install it in an environment of its own"):
        VLLMServer(sys.executable, tmp_path, **settings).start()
    with pytest.raises(InputError, match="is not a Python that can be started"):
        VLLMServer(str(tmp_path / "python"), tmp_path, **settings).start()
    with pytest.raises(InputError, match=r"up to rank 512, and adapter.rank is 600"):
        VLLMServer(sys.executable, tmp_path, **{**settings, "lora_rank": 600})


def test_rooms() -> None:
    assert [lora_room(rank) for rank in (1, 8, 9, 200, 512, 513)] == [8, 8, 16, 256, 512, None]


def test_the_guard_needs_no_heavy_library() -> None:
    code = (
        f"import {guard.__name__}, sys; print('torch' in sys.modules, 'numpy' in sys.modules, 'fsspec' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False"] * 3


def test_a_closed_server_is_not_started_again(make: Make) -> None:
    """A text that is still in work meets a server that is gone."""
    server = make()
    server.start()
    server.wait_ready()
    server.close()
    with pytest.raises(EngineFailed, match="was closed"):
        server.revive()
    assert not server.alive
