"""What a rank prints is kept, bounded, also when it is killed in the middle; and can be read while it grows."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.storage.doubles import faulty, unreachable
from trainer.checkpoint import claim_attempt, claim_driver
from trainer.logs.keeper import KEEP_ATTEMPTS, Keeper, _redaction
from trainer.logs.parts import LogFeed, LogLines, LogParts, Passed, stored_parts
from trainer.redact import RedactedLines, Redactor
from trainer.run import layout
from trainer.storage import Storage, open_storage

ROOT = Path(__file__).resolve().parents[4]


def store(run: Storage, parts: LogParts, attempt: int = 1, rank: int = 0) -> None:
    """As the keeper does."""
    for offset, data in parts.dirty():
        run.write(layout.log_part(attempt, rank, offset), data)
        parts.stored(offset, len(data))
    dropped = parts.dropped()
    run.delete([layout.log_part(attempt, rank, offset) for offset in dropped])
    parts.deleted(dropped)


def whole(run: Storage, attempt: int = 1, rank: int = 0) -> str:
    return LogFeed(run).new([p for p in stored_parts(run) if (p.attempt, p.rank) == (attempt, rank)]).decode()


@pytest.mark.parametrize("every", [1, 3, 1000], ids=lambda every: f"stored every {every}")
def test_a_log_is_bounded_and_says_what_is_left_out(every: int) -> None:
    run, _ = faulty()
    parts = LogParts([], part_bytes=100, tail_parts=3)
    lines = [f"line {i:04d}\n" for i in range(300)]
    for i, line in enumerate(lines):
        parts.add(line.encode())
        if i % every == 0:
            store(run, parts)
    store(run, parts)
    assert len(run.list(layout.LOGS)) <= 4
    text = whole(run)
    begin, _, end = text.partition("… ")
    left_out, _, end = end.partition(" bytes are left out here …\n")
    assert begin == "".join(lines[:10])
    assert "".join(lines).endswith(end)
    assert len(end) >= 200
    assert int(left_out.replace(",", "")) == 3000 - len(begin) - len(end)


def test_a_second_try_of_an_attempt_goes_on_behind_the_first() -> None:
    run, _ = faulty()
    for text in (b"first\n", b"second\n"):
        parts = LogParts([(p.offset, p.size) for p in stored_parts(run)])
        parts.add(text)
        store(run, parts)
    assert whole(run) == "first\nsecond\n"


def test_a_feed_gives_what_is_new() -> None:
    run, _ = faulty()
    parts, feed = LogParts([], part_bytes=30), LogFeed(run)
    got = b""
    for i in range(20):
        parts.add(b"%d line\n" % i)
        store(run, parts)
        got += feed.new(stored_parts(run))
    assert got == b"".join(b"%d line\n" % i for i in range(20))
    assert feed.new(stored_parts(run)) == b""


def test_lines_are_whole_without_redrawn_states_and_secrets() -> None:
    lines = LogLines(RedactedLines(Redactor({"A_SECRET": "s3cr3t-value"})))
    assert lines.feed(b"10%\r20%\r30") == b""
    assert lines.feed(b"%\nkey s3cr3t") == b"30%\n"
    assert lines.feed(b"-value here\r\nrest") == b"key *** here\n"
    assert lines.end() == b"rest\n"
    assert lines.end() == b""
    assert len(lines.feed(b"x" * 70_000)) == 70_000, "a line without an end is not held for ever"


def test_what_is_passed_on_waits_for_the_rest_of_a_line() -> None:
    passed = Passed(RedactedLines(Redactor({"A_SECRET": "s3cr3t-value"})))
    assert passed.feed(b"one\nkey s3cr3t") == b"one\n"
    assert passed.feed(b"-value\r10%") == b"key ***\r"
    assert passed.rest() == b"10%"
    assert passed.rest() == b""
    assert len(passed.feed(b"x" * 70_000)) == 70_000, "a line without an end is not held for ever"


def test_a_part_that_is_let_go_while_it_is_written_is_deleted() -> None:
    parts = LogParts([], part_bytes=10, tail_parts=2)
    parts.add(b"0123456789")
    parts.add(b"0123456789")
    written = parts.dirty()
    for _ in range(4):
        parts.add(b"0123456789")
    for offset, data in written:
        parts.stored(offset, len(data))
    assert parts.dropped() == [10] == parts.dropped(), "until they are deleted"
    parts.deleted([10])
    assert parts.dropped() == []


def keeper(run: Storage) -> Keeper:
    made = Keeper("nowhere", 1, 0, os.getpid())
    made._storage, made._parts = run, LogParts([], part_bytes=100, tail_parts=3)
    return made


def test_a_keeper_whose_storage_is_away_holds_no_more_than_it_would_keep() -> None:
    run, backend = faulty(deadline_s=0.5)
    run.write(layout.log_part(1, 0, 0), b"of an earlier try\n")
    backend.before = unreachable
    kept = keeper(run)
    kept.store()
    for i in range(1000):
        kept.add(b"line %04d\n" % i)
    assert sum(len(data) for _, data in kept._parts.dirty()) <= 400
    backend.before = lambda verb, path: None
    kept.store()
    text = whole(run)
    assert text.startswith("of an earlier try\n")
    assert text.endswith("line 0999\n")
    assert len(run.list(layout.LOGS)) <= 4


def test_what_could_not_be_deleted_is_deleted_later() -> None:
    run, backend = faulty(deadline_s=0.5)
    kept = keeper(run)
    for i in range(40):
        kept.add(b"line %04d\n" % i)
        kept.store()
    backend.before = lambda verb, path: unreachable(verb, path) if verb == "delete" else None
    for i in range(40):
        kept.add(b"line %04d\n" % i)
    kept.store()
    backend.before = lambda verb, path: None
    kept.store()
    assert len(run.list(layout.LOGS)) <= 4


RANK = """
import logging, os, subprocess, sys, time
sys.path.insert(0, {root!r})
from trainer.logs.rank import rank_log
from trainer.storage import open_storage
logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
with rank_log(open_storage({run!r}), 3):
    print("printed by Python")
    os.write(2, b"written by a library\\n")
    subprocess.run(["echo", "printed by a child"])
    logging.getLogger("trainer.part").info("told to the log alone")
    logging.getLogger("trainer.part").warning("a warning, key %s", os.environ.get("MY_API_KEY"))
    {end}
