from __future__ import annotations

import faulthandler
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# Before torch is imported: tiny matrices gain nothing from more threads, and threads that wait for each other on a busy
# machine made tests twenty times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# As in an environment that is activated: commands are printed with the name `muster` only if the shell finds it.
os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

from tests.support.s3 import S3, serve

# An example may take as long as a busy machine makes it.
hypothesis.settings.register_profile("muster", deadline=None)
hypothesis.settings.load_profile("muster")
# Under nohup, processes that the tests start would ignore SIGHUP as well, as they should.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rewrite-golden", action="store_true", help="write the losses in tests/golden anew")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    if config.getvalue("dist") != "loadscope":
        return None
    from tests.support.sharing import Sharing

    return Sharing(config, log)


@pytest.fixture(autouse=True)
def longer_than_faulthandler(request: pytest.FixtureRequest) -> None:
    """Lets a test have a longer time-out of its own, or none (0): faulthandler would end its process before."""
    own = request.node.get_closest_marker("timeout")
    if own is not None and not 0 < own.args[0] <= float(request.config.getini("faulthandler_timeout")):
        faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="session")
def rewrite_golden(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--rewrite-golden"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an untrained Llama (hidden 64, 2 layers) and its tokenizer. Treat it as read-only."""
    from launcher.testing.models import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def moto_server() -> Iterator[S3]:
    """The session's S3 server; tests ask for ``moto``, which empties it first."""
    with serve() as server:
        yield server


@pytest.fixture
def moto(moto_server: S3, monkeypatch: pytest.MonkeyPatch) -> S3:
    """An empty S3 with the buckets corpus, models and runs; AWS_* in this process's environment point at it."""
    import s3fs

    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in moto_server.env.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    moto_server.reset()
    return moto_server
