"""Starts and watches a vLLM server of our own.

vLLM runs in an environment of its own, since its pins of torch and transformers are not ours.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import EngineFailed, InputError
from trainer.inference.exchange import Address, NotAnswered, exchange
from trainer.inference.guard import GRACE_S, ServerStart
from trainer.inference.lora_ranks import LORA_RANKS, lora_room

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[2]
LOOPBACK = "127.0.0.1"
BASE = "base"
"""The name that our servers give to the base model."""
SHOWN_LINES, SHOWN_ERRORS = 12, 4
_ERROR = re.compile(r"\b\w*(Error|Exception): ")
_LOG_TAIL_BYTES = 65_536
_GUARD_WAIT_S = 60.0
_USAGE = 2

# They describe this process's group of ranks, or its Python; in the server they would mean something else.
_OUR_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "MASTER_ADDR",
             "MASTER_PORT")  # fmt: skip
_OUR_PYTHON = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
_OUR_LAUNCHERS = ("TORCHELASTIC_", "RAY_")

_NEEDED = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    # A folder `vllm` or `torch` where we happen to be is no module.
    "PYTHONSAFEPATH": "1",
}
_VARIABLES = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
_CPU_VARIABLES = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


@dataclass(frozen=True)
class Restarts:
    """A server may be started again so often within so many seconds."""

    most: int = 3
    within_s: float = 3600.0


class VLLMServer:
    """A server that ends with this process. Only `revive` may be called in several threads.

    ``python``: the interpreter of the environment that has vLLM; ``device``: cuda or cpu; ``lora_rank``: of the largest
    adapter; ``adapters``: how many are used at a time; ``arguments``, ``variables``: passed on, after our own;
    ``host``: what it listens on. Its address stays the same when it is started again; it has forgotten its adapters
    then. ``api_key`` is random unless given, and known to the server by its environment only: every client has to send
    it. ``temporary``: a folder that is removed once the server has ended, also if this process was killed.
    """

    def __init__(
        self,
        python: str,
        model_folder: str | Path,
        *,
        lora_rank: int,
        dtype: str,
        max_model_len: int,
        log: Path,
        device: str = "cuda",
        gpu_memory_utilization: float | None = None,
        tensor_parallel: int = 1,
        adapters: int = 1,
        host: str = LOOPBACK,
        api_key: str | None = None,
        temporary: Path | None = None,
        arguments: Sequence[str] = (),
        variables: Mapping[str, str] | None = None,
        restarts: Restarts = Restarts(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        room = lora_room(lora_rank)
        if room is None:
            raise InputError(f"vLLM serves adapters up to rank {LORA_RANKS[-1]}, and adapter.rank is {lora_rank}")
        self.adapters = adapters
        self.log, self.api_key = log.absolute(), api_key or secrets.token_hex(16)
        self._host, self._temporary = host, None if temporary is None else str(temporary.absolute())
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.bind((host, 0))
            self.port = probe.getsockname()[1]
        self._python, self._restarts, self._clock = python, restarts, clock
        self._variables = _VARIABLES | (_CPU_VARIABLES if device == "cpu" else {})
        self._given = dict(variables or {})
        # On a CPU a request with a seed ends vLLM's engine if its prompt is computed in parts (vLLM 0.32).
        on_device = ["--enforce-eager", "--no-enable-chunked-prefill"] if device == "cpu" else []
        if gpu_memory_utilization is not None and device != "cpu":
            on_device += ["--gpu-memory-utilization", str(gpu_memory_utilization)]
        self._command = [
            # Not the command `vllm`, which looks for a distribution of that name: vllm-cpu has another.
            *(python, "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(Path(model_folder).absolute()), "--served-model-name", BASE),
            *("--host", host, "--port", str(self.port), "--disable-uvicorn-access-log"),
            *("--dtype", dtype, "--max-model-len", str(max_model_len), "--tensor-parallel-size", str(tensor_parallel)),
            *("--enable-lora", "--max-lora-rank", str(room), "--max-loras", str(adapters)),
            *("--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"),
            *on_device,
            *arguments,
        ]
        self._reviving, self._closed = threading.Lock(), False
        self._guard: subprocess.Popen[bytes] | None = None
        self._pid = 0
        self._restarted_at: list[float] = []

    @property
    def address(self) -> str:
        """Its address for clients on this machine, and on others where it listens on one of its names."""
        host = LOOPBACK if self._host == "0.0.0.0" else self._host
        return str(Address("http", host, self.port, ""))

    @property
    def alive(self) -> bool:
        return self._guard is not None and self._guard.poll() is None

    def start(self) -> None:
        """Starts the server, and returns at once. Raises InputError for a Python without vLLM."""
        self._check_python()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        start = ServerStart(self._command, self._environment(), str(self.log.parent), str(self.log), self._temporary)
        self._guard = subprocess.Popen(
            [sys.executable, "-m", "trainer.inference.guard"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
            start_new_session=True,  # a Ctrl-C or a signal to our group is ours to handle
        )
        assert self._guard.stdin is not None
        assert self._guard.stdout is not None
        with suppress(BrokenPipeError):
            self._guard.stdin.write(start.line())
            self._guard.stdin.flush()
        said = select.select([self._guard.stdout], [], [], _GUARD_WAIT_S)[0]
        line = self._guard.stdout.readline() if said else b""
        if not line:
            self.close()
            raise EngineFailed("the process that guards the vLLM server could not start it")
        self._pid = int(line)

    def wait_ready(self, bound_s: float = 3600.0, silence_s: float = 900.0) -> None:
        """Waits until the server answers. Raises EngineFailed with the end of its log when it has ended, when nothing
        was added to the log for ``silence_s``, or after ``bound_s``; InputError if it does not know an argument."""
        began = grew = self._clock()
        size, address = -1, Address.of(self.address)
        while True:
            with suppress(NotAnswered):
                if exchange(address, "GET", "/health", headers={}, connect_s=5.0, answer_s=10.0).status == 200:
                    return
            if not self.alive:
                raise self._ended()
            now, before = self._clock(), size
            size = self.log.stat().st_size
            grew = now if size != before else grew
            if now - grew > silence_s or now - began > bound_s:
                quiet = f", and its log has not grown for {now - grew:.0f} s" if now - grew > silence_s else ""
                why = f"the vLLM server was not ready after {now - began:.0f} s{quiet}"
                raise EngineFailed(f"{why}; its log is {self.log}", self.last_lines())
            time.sleep(0.5)

    def check(self) -> None:
        """Raises EngineFailed, with the end of its log, if the server has ended."""
        if not self.alive:
            raise self._ended()

    @property
    def restarts_left(self) -> int:
        """How often the server may be started again now."""
        now = self._clock()
        self._restarted_at = [at for at in self._restarted_at if now - at < self._restarts.within_s]
        return self._restarts.most - len(self._restarted_at)

    def restart(self) -> None:
        """Starts the server again. Raises EngineFailed once it was started again too often."""
        if self.restarts_left <= 0:
            raise EngineFailed(
                f"the vLLM server was started again {self._restarts.most} times within "
                f"{self._restarts.within_s / 60:.0f} minutes and has ended again; its log is {self.log}",
                self.last_lines(),
            )
        self._restarted_at.append(self._clock())
        self._end()
        self.start()

    def revive(self) -> bool:
        """Starts the server again if it has ended, and waits until it is ready; returns True then. Raises what
        `restart` and `wait_ready` raise."""
        with self._reviving:
            if self.alive:
                return False
            if self._closed:
                raise EngineFailed(f"the vLLM server at {self.address} was closed")
            log.warning("%s", self._ended())
            self.restart()
            self.wait_ready()
            return True

    def close(self) -> None:
        """Ends the server and what it started. Returns once all of it is gone; `revive` raises from now on."""
        self._closed = True
        self._end()

    def _end(self) -> None:
        if self._guard is None:
            return
        guard = self._guard
        for pipe in (guard.stdin, guard.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()
        with suppress(subprocess.TimeoutExpired):
            guard.wait(2 * GRACE_S)
        if guard.poll() is None:
            guard.kill()
            guard.wait()
        if guard.returncode < 0 and self._pid:  # it was killed, and could not clear up
            self._end_group()
        self._guard, self._pid = None, 0

    def last_lines(self) -> str:
        """Returns the errors at the end of the server's log, and its last lines: libraries write much after them."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, self.log.stat().st_size - _LOG_TAIL_BYTES))
                lines = file.read().decode("utf-8", "replace").replace(self.api_key, "***").splitlines()
        except OSError as error:
            return f"(its log cannot be read: {error})"
        last = [line for line in lines if line.strip()][-SHOWN_LINES:]
        errors = dict.fromkeys(line for line in lines if _ERROR.search(line) and line not in last)
        return "\n".join([*list(errors)[-SHOWN_ERRORS:], *last])

    def _environment(self) -> dict[str, str]:
        passed = {
            name: value
            for name, value in os.environ.items()
            if name not in _OUR_RANK + _OUR_PYTHON and not name.startswith(_OUR_LAUNCHERS)
        }
        return {**self._variables, **passed, **_NEEDED, **self._given, "VLLM_API_KEY": self.api_key}

    def _check_python(self) -> None:
        look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
        try:
            found = subprocess.run(
                [self._python, "-c", look], env=self._environment(), cwd="/", capture_output=True, timeout=120
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise InputError(f"{self._python} is not a Python that can be started: {error}") from error
        if found.returncode:
            raise InputError(
                f"{self._python} has no vLLM; install it in an environment of its own, and name its Python"
            )

    def _ended(self) -> InputError | EngineFailed:
        code = self._guard.returncode if self._guard is not None else None
        how = "was not started" if code is None else f"ended with exit code {code}"
        if code is not None and code > 128:
            with suppress(ValueError):
                how = f"was killed by {signal.Signals(code - 128).name}"
        kind = InputError if code == _USAGE else EngineFailed
        return kind(f"the vLLM server at {self.address} {how}; its log is {self.log}", self.last_lines())

    def _end_group(self) -> None:
        """Ends the server where the guard cannot: it was killed, which has sent the server a SIGTERM."""
        with suppress(ProcessLookupError, PermissionError):
            for number in (signal.SIGTERM, signal.SIGKILL):
                os.killpg(self._pid, number)
                deadline = time.monotonic() + GRACE_S
                while time.monotonic() < deadline:
                    os.killpg(self._pid, 0)
                    time.sleep(0.2)
