"""Adapters that are sent to a host: complete or absent, by their name, with the key, within bounds."""

from __future__ import annotations

import errno
import http.client
import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest

from tests.support.waiting import wait_for
from trainer.errors import EngineFailed, InputError
from trainer.inference import receiver
from trainer.inference.host import API_KEY, HostState
from trainer.inference.host_client import HostClient, find_host
from trainer.inference.patience import Bounds
from trainer.inference.receiver import FILES, AdapterFolder, AdapterReceiver, Refused

KEY = "a-key-of-this-test"
QUICK = Bounds(connect_s=2.0, answer_s=10.0, patience_s=2.0, first_wait_s=0.01, longest_wait_s=0.05)


class Place(NamedTuple):
    folder: Path
    service: AdapterReceiver
    state: HostState

    def there(self) -> list[str]:
        """Everything in the folder, hidden folders too."""
        return sorted(path.name for path in self.folder.iterdir())

    def client(self, key: str | None = KEY) -> HostClient:
        found = find_host(self.service.address, QUICK, key)
        assert found is not None
        return found

    def put(self, path: str, files: Any, body: bytes, key: str = KEY, length: int | None = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection(urlsplit(self.service.address).netloc, timeout=10)
        headers = {"Authorization": f"Bearer {key}", FILES: files if isinstance(files, str) else json.dumps(files)}
        connection.request("PUT", path, body, {**headers, "Content-Length": str(length or len(body))})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    folder = tmp_path / "received"
    state = HostState(port=1234, folder=str(folder), state="ready", why="", log="")
    service = AdapterReceiver("127.0.0.1", 0, KEY, AdapterFolder(folder), lambda: state)
    service.start()
    yield Place(folder, service, state)
    service.close()


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"r": 8}')
    (folder / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 20_000)
    (folder / "README.md").write_text("not sent")
    return folder