print("after it")
"""
PRINTED = ["printed by Python", "written by a library", "printed by a child", "a warning, key"]


def run_rank(run: Storage, end: str) -> subprocess.CompletedProcess[str]:
    code = RANK.format(root=str(ROOT), run=run.url, end=end)
    environment = {**os.environ, "MY_API_KEY": "very-secret-key"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)


def await_text(run: Storage, text: str, attempt: int, rank: int) -> str:
    """A keeper outlives its rank for a moment."""
    deadline = time.monotonic() + 20
    while text not in (found := whole(run, attempt, rank)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


@pytest.fixture
def run(tmp_path: Path) -> Storage:
    made = open_storage(str(tmp_path / "run"))
    claim_attempt(made, claim_driver(made, {}), {})
    return made


def test_everything_that_a_rank_prints_is_kept_and_passed_on(run: Storage) -> None:
    done = run_rank(run, "pass")
    kept = whole(run, 2, 3)  # attempt 1 is claimed: the next one is being started
    assert all(text in kept for text in [*PRINTED, "told to the log alone", "attempt 2, rank 3"])
    assert "very-secret-key" not in kept
    assert "after it" not in kept
    assert done.returncode == 0
    shown = done.stdout + done.stderr
    assert all(text in shown for text in [*PRINTED, "after it"])
    assert "very-secret-key" not in shown
    assert "told to the log alone" not in shown
    assert done.stdout.splitlines()[-1] == "after it"


@pytest.mark.parametrize(
    ("end", "code", "text"),
    [
        ("os.kill(os.getpid(), 9)", -signal.SIGKILL, "a warning, key"),
        ("import faulthandler; faulthandler.enable(); os.abort()", -signal.SIGABRT, "Fatal Python error: Aborted"),
        ("raise ValueError('it broke')", 1, "ValueError: it broke"),
        ("os._exit(7)", 7, "a warning, key"),
    ],
    ids=["killed", "aborted", "raised", "exited"],
)
def test_a_crash_leaves_its_last_lines(run: Storage, end: str, code: int, text: str) -> None:
    done = run_rank(run, end)
    assert done.returncode == code
    kept = await_text(run, text, 2, 3)
    assert text in kept
    assert "printed by a child" in kept


def test_a_terminal_is_passed_no_control_characters() -> None:
    master, slave = os.openpty()
    reading, writing = os.pipe()
    try:
        data = b"\r\x1b[31m50%\x1b[0m \x1b]0;x\x07 token=abc\n"
        assert _redaction(slave)(data) == "\r\x1b[31m50%\x1b[0m ␛]0;x␇ token=***\n".encode()
        assert _redaction(writing)(data) == data.replace(b"abc", b"***")
    finally:
        for descriptor in (master, slave, reading, writing):
            os.close(descriptor)


def test_a_keeper_that_dies_holds_nothing_up(run: Storage) -> None:
    kill = (
        "import psutil; found = [p for p in psutil.process_iter(['cmdline']) if 'trainer.logs.keeper' in "
        f"(p.info['cmdline'] or []) and {run.url!r} in p.info['cmdline']]; assert len(found) == 1; found[0].kill(); "
        "time.sleep(0.5); print('x' * 200_000)"
    )
    done = run_rank(run, kill)
    assert done.returncode == 0
    assert "x" * 200_000 in done.stdout


def test_a_log_that_cannot_be_kept_is_a_warning(
    run: Storage, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.logs.rank import rank_log

    def no_process(*_: object, **__: object) -> None:
        raise OSError("no memory for another process")

    before = set(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(subprocess, "Popen", no_process)
    with rank_log(run, 0):
        assert set(os.listdir("/proc/self/fd")) == before
    assert "the log of rank 0 is not kept: no memory for another process" in caplog.text


def asked(run: Storage, backend: Any, rank: int, attempt: int) -> list[str]:
    """Returns the verbs of the requests with which a new keeper stores its first lines."""
    verbs: list[str] = []
    backend.before = lambda verb, path: verbs.append(verb)
    kept = Keeper("nowhere", attempt, rank, os.getpid(), 1024)
    kept._storage = run
    kept.add(b"a line\n")
    kept.store()
    kept.add(b"another\n")
    kept.store()
    backend.before = lambda verb, path: None
    return verbs


def test_a_keeper_lists_no_logs_of_the_other_ranks() -> None:
    run, backend = faulty(deadline_s=0.5)
    assert asked(run, backend, 7, 1) == ["read", "put", "put"]
    assert whole(run, 1, 7) == "a line\nanother\n"


def test_rank_0_deletes_what_all_ranks_have_stored_in_old_attempts_once() -> None:
    run, backend = faulty(deadline_s=0.5)
    for attempt in (1, 2, KEEP_ATTEMPTS + 1):
        for rank in (0, 5):
            run.write(layout.log_part(attempt, rank, 0), b"old\n")
    assert "delete" not in asked(run, backend, 5, KEEP_ATTEMPTS + 2)
    verbs = asked(run, backend, 0, KEEP_ATTEMPTS + 2)
    assert (verbs.count("list"), verbs.count("delete")) == (1, 4)
    assert {part.attempt for part in stored_parts(run)} == {KEEP_ATTEMPTS + 1, KEEP_ATTEMPTS + 2}
