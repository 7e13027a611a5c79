"""A stand-in for the Hugging Face Hub: repositories are made, files come in as commits and through LFS."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import unquote

TOKEN = "hf_stand_in"
LFS_FROM = 1024
"""Bytes; larger files have to come through LFS, as binary ones do on the Hub."""


@dataclass
class Hub:
    """``files``: by repository, branch and path. ``private``: of each repository. ``objects``: of LFS."""

    endpoint: str = ""
    files: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, repo: str, branch: str, lines: list[dict[str, Any]]) -> None:
        files = self.files.setdefault((repo, branch), {})
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            else:
                raise AssertionError(f"unknown operation {line['key']}")


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *told: Any) -> None:
        pass

    def do_POST(self) -> None:
        path, body = unquote(self.path.partition("?")[0]), self._body()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer({"error": "who are you?"}, 401)
            return
        for pattern, answer in self.ROUTES.items():
            if match := re.fullmatch(pattern, path):
                self._answer(answer(self, body, *match.groups()))
                return
        self._answer({"error": f"unknown {path}"}, 404)

    def do_PUT(self) -> None:
        body, oid = self._body(), self.path.rpartition("/")[2]
        whole = hashlib.sha256(body).hexdigest() == oid
        if whole:
            self.hub.objects[oid] = body
        self._answer({}, 200 if whole else 400)

    def do_GET(self) -> None:
        match = re.fullmatch(r"/api/models/(.+)/revision/(.+)", unquote(self.path.partition("?")[0]))
        known = match is not None and match[1] in self.hub.private
        told = {"id": match[1], "sha": "0" * 40, "siblings": []} if match and known else {"error": "unknown"}
        self._answer(told, 200 if known else 404)

    def _create(self, body: bytes) -> Any:
        asked = json.loads(body)
        repo = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        self.hub.private.setdefault(repo, asked.get("private") or asked.get("visibility") == "private")
        return {"url": f"{self.hub.endpoint}/{repo}", "name": repo, "id": repo}

    def _check_card(self, body: bytes) -> Any:
        return {"errors": [], "warnings": []}

    def _branch(self, body: bytes, repo: str, branch: str) -> Any:
        self.hub.files.setdefault((repo, branch), {})
        return {}

    def _preupload(self, body: bytes, repo: str, branch: str) -> Any:
        sizes = {f["path"]: f["size"] for f in json.loads(body)["files"]}
        modes = {path: "lfs" if size >= LFS_FROM else "regular" for path, size in sizes.items()}
        return {"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes.items()]}

    def _batch(self, body: bytes, repo: str) -> Any:
        wanted = json.loads(body)["objects"]
        href = f"{self.hub.endpoint}/lfs"
        upload = [{**o, "actions": {"upload": {"href": f"{href}/{o['oid']}", "header": {}}}} for o in wanted]
        return {"transfer": "basic", "objects": upload}

    def _commit(self, body: bytes, repo: str, branch: str) -> Any:
        self.hub.commit(repo, branch, [json.loads(line) for line in body.splitlines()])
        oid = hashlib.sha1(body).hexdigest()
        return {"success": True, "commitUrl": f"{self.hub.endpoint}/{repo}/commit/{oid}", "commitOid": oid}

    ROUTES: ClassVar[dict[str, Callable[..., Any]]] = {
        r"/api/repos/create": _create,
        r"/api/validate-yaml": _check_card,
        r"/api/models/(.+)/branch/(.+)": _branch,
        r"/api/models/(.+)/preupload/(.+)": _preupload,
        r"/(.+)\.git/info/lfs/objects/batch": _batch,
        r"/api/models/(.+)/commit/(.+)": _commit,
    }

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, told: Any, status: int = 200) -> None:
        body = json.dumps(told).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def stand_in() -> Iterator[Hub]:
    hub = Hub()
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub})) as server:
        hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