def test_an_adapter_arrives_complete_and_is_removed(place: Place, adapter: Path) -> None:
    client = place.client()
    assert client.server == "http://127.0.0.1:1234"
    client.send("run-1", adapter)
    arrived = Path(client.folder("run-1"))
    assert {path.name: path.read_bytes() for path in arrived.iterdir()} == {
        name: (adapter / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")
    }
    client.send("run-1", adapter)  # again, as after an answer that was lost
    assert place.there() == ["run-1"]
    client.remove("run-1")
    client.remove("run-1")
    assert place.there() == []


def test_an_adapter_that_is_sent_by_halves_is_not_there(place: Place) -> None:
    """The sender dies while it sends the weights."""
    host, port = urlsplit(place.service.address).netloc.split(":")
    files = json.dumps([["adapter_config.json", 2], ["adapter_model.safetensors", 10**7]])
    with socket.create_connection((host, int(port))) as connection:
        head = f"PUT /adapters/a HTTP/1.1\r\nAuthorization: Bearer {KEY}\r\n{FILES}: {files}\r\n"
        connection.sendall(f"{head}Content-Length: {10**7 + 2}\r\n\r\n".encode() + b"{}" + bytes(10**6))
        wait_for(lambda: any(place.folder.glob(".part-*/adapter_model.safetensors")), "the first bytes")
        assert not (place.folder / "a").exists()
    wait_for(lambda: place.there() == [], "the removal of the part")


BAD_NAMES = ["..", "../a", "a/b", "/etc/a", "a%2fb", ".hidden", "", "a" * 201, "a b"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_stays_in_the_folder(place: Place, name: str) -> None:
    path = f"/adapters/{name}".replace(" ", "%20")
    status, answer = place.put(path, [["adapter_config.json", 2]], b"{}")
    assert status == 400, answer
    assert place.there() == []
    with pytest.raises(Refused):
        place.service.adapters.remove(name)


@pytest.mark.parametrize(
    ("files", "body", "said"),
    [
        ([["../x.json", 2]], b"{}", "is no file of an adapter"),
        ([["a/x.json", 2]], b"{}", "is no file of an adapter"),
        ([["adapter_model.bin", 2]], b"{}", "is no file of an adapter"),
        ([["x.json", 1], ["x.json", 1]], b"{}", "each once"),
        ([], b"", "one file or more"),
        ([["x.json", 3]], b"{}", "has 2 bytes"),
        ([["x.json", -2]], b"{}", "no list of names and sizes"),
        ([["x.json", 2.0]], b"{}", "no list of names and sizes"),
        ("[[", b"{}", "no list of names and sizes"),
        ("7", b"{}", "no list of names and sizes"),
    ],
)
def test_what_is_no_adapter_is_refused(place: Place, files: Any, body: bytes, said: str) -> None:
    status, answer = place.put("/adapters/a", files, body)
    assert status == 400
    assert said in answer["error"]["message"]
    assert place.there() == []


def test_another_key_changes_nothing(place: Place, adapter: Path) -> None:
    status, _ = place.put("/adapters/a", [["adapter_config.json", 2]], b"{}", key="another")
    assert status == 401
    assert place.there() == []
    for key in (None, "another"):
        with pytest.raises(InputError, match=f"wants another key: the key is missing or wrong; set {API_KEY}"):
            place.client(key)


def test_an_adapter_that_is_too_large_is_refused_before_it_is_read(place: Place, adapter: Path) -> None:
    place.service.adapters._most_bytes = 1000
    with pytest.raises(InputError, match=r"413: the adapter has \d+ bytes, and 1000 are the most"):
        place.client().send("a", adapter)
    assert place.there() == []


def test_a_full_disk_is_named(place: Place, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, size: int, read: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(receiver, "_copy", full)
        with pytest.raises(InputError, match=r"507: .*received on .* has no room for the adapter a: No space left"):
            place.client().send("a", adapter)
    usage = shutil.disk_usage(place.folder)
    monkeypatch.setattr(receiver.shutil, "disk_usage", lambda folder: usage._replace(free=100))
    with pytest.raises(InputError, match=r"507: .* has 100 bytes free, and the adapter has \d+"):
        place.client().send("a", adapter)
    assert place.there() == []


def test_a_sender_that_stops_is_cut_off(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiver, "HEADERS_S", 0.3)
    monkeypatch.setattr(receiver, "UPLOAD_S", 0.3)
    host, port = urlsplit(place.service.address).netloc.split(":")
    files = json.dumps([["adapter_config.json", 100]])
    head = f"PUT /adapters/a HTTP/1.1\r\nAuthorization: Bearer {KEY}\r\n{FILES}: {files}\r\nContent-Length: 100\r\n\r\n"
    for begun in ("PUT /adapters/a HT", head):
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(begun.encode())
            while connection.recv(1000):
                pass
    wait_for(lambda: place.there() == [], "the removal of the part")


def test_only_the_newest_adapters_are_kept(place: Place, adapter: Path) -> None:
    client = place.client()
    for number in range(receiver.NEWEST + 3):
        client.send(f"run-{number:02d}", adapter)
    assert place.there() == [f"run-{number:02d}" for number in range(3, receiver.NEWEST + 3)]


def test_the_watch_names_why_a_server_was_given_up(place: Place) -> None:
    client = place.client()
    assert not client.watch()
    place.state.update(state="failed", why="it was started again 3 times", log="CUDA out of memory")
    with pytest.raises(EngineFailed, match=r"given its server up: it was started again 3 times\n.*out of memory"):
        client.watch()


def test_the_watch_waits_for_a_server_that_starts_again(place: Place) -> None:
    place.state["state"] = "starting"
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            place.state["state"] = "ready"

    clock = iter(range(100))
    client = HostClient(place.service.address, place.state, QUICK, KEY, sleep=sleep, clock=lambda: next(clock))
    assert client.watch()
    assert len(waits) == 3


def test_a_host_that_has_gone_is_given_up_soon(place: Place) -> None:
    client = place.client()
    place.service.close()
    with pytest.raises(EngineFailed, match=r"the host of the vLLM server http://127\.0\.0\.1:1234 has gone"):
        client.watch()


def test_an_inference_server_is_no_host(tiny_model: Path) -> None:
    from tests.support.fake_vllm import FakeVLLM, serving

    fake = FakeVLLM(tiny_model)
    with serving(fake):
        assert find_host(fake.address, QUICK, None) is None
    fake = FakeVLLM(tiny_model, api_key=KEY)
    with serving(fake):
        assert find_host(fake.address, QUICK, "another") is None, "its own check names the key"
