"""A package `vllm` without anything of vLLM in it, for the tests of what starts and ends servers."""

from __future__ import annotations

from pathlib import Path

_API_SERVER = """
import http.server, json, os, signal, subprocess, sys, time

arguments = dict(zip(sys.argv[1::1], sys.argv[2::1]))
print("starting with", sys.argv[1:], flush=True)
if mode := os.environ.get("FAKE_FAILS"):
    print("fake: cannot start:", mode, flush=True)
    sys.exit(int(mode))
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
    which Python finds it; each server appends a line about itself to the file FAKE_NOTES."""
    package = folder / "package" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for part in (package, package.parent, package.parent.parent):
        (part / "__init__.py").touch()
    (package / "api_server.py").write_text(_API_SERVER)
    return {"PYTHONPATH": str(folder / "package"), "FAKE_NOTES": str(folder / "notes")}
