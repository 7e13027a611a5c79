"""``python -m trainer.inference.host``: a vLLM server that trainings on other hosts use, and the service that takes
their adapters (`trainer.inference.receiver`). A recipe names the service's address under `rollout.addresses`.

The server is started again when it ends, up to three times in an hour.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO, TypedDict

from trainer.errors import EngineFailed, InputError, MusterError
from trainer.inference.receiver import NEWEST, AdapterFolder, AdapterReceiver, own_address
from trainer.inference.server import LOOPBACK, VLLMServer
from trainer.recipe.sections.rollouts.engine import OWN_GPU
from trainer.redact import redact

API_KEY = "MUSTER_ROLLOUT_API_KEY"
"""The variable with the key that servers want."""
ADDRESSES = "MUSTER_ROLLOUT_ADDRESSES"
"""The variable by which workers get the addresses of servers that were placed for their attempt, with commas."""
POLL_S, KEEPER_S = 0.5, 20.0
FOLDER, LOCK = "muster-vllm-", "lock"


class HostState(TypedDict):
    """The answer to ``GET /muster``. ``port``: the server's, on the same host; ``folder``: where adapters are;
    ``state``: ``starting`` (also again), ``ready`` or ``failed``, for good; ``why``: for what reason, with the end of
    the ``log``."""

    port: int
    folder: str
    state: str
    why: str
    log: str


class ServerHost:
    """One server, kept alive, and its receiver. ``make`` makes the server: from a folder that is removed with it, and
    the key. ``port``: the receiver's, 0 for any."""

    def __init__(
        self,
        make: Callable[[Path, str], VLLMServer],
        *,
        host: str = LOOPBACK,
        port: int = 0,
        api_key: str | None = None,
    ) -> None:
        self._folder, self._lock = _own_folder()
        self.api_key = api_key or secrets.token_hex(16)
        try:
            self.server = make(self._folder, self.api_key)
            # Twice as many as are used at a time: those of an attempt that was killed are never removed by it.
            adapters = AdapterFolder(self._folder / "adapters", newest=max(NEWEST, 2 * self.server.adapters))
            self._receiver = AdapterReceiver(host, port, self.api_key, adapters, self.state)
        except BaseException as error:
            shutil.rmtree(self._folder, ignore_errors=True)
            if isinstance(error, OSError):
                raise InputError(f"{host} port {port} cannot be listened on: {error.strerror}") from error
            raise
        self._adapters = adapters
        self._failure: MusterError | None = None
        self._state = "starting"
        self._closed, self._settled = threading.Event(), threading.Event()
        self._keeper = threading.Thread(target=self._keep, daemon=True, name="server-keeper")

    @property
    def address(self) -> str:
        """The address for `rollout.addresses`."""
        return self._receiver.address

    def start(self) -> None:
        """Starts both, and returns at once. Raises InputError for a Python without vLLM."""
        self.server.start()
        self._receiver.start()
        self._keeper.start()

    def wait_ready(self, timeout_s: float | None = None) -> bool:
        """Waits until the server answers, within the bounds of `VLLMServer.wait_ready`, whose errors it raises. Returns
        False if it was not so far after ``timeout_s``."""
        settled = self._settled.wait(timeout_s)
        self.check()
        return settled

    def check(self) -> None:
        """Raises the error for which the server was given up."""
        if self._failure is not None:
            raise self._failure

    def state(self) -> HostState:
        state, failure = self._state, self._failure
        if state == "ready" and not self.server.alive:
            state = "starting"  # as soon as that is noticed
        return HostState(
            port=self.server.port,
            folder=str(self._adapters.folder),
            state=state,
            why=redact(failure.cause) if failure is not None else "",
            log=redact("\n".join(map(str, failure.args[1:]))) if failure is not None else "",
        )

    def close(self) -> None:
        """Ends the server and the receiver. Returns once all of the server is gone."""
        self._closed.set()
        self._settled.set()
        self.server.close()
        if self._keeper.is_alive():
            self._keeper.join(KEEPER_S)
            self.server.close()  # it may have been starting it again
        self._receiver.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._lock.close()

    def _keep(self) -> None:
        try:
            self.server.wait_ready()
            self._state = "ready"
            self._settled.set()
            while not self._closed.wait(POLL_S):
                if not self.server.alive:
                    self._state = "starting"
                    self._revive()
                    self._state = "ready"
        except Exception as error:
            if not self._closed.is_set():
                own = error if isinstance(error, MusterError) else EngineFailed(f"{type(error).__name__}: {error}")
                self._failure, self._state = own, "failed"
        self._settled.set()

    def _revive(self) -> None:
        """Starts the server again; once more where that fails, for as often as it may be: a GPU's memory may come back
        late."""
        while not self._closed.is_set():
            try:
                self.server.revive()
                return
            except EngineFailed:
                if self.server.alive or self.server.restarts_left <= 0:
                    raise


