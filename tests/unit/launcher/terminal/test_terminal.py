"""Nothing that a row, an event or a host's name holds acts on a terminal, and a reader that goes away is no failure."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.table import Table
from rich.text import Text

import launcher.cli.prepare
import launcher.driver.driver
from launcher.cli.app import main
from launcher.cli.generate import Shown
from launcher.monitor.progress import LiveLine, Progress
from launcher.terminal.console import READER_GONE, Console, MessageStream, Results, own_streams, stderr, stdout
from tests.support.made_up_run import make_up
from tests.support.training import small_recipe
from trainer.errors import WorkerFailed
from trainer.progress.texts import AttemptStatus
from trainer.recipe import dump
from trainer.run import layout
from trainer.run.failure import Failure
from trainer.run.jsonl import Events
from trainer.run.lease import Holder, LeaseRecord, to_row
from trainer.storage import Storage, open_storage
from trainer.terminal import neutralise, neutralise_output

ROOT = Path(__file__).resolve().parents[4]
EVIL = "a\x1b[2J\x1b]0;owned\x07\x1b]52;c;ZXZpbA==\x07\x1b]8;;http://x\x1b\\b\x9b1Ac\u202ed\u2066e\x7ff\x00g"
ACTS = {chr(c) for c in (*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))} - {
    "\n",
    "\t",
}


def acting(text: str) -> set[str]:
    return ACTS & set(text)


class Tty(io.StringIO):
    """A terminal, as far as a program can tell."""

    def isatty(self) -> bool:
        return True


class Bare(io.TextIOWrapper):
    """A file or a pipe, with its bytes."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8", newline="")

    def getvalue(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode()  # type: ignore[attr-defined, no-any-return]


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def muster(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Calls the program in this process, on a terminal or with both streams in files: code, stdout and stderr."""

    def call(*arguments: str, terminal: bool) -> tuple[int, str, str]:
        monkeypatch.setenv("TERM", "dumb")  # without colours, which are rich's own escapes
        out, err = (Tty(), Tty()) if terminal else (Bare(), Bare())
        for name, value in (("argv", ["muster", *arguments]), ("stdout", out), ("stderr", err)):
            monkeypatch.setattr(sys, name, value)
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), out.getvalue(), err.getvalue()

    return call


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """A run that has failed, with evil in its events, its host, its job, and its logs."""
    made = open_storage(str(tmp_path_factory.mktemp("runs") / "evil"))
    make_up(made, ended="failed")
    events = Events(made, 3, "driver1")
    failure = Failure(f"rank 0 on {EVIL}: {EVIL}", rank=0, host=EVIL, trace=EVIL)
    events.emit(failure.event(EVIL, retried=False, driver=1))
    events.close()
    holder = Holder(EVIL, "boot/1", 4711, 1000.0, f"slurm:{EVIL}")
    made.write_json(layout.LEASE, to_row(LeaseRecord(1, "failed", holder, 1e9, 7)))
    made.write(layout.log_part(3, 0, 0), f"\x1b[31m{EVIL}\x1b[0m\n10%\r20%\n".encode())
    return made


def test_what_is_made_visible() -> None:
    assert neutralise("a\x1b[31mb\n\tc\r\x08\x00\x7f") == "a␛[31mb\n\tc␍␈␀␡"
    assert neutralise("\x9b\u202e\u2066\u200f\u2028\udc80") == "\ufffd" * 6
    assert neutralise("é 日本 👩\u200d💻 …") == "é 日本 👩\u200d💻 …"
    assert not acting(neutralise(EVIL))
    assert len(neutralise(EVIL)) == len(EVIL)


def test_libraries_keep_their_colours_and_bars() -> None:
    assert neutralise_output("\r\x1b[1;31m50%\x1b[0m\x1b[2K\x1b]0;x\x07") == "\r\x1b[1;31m50%\x1b[0m␛[2K␛]0;x␇"


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "file"])
def test_a_run_as_it_is_shown(muster: Run, run: Storage, terminal: bool) -> None:
    code, out, _ = muster("status", run.url, terminal=terminal)
    assert code == 0
    assert "␛[2J" in out
    assert not acting(out)
    code, out, _ = muster("ls", run.url.rpartition("/")[0], terminal=terminal)
    assert (code, acting(out)) == (0, set())


def test_json_escapes_by_itself(muster: Run, run: Storage) -> None:
    for terminal in (True, False):
        code, out, _ = muster("status", run.url, "--json", terminal=terminal)
        assert code == 0
        assert "\\u001b[2J" in out
        assert not acting(out)


def test_logs_are_exact_in_a_file_and_harmless_on_a_terminal(muster: Run, run: Storage) -> None:
    assert muster("logs", run.url, terminal=False)[1] == f"\x1b[31m{EVIL}\x1b[0m\n10%\r20%\n"
    assert muster("logs", run.url, terminal=True)[1] == f"{neutralise(EVIL)}\n20%\n"


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "file"])
def test_bad_rows(muster: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    bad = {"url": EVIL, "place": EVIL, "reason": EVIL}
    counts = dict.fromkeys(launcher.cli.prepare.COLUMNS, 1)
    lengths = {"bins": [], "median": 1, "p95": 1, "longest": 1}
    source = {"path": EVIL, "format": "text", "warnings": [EVIL], **counts}
    part = {"uri": EVIL, "bad": [bad], "sources": [source], "lengths": lengths, "packs": 1, "fill": None, **counts}
    found = {"train": part, "sequence_length": 1, "total_steps": 1}

    def prepare(recipe: Any, progress: Progress, processes: int) -> Any:
        progress.phase(f"looking at {EVIL}")
        return found

    monkeypatch.setattr(launcher.cli.prepare, "prepare_recipe", prepare)
    (tmp_path / "r.yaml").write_text(dump(small_recipe("evil", tmp_path / "model", tmp_path)))
    code, out, err = muster("prepare", str(tmp_path / "r.yaml"), terminal=terminal)
    assert code == 0, err
    assert out.count("␛]0;owned") == 6  # rich itself leaves the bell out
    assert "looking at a␛[2J" in err
    assert not acting(out + err)


@pytest.mark.parametrize(
    "arguments",
    [
        ["status", "/a\x1b[2J\u202e/b"],
        ["ls", "/a\x1b[2J\u202e/b"],
        ["validate", "{recipe}"],
        ["validate", EVIL],
        ["run", "{recipe}"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_what_is_wrong(muster: Run, tmp_path: Path, arguments: list[str]) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text('"a\\e[2J\\u202e": 1\nname: "b\\e]0;x\\a"\n', encoding="utf-8")
    given = [argument.replace("{recipe}", str(recipe)).replace("\x00", "") for argument in arguments]
    code, out, err = muster(*given, terminal=True)
    assert (code, out) == (2, "") if arguments[0] != "ls" else (0, "")
    assert "␛[2J" in err
    assert not acting(err)


def test_a_command_line_that_is_wrong(muster: Run) -> None:
    code, _, err = muster(EVIL.replace("\x00", ""), terminal=True)
    assert code == 2
    assert not acting(err)


@pytest.mark.parametrize("error", [WorkerFailed(EVIL), ValueError(EVIL)], ids=["foreseen", "unforeseen"])
def test_an_error_and_a_warning(muster: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def drive(*_: object, **__: object) -> list[str]:
        logging.getLogger("trainer").warning("warned of %s", EVIL)
        print(f"a library said {EVIL}", file=sys.stderr)
        raise error

    monkeypatch.setattr(launcher.driver.driver, "run_together", drive)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's own are there instead of the program's
    (tmp_path / "r.yaml").write_text(dump(small_recipe("evil", tmp_path / "model", tmp_path)))
    code, out, err = muster("run", str(tmp_path / "r.yaml"), terminal=True)
    assert (code, out) == (1, "")
    assert "warned of a␛[2J" in err
    assert "a library said a␛[2J" in err
    assert ("Traceback" in err) == isinstance(error, ValueError)
    assert not acting(err)


def test_an_answer_token_by_token(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream, expected in ((Tty(), neutralise("\x1b[2J\x1b[31mred\u202e")), (Bare(), "\x1b[2J\x1b[31mred\u202e")):
        monkeypatch.setattr(sys, "stdout", stream)
        with own_streams():
            show = Shown(SimpleNamespace(ended=lambda text: False, certain=lambda text: text))  # type: ignore[arg-type]
            for piece in ("\x1b", "[2", "J", "\x1b[31m", "red", "\u202e"):
                show(piece)
        assert stream.getvalue() == expected


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "file"])
def test_the_live_line(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "400")
    stream = Tty() if terminal else Bare()
    monkeypatch.setattr(sys, "stderr", stream)
    with own_streams():
        progress = Progress(stderr())
        progress.warn(EVIL)
        line = LiveLine()
        line.standing = AttemptStatus(1, 2, 1.0, 1.0, 1.0, 1, None, hosts=(EVIL,))
        progress.console.print(line)
    shown = stream.getvalue()
    assert shown.count("␛]0;owned") == 2
    assert not any(evil in shown for evil in ("\x1b[2J", "\x1b]", "\x9b", "\u202e", "\x07"))


def test_a_table_keeps_its_width_and_its_styles() -> None:
    stream = io.StringIO()
    console = Console(stream, results=True, width=20, color_system="standard", force_terminal=True)
    table = Table("name", title=Text(EVIL))
    table.add_row(Text(EVIL, style="red"))
    table.add_row("[bold]:smile:")
    console.print(table)
    lines = stream.getvalue().splitlines()
    assert any("\x1b[31m" in line for line in lines), "the program's own style"
    assert any("[bold]:smile:" in line for line in lines)
    assert all(len(Text.from_ansi(line).plain) <= 20 for line in lines)


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Makes a stream a pipe whose reader has gone."""
    opened: list[Any] = []

    def close(name: str) -> None:
        reading, writing = os.pipe()
        os.close(reading)
        opened.append(os.fdopen(writing, "w"))
        monkeypatch.setattr(sys, name, opened[-1])

    yield close
    for stream in opened:
        stream.close()


@pytest.mark.parametrize(
    "arguments",
    [
        ["status", "{run}"], ["status", "{run}", "--json"], ["ls", "{storage}"], ["ls", "{storage}", "--json"],
        ["logs", "{run}"], ["schema"], ["matrix"], ["matrix", "--json"], ["render", "{recipe}", "--on", "local"],
        ["render", "{recipe}"], ["render", "{recipe}", "--on", "kubernetes"], ["convert", "axolotl", "{theirs}"],
        ["--help"], ["status", "--help"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_reader_that_has_gone_ends_a_command_quietly(
    arguments: list[str], run: Storage, tmp_path: Path, nobody: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "r.yaml").write_text(dump(small_recipe("r", tmp_path / "model", tmp_path)))
    (tmp_path / "theirs.yml").write_text(
        "base_model: a/b\nlearning_rate: 1e-4\ndatasets: [{path: a/b, type: alpaca}]\n"
    )
    places = {"run": run.url, "storage": run.url.rpartition("/")[0], "recipe": tmp_path / "r.yaml"}
    given = [argument.format(**places, theirs=tmp_path / "theirs.yml") for argument in arguments]
    err = io.StringIO()
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(sys, "argv", ["muster", *given])
    nobody("stdout")
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == READER_GONE
    assert "rror" not in err.getvalue()


@pytest.mark.parametrize(("recipe", "code"), [("r.yaml", 0), ("none.yaml", 2)])
def test_nobody_who_reads_messages_ends_nothing(
    recipe: str, code: int, tmp_path: Path, nobody: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "r.yaml").write_text(dump(small_recipe("r", tmp_path / "model", tmp_path)))
    monkeypatch.setattr(sys, "argv", ["muster", "validate", str(tmp_path / recipe)])
    nobody("stderr")
    with pytest.raises(SystemExit) as ended:
        main()
    assert int(ended.value.code or 0) == code


def test_what_fails_keeps_its_code_when_its_reader_has_gone(
    nobody: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    nobody("stdout")

    def fail() -> None:
        with own_streams():
            print("in the buffer")
            sys.exit(2)

    with pytest.raises(SystemExit) as ended:
        fail()
    assert ended.value.code == 2


@pytest.mark.parametrize("arguments", [["--version-of-nothing"], ["schema"], ["matrix", "--json"]], ids=" ".join)
def test_the_end_of_the_interpreter_says_nothing_of_it(arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "launcher", *arguments]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=120)
    os.close(writing)
    assert done.returncode == (2 if arguments[0].startswith("--") else READER_GONE)
    assert "Exception ignored" not in done.stderr
    assert "BrokenPipe" not in done.stderr
    assert "Traceback" not in done.stderr


def test_streams_that_are_closed_are_left() -> None:
    command = f"{sys.executable} -m launcher schema >&- 2>&-"
    assert subprocess.run(command, shell=True, cwd=ROOT, timeout=120).returncode == 0


def test_the_streams_are_given_back() -> None:
    before = sys.stdout, sys.stderr
    with own_streams():
        assert isinstance(sys.stdout, Results)
        assert isinstance(sys.stderr, MessageStream)
        assert stdout().file is before[0]
    assert (sys.stdout, sys.stderr) == before


def test_deepspeed_says_nothing_when_a_library_imports_it(capfd: pytest.CaptureFixture[str]) -> None:
    code = (
        "from launcher.terminal.console import hush_libraries; hush_libraries(); "
        "from deepspeed.accelerator import get_accelerator; print(get_accelerator()._name)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**environment, "CUDA_VISIBLE_DEVICES": ""}, check=True)
    assert capfd.readouterr().out == "cpu\n"
