"""Calls `kubectl`, which has the cluster's address and credentials. No shell is used, and every call has a limit."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

from cluster.job import ClusterError

Fields = dict[str, Any]

REQUEST_S = 20
CALL_S = 60.0


class Kubectl:
    """`kubectl` in one namespace (None: that of its context). Raises ClusterError where it is missing or fails;
    ``usage`` is false where the cluster did not answer, and trying again may help."""

    def __init__(self, namespace: str | None = None) -> None:
        found = shutil.which("kubectl")
        if found is None:
            raise ClusterError(
                "kubectl is not installed here, or not in PATH; install it, or write the manifest with `muster render "
                "RECIPE --on kubernetes` and give it to `kubectl create -f -` where there is one"
            )
        self._command = [found, f"--request-timeout={REQUEST_S}s", *(["--namespace", namespace] if namespace else [])]

    def get(self, resource: str, name: str) -> Fields | None:
        """Returns the object, or None if there is none of that name."""
        text = self._call("get", resource, name, "--output=json", "--ignore-not-found")
        return _json(text) if text.strip() else None

    def list(self, resource: str, labels: str) -> list[Fields]:
        items: list[Fields] = _json(self._call("get", resource, f"--selector={labels}", "--output=json"))["items"]
        return items

    def create(self, manifest: str, *, dry_run: bool = False) -> Fields:
        """Creates the object of a manifest and returns it as the cluster stored it. With ``dry_run``, the cluster only
        validates it, by its schemas and admission webhooks."""
        options = ["--dry-run=server"] if dry_run else []
        return _json(self._call("create", *options, "--filename=-", "--output=json", stdin=manifest))

    def delete(self, resource: str, name: str, wait_s: int) -> None:
        """Deletes an object with everything that belongs to it, and waits for its end up to ``wait_s`` seconds (0: not
        at all). A name that does not exist is no error."""
        self._call(
            *("delete", resource, name, "--ignore-not-found", "--cascade=foreground"),
            *(("--wait=true", f"--timeout={wait_s}s") if wait_s else ("--wait=false",)),
            timeout_s=wait_s + CALL_S,
        )

    @contextmanager
    def logs(self, pod: str, container: str, since: str | None) -> Iterator[ProcessLines]:
        """Opens the stream of the container's lines from the time ``since``. Each begins with its time (RFC 3339)."""
        options = [f"--since-time={since}"] if since else []
        command = [*self._command, "logs", "--follow", "--timestamps", f"--container={container}", *options, pod]
        # The stream is open for as long as the job runs, so no limit for one request may end it.
        command[1] = "--request-timeout=0"
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            errors="replace",
        )  # fmt: skip
        try:
            yield ProcessLines(process)
        finally:
            process.kill()
            process.wait()

    def _call(self, *words: str, stdin: str | None = None, timeout_s: float = CALL_S) -> str:
        try:
            done = subprocess.run(
                [*self._command, *words], input=stdin or "", capture_output=True, text=True, errors="replace",
                timeout=timeout_s,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise ClusterError(f"kubectl {words[0]} did not answer within {timeout_s:.0f} s", usage=False) from None
        if done.returncode:
            said = done.stderr.strip() or f"exit code {done.returncode}"
            passing = any(sign in said.lower() for sign in _PASSING)
            raise ClusterError(f"kubectl {words[0]} failed: {_helped(said)}", usage=not passing)
        return done.stdout


class ProcessLines:
    """Lines of a process that runs while the caller does something else."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._queue: SimpleQueue[str | None] = SimpleQueue()
        self.ended = False
        Thread(target=self._read, args=(process,), daemon=True).start()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self._queue.put(line.rstrip("\n"))
        self._queue.put(None)

    def next(self, timeout_s: float) -> str | None:
        """Returns None if no line arrived in time, or if there are no more (``ended``)."""
        try:
            line = self._queue.get(timeout=timeout_s)
        except Empty:
            return None
        self.ended = line is None
        return line


_PASSING = (
    "timeout", "timed out", "refused", "unable to connect", "tls handshake", "eof", "toomanyrequests", "reset by peer",
    "serviceunavailable", "internalerror", "try again", "no route to host", "no such host",
)  # fmt: skip
"""Signs of a cluster that is unreachable or busy, and has not refused the request."""


def _json(text: str) -> Fields:
    try:
        made: Fields = json.loads(text)
    except json.JSONDecodeError:
        raise ClusterError(f"kubectl answered {text[:100]!r}, which is not JSON", usage=False) from None
    return made


def _helped(said: str) -> str:
    if (
        "no matches for kind" in said
        or "doesn't have a resource type" in said
        or "could not find the requested" in said
    ):
        return f"{said} (the cluster lacks the operator of cluster.kubernetes.kind: see docs/clusters/kubernetes.md)"
    if "unknown field" in said and "authOptions" in said:
        return (
            f"{said} (the cluster's KubeRay is older than 1.5.1: update it, or set "
            "cluster.kubernetes.ray_auth: disabled)"
        )
    if "unknown field" in said:
        return f"{said} (it is misspelt in cluster.kubernetes.pod, head_pod or metadata, or newer than the cluster)"
    return said
