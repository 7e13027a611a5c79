"""A package `vllm` without anything of vLLM in it, for the tests of what starts and ends servers."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

_API_SERVER = """
import http.server, json, os, signal, subprocess, sys, time

arguments = dict(zip(sys.argv[1::1], sys.argv[2::1]))
print("starting with", sys.argv[1:], flush=True)
if mode := os.environ.get("FAKE_FAILS"):
    print("fake: cannot start:", mode, flush=True)
    sys.exit(int(mode))
if os.path.exists(os.environ["FAKE_NOTES"] + ".fails"):
    os.remove(os.environ["FAKE_NOTES"] + ".fails")
    sys.exit(1)
if os.environ.get("FAKE_SILENT"):
    time.sleep(3600)
# Like vLLM's engine process: it does not notice that the server is gone.
ignored = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(3600)"
deaf = ignored if os.environ.get("FAKE_DEAF") else "import time; time.sleep(3600)"
engine = subprocess.Popen([sys.executable, "-c", deaf])
with open(os.environ["FAKE_NOTES"], "a") as notes:
    seen = {"server": os.getpid(), "engine": engine.pid, "arguments": sys.argv[1:], "environment": dict(os.environ)}
    notes.write(json.dumps(seen) + "\\n")

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

http.server.ThreadingHTTPServer((arguments["--host"], int(arguments["--port"])), Handler).serve_forever()
"""


def make_package(folder: Path) -> dict[str, str]:
    """Makes a package `vllm` whose server answers /health and starts a process of its own. Returns the environment with
    which Python finds it; each server appends a line about itself to the file FAKE_NOTES. Where there is a file
    FAKE_NOTES.fails, the next start removes it and fails."""
    package = folder / "package" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for part in (package, package.parent, package.parent.parent):
        (part / "__init__.py").touch()
    (package / "api_server.py").write_text(_API_SERVER)
    return {"PYTHONPATH": str(folder / "package"), "FAKE_NOTES": str(folder / "notes")}


_WRITING_SERVER = """
import json, os, sys, threading, time
from pathlib import Path
from tests.support.fake_vllm import FakeVLLM

arguments = dict(zip(sys.argv[1::1], sys.argv[2::1]))
print("starting with", sys.argv[1:], flush=True)
import torch
torch.set_num_threads(1)
fake = FakeVLLM(
    Path(arguments["--model"]),
    api_key=os.environ["VLLM_API_KEY"],
    host=arguments["--host"],
    port=int(arguments["--port"]),
)
fake.start()
with open({notes!r}, "a") as notes:
    notes.write(json.dumps({{"pid": os.getpid(), "key": os.environ["VLLM_API_KEY"]}}) + "\\n")
told = 0
while True:
    time.sleep(0.05)
    for body in fake.completions()[told:]:
        told += 1
        with open({texts!r}, "a") as texts:
            texts.write(json.dumps([os.getpid(), body["model"]]) + "\\n")
"""


@dataclass(frozen=True)
class WritingPython:
    """A Python whose `vllm` writes real texts with real adapters (`tests.support.fake_vllm`)."""

    path: str
    _notes: Path
    _texts: Path

    @classmethod
    def make(cls, folder: Path) -> WritingPython:
        package = folder / "package" / "vllm" / "entrypoints" / "openai"
        package.mkdir(parents=True)
        for part in (package, package.parent, package.parent.parent):
            (part / "__init__.py").touch()
        made = cls(str(folder / "python"), folder / "notes", folder / "texts")
        (package / "api_server.py").write_text(_WRITING_SERVER.format(notes=str(made._notes), texts=str(made._texts)))
        root = Path(__file__).resolve().parents[2]
        Path(made.path).write_text(f'#!/bin/sh\nPYTHONPATH={folder}/package:{root} exec {sys.executable} "$@"\n')
        Path(made.path).chmod(0o755)
        return made

    def pids(self) -> list[int]:
        """The servers that were started, in their order."""
        return [json.loads(line)["pid"] for line in _lines(self._notes)]

    def keys(self) -> set[str]:
        return {json.loads(line)["key"] for line in _lines(self._notes)}

    def writers(self) -> dict[int, set[str]]:
        """The adapters that each server was asked to write with."""
        found: dict[int, set[str]] = {}
        for line in _lines(self._texts):
            pid, model = json.loads(line)
            found.setdefault(pid, set()).add(model)
        return found


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []
