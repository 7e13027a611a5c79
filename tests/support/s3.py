"""An S3 server of our own (moto) for tests: one process per session, emptied before each test that uses it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tests.support.waiting import free_port, listening, wait_for

BUCKETS = ("corpus", "models", "runs")
# The secret is searched for in logs and stored objects: it must not be a word that occurs by itself.
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test-key",
    "AWS_SECRET_ACCESS_KEY": "test-secret-5c1e9b",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@dataclass(frozen=True)
class S3:
    """A running server. ``env`` is what a process needs in its environment to reach it."""

    endpoint: str

    @property
    def env(self) -> Mapping[str, str]:
        return {"AWS_ENDPOINT_URL": self.endpoint, **CREDENTIALS}

    def filesystem(self) -> Any:
        """A new s3fs of its own, without listing cache."""
        import s3fs

        return s3fs.S3FileSystem(
            endpoint_url=self.endpoint,
            key=CREDENTIALS["AWS_ACCESS_KEY_ID"],
            secret=CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
            use_listings_cache=False,
            skip_instance_cache=True,
        )

    def reset(self, buckets: tuple[str, ...] = BUCKETS) -> None:
        """Drop every bucket and object, then make ``buckets``."""
        request = urllib.request.Request(f"{self.endpoint}/moto-api/reset", method="POST")
        urllib.request.urlopen(request, timeout=20).close()
        fs = self.filesystem()
        for bucket in buckets:
            fs.mkdir(bucket)


@contextmanager
def serve(address: str = "127.0.0.1") -> Iterator[S3]:
    """Start moto_server on a free port of ``address``; ended with the block."""
    port = free_port()
    with tempfile.TemporaryFile() as log:
        command = [sys.executable, "-m", "moto.server", "-H", address, "-p", str(port)]
        server = subprocess.Popen(command, stdout=log, stderr=log)

        def started() -> bool:
            assert server.poll() is None, f"moto_server ended with {server.returncode} at its start"
            return listening(port, address)

        try:
            wait_for(started, f"moto_server on {address}:{port}", timeout_s=60)
            yield S3(f"http://{address}:{port}")
        finally:
            server.terminate()
            server.wait(20)
