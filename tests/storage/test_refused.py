"""What S3 refuses, as the command line says it: one sentence, exit code 2, and no credential in it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from launcher.cli.app import main
from tests.support.s3 import CREDENTIALS, S3
from tests.support.training import small_recipe, write_pairs
from tests.support.waiting import free_port
from trainer.recipe import dump

BODY = "<Error><Code>{code}</Code><Message>Refused for a test.</Message><AWSAccessKeyId>{key}</AWSAccessKeyId></Error>"
Ended = tuple[int, str]


@pytest.fixture
def muster(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ended]:
    """Calls the program in this process: exit code, and what it printed anywhere."""

    def call(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["muster", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), "".join(capsys.readouterr())

    return call


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Writes a recipe that is good but for the changes, and returns its path."""
    monkeypatch.setenv("MUSTER_CACHE", str(tmp_path / "cache"))
    write_pairs(tmp_path / "data" / "a.jsonl", 20)

    def write(**changes: object) -> str:
        path = tmp_path / "r.yaml"
        path.write_text(dump(small_recipe("refused", tiny_model, tmp_path, **changes)))
        return str(path)

    return write


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """The inputs are checked before Ray is started."""

    def started(*told: object) -> None:
        pytest.fail("Ray is started")

    monkeypatch.setattr("launcher.raytrain.runner.RayRunner.__init__", started)


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """An S3 that answers everything with 403 and the error code that it was given."""
    codes = [""]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def refuse(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = BODY.format(code=codes[0], key=CREDENTIALS["AWS_ACCESS_KEY_ID"]).encode()
            self.send_response(403)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = refuse

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    for name, value in S3(f"http://127.0.0.1:{server.server_address[1]}").env.items():
        monkeypatch.setenv(name, value)
    yield lambda code: codes.__setitem__(0, code)
    server.shutdown()
    server.server_close()
    thread.join()


def assert_sentence(ended: Ended, *said: str) -> None:
    code, output = ended
    assert code == 2, output
    last = output.strip().splitlines()[-1]
    for part in said:
        assert part in last
    assert "Traceback" not in output
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        assert CREDENTIALS[name] not in output
    assert ".probe" not in output


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("InvalidAccessKeyId", "did not accept the credentials for s3://"),
        ("SignatureDoesNotMatch", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        ("ExpiredToken", "AWS_SESSION_TOKEN"),
        ("AccessDenied", "no permission for s3://"),
    ],
)
@pytest.mark.parametrize(
    ("place", "path"),
    [("storage", "s3://runs"), ("model.path", "s3://models/m"), ("data.train.0.path", "s3://corpus/*")],
)
def test_refused_credentials(
    refusing: Callable[[str], None],
    muster: Callable[..., Ended],
    recipe: Callable[..., str],
    code: str,
    said: str,
    place: str,
    path: str,
) -> None:
    refusing(code)
    train = [{"path": "s3://corpus/*.jsonl", "format": "completion"}]
    changes = {"data.train": train} if place.startswith("data") else {place: path}
    assert_sentence(muster("validate", "--inputs", recipe(**changes)), said)


@pytest.mark.parametrize("command", ["ls", "status"])
def test_refused_looks(refusing: Callable[[str], None], muster: Callable[..., Ended], command: str) -> None:
    refusing("InvalidAccessKeyId")
    assert_sentence(muster(command, "s3://runs/a"), "did not accept the credentials for s3://runs/a")


@pytest.mark.usefixtures("no_ray")
def test_a_run_on_a_storage_that_refuses(
    refusing: Callable[[str], None], muster: Callable[..., Ended], recipe: Callable[..., str]
) -> None:
    refusing("SignatureDoesNotMatch")
    assert_sentence(muster("run", recipe(storage="s3://runs")), "did not accept the credentials for s3://runs")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"storage": "s3://not-there/x"}, "the bucket s3://not-there does not exist; create it"),
        ({"model.path": "s3://not-there/x"}, "the bucket s3://not-there does not exist"),
        ({"model.path": "s3://models/none"}, "model.path 's3://models/none' holds no config.json"),
        (
            {"data.train": [{"path": "s3://not-there/*.jsonl", "format": "completion"}]},
            "the bucket s3://not-there does not exist",
        ),
        (
            {"data.train": [{"path": "s3://corpus/none/*.jsonl", "format": "completion"}]},
            "data source s3://corpus/none/*.jsonl: nothing there matches",
        ),
    ],
)
@pytest.mark.usefixtures("no_ray")
def test_what_is_not_there(
    moto: S3, muster: Callable[..., Ended], recipe: Callable[..., str], changes: dict[str, object], said: str
) -> None:
    assert_sentence(muster("run", recipe(**changes)), said)


@pytest.mark.usefixtures("no_ray")
def test_no_credentials_at_all(
    moto: S3, muster: Callable[..., Ended], recipe: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    assert_sentence(muster("run", recipe(storage="s3://runs")), "Unable to locate credentials", "set AWS_ACCESS_KEY_ID")


def test_an_endpoint_that_is_no_url(muster: Callable[..., Ended], moto: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:9000")
    assert_sentence(muster("ls", "s3://runs"), "AWS_ENDPOINT_URL is 'localhost:9000', which is no URL")


def test_an_endpoint_where_nobody_answers(
    muster: Callable[..., Ended], moto: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setattr("launcher.cli.status.LOOK_DEADLINE_S", 5.0)
    code, output = muster("ls", "s3://runs")
    assert code == 1
    assert f"http://127.0.0.1:{port}" in output
    assert "Traceback" not in output


def test_weights_in_s3_are_checked_by_their_headers(
    moto: S3, tiny_model: Path, muster: Callable[..., Ended], recipe: Callable[..., str]
) -> None:
    fs = moto.filesystem()
    fs.put(str(tiny_model), "models/tiny", recursive=True)
    path = recipe(**{"model.path": "s3://models/tiny"})
    code, output = muster("validate", "--inputs", path)
    assert code == 0, output
    whole = fs.cat_file("models/tiny/model.safetensors")
    fs.pipe_file("models/tiny/model.safetensors", whole[:-1])
    assert_sentence(muster("validate", "--inputs", path), "s3://models/tiny/model.safetensors is torn")
