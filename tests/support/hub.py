"""A stand-in for the Hugging Face Hub: repositories are made, files come in as commits and through LFS."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

TOKEN = "hf_stand_in"
LFS_FROM = 1024
"""Bytes; larger files have to come through LFS, as binary ones do on the Hub."""


@dataclass
class Hub:
    """``files``: by repository, branch and path. ``private``: of each repository. ``refused``: paths that are turned
    away with a status."""

    endpoint: str = ""
    files: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    refused: dict[str, int] = field(default_factory=dict)

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


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *told: Any) -> None:
            pass

        def do_POST(self) -> None:
            path, body = unquote(self.path.partition("?")[0]), self._body()
            status = next((code for part, code in hub.refused.items() if part in path), None)
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                status = 401
            if status:
                self._answer({"error": f"refused with {status}"}, status)
            elif path == "/api/repos/create":
                asked = json.loads(body)
                repo = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
                hub.private.setdefault(repo, asked.get("private") or asked.get("visibility") == "private")
                self._answer({"url": f"{hub.endpoint}/{repo}", "name": repo, "id": repo})
            elif path == "/api/validate-yaml":
                self._answer({"errors": [], "warnings": []})
            elif match := re.fullmatch(r"/api/models/(.+)/branch/(.+)", path):
                hub.files.setdefault((match[1], match[2]), {})
                self._answer({})
            elif match := re.fullmatch(r"/api/models/(.+)/preupload/(.+)", path):
                sizes = {f["path"]: f["size"] for f in json.loads(body)["files"]}
                modes = [
                    {"path": p, "uploadMode": "lfs" if n >= LFS_FROM else "regular", "shouldIgnore": False}
                    for p, n in sizes.items()
                ]
                self._answer({"files": modes})
            elif path.endswith("/info/lfs/objects/batch"):
                wanted = json.loads(body)["objects"]
                upload = [
                    {**o, "actions": {"upload": {"href": f"{hub.endpoint}/lfs/{o['oid']}", "header": {}}}}
                    for o in wanted
                ]
                self._answer({"transfer": "basic", "objects": upload})
            elif match := re.fullmatch(r"/api/models/(.+)/commit/(.+)", path):
                hub.commit(match[1], match[2], [json.loads(line) for line in body.splitlines()])
                oid = hashlib.sha1(body).hexdigest()
                url = f"{hub.endpoint}/{match[1]}/commit/{oid}"
                self._answer({"success": True, "commitUrl": url, "commitOid": oid})
            else:
                self._answer({"error": f"unknown {path}"}, 404)

        def do_PUT(self) -> None:
            body, oid = self._body(), self.path.rpartition("/")[2]
            if hashlib.sha256(body).hexdigest() != oid:
                self._answer({"error": "torn"}, 400)
                return
            hub.objects[oid] = body
            self._answer({})

        def do_GET(self) -> None:
            match = re.fullmatch(r"/api/models/(.+)/revision/(.+)", unquote(self.path.partition("?")[0]))
            if match and match[1] in hub.private:
                self._answer({"id": match[1], "sha": "0" * 40, "siblings": []})
            else:
                self._answer({"error": f"unknown {self.path}"}, 404)

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

    return Handler


@contextmanager
def stand_in() -> Iterator[Hub]:
    hub = Hub()
    with ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub)) as server:
        hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