def _own_folder() -> tuple[Path, IO[str]]:
    """Returns a new temporary folder, and a lock that says that it is in use. Removes those of hosts that were killed
    with all of their processes."""
    for old in Path(tempfile.gettempdir()).glob(f"{FOLDER}*"):
        with suppress(OSError), (old / LOCK).open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(old, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=FOLDER))
    lock = (folder / f"{LOCK}-new").open("a")
    fcntl.flock(lock, fcntl.LOCK_EX)
    (folder / f"{LOCK}-new").rename(folder / LOCK)  # others see it locked only
    return folder, lock


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    stopped = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.set()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)
    try:
        _serve(options, stopped)
    except MusterError as error:
        print(f"muster: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


def _serve(options: argparse.Namespace, stopped: threading.Event) -> None:
    """Serves until ``stopped``. Raises what ends the server for good."""
    if not Path(options.model, "config.json").is_file():
        raise InputError(f"--model {options.model!r} is no folder with a config.json")
    given = os.environ.get(API_KEY)
    host = ServerHost(partial(_server, options), host=options.host, port=options.port, api_key=given)
    try:
        host.start()
        print(f"starting vLLM; its log is {host.server.log}", flush=True)
        while not stopped.is_set() and not host.wait_ready(POLL_S):
            pass
        if not stopped.is_set():
            print(f"ready. In the recipe:\n  rollout: {{engine: vllm, addresses: [{host.address}]}}", flush=True)
            if given is None:
                print(f"In the environment of the training:\n  export {API_KEY}={host.api_key}", flush=True)
        while not stopped.wait(POLL_S):
            host.check()
    finally:
        host.close()


def _server(options: argparse.Namespace, folder: Path, api_key: str) -> VLLMServer:
    return VLLMServer(
        options.python,
        options.model,
        lora_rank=options.lora_rank,
        dtype=options.dtype,
        max_model_len=options.max_model_len,
        log=Path(options.log) if options.log else folder / "vllm.log",
        device=options.device,
        gpu_memory_utilization=options.gpu_memory_utilization,
        tensor_parallel=options.tensor_parallel,
        adapters=options.adapters,
        host=options.host,
        api_key=api_key,
        temporary=folder,
        arguments=options.arguments,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.inference.host",
        description=f"Serve a base model and the adapters of one training on another host. The key that clients need "
        f"is in {API_KEY}, or random; several hosts need the same.",
    )
    gpu = "cuda" if shutil.which("nvidia-smi") else "cpu"
    option = parser.add_argument
    option("--python", required=True, help="the Python of an environment that has vLLM")
    option("--model", required=True, metavar="FOLDER", help="the base model of the recipe")
    option("--lora-rank", required=True, type=int, metavar="R", help="at least adapter.rank")
    option("--max-model-len", required=True, type=int, metavar="TOKENS", help="at least those of a prompt and its text")
    option("--dtype", default="bfloat16", help="model.dtype (%(default)s)")
    option("--adapters", default=2, type=int, metavar="N", help="rollout.max_staleness + 2 (%(default)s)")
    option("--tensor-parallel", default=1, type=int, metavar="GPUS", help="GPUs of the server (%(default)s)")
    option("--gpu-memory-utilization", default=OWN_GPU, type=float, metavar="SHARE", help="(%(default)s)")
    option("--device", default=gpu, choices=("cuda", "cpu"), help="(%(default)s)")
    option("--host", default=own_address(), metavar="ADDRESS", help="where to listen (%(default)s)")
    option("--port", default=0, type=int, help="of the address in the recipe; 0 takes any")
    option("--log", metavar="FILE", help="vLLM's log")
    option("arguments", nargs="*", metavar="-- ARGUMENT", help="more arguments of vLLM")
    return parser


if __name__ == "__main__":
    sys.exit(main())
