"""The hour: from a clone to an answer of one's own adapter, with the mistakes that new users make on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from tests.first_hour.checkout import clone, environment, reuse
from tests.first_hour.inputs import SYSTEM, write_chats
from tests.first_hour.user import User
from tests.support.terminal import Terminal

INSTALLS_S = 1800.0
"""How long pip, which is told to be quiet, may take to install everything."""
Chapter = Callable[[User], None]


def quickstart(user: User) -> None:
    """The README's first command, and one that it prints at its end."""
    user.does("make quickstart", "held-out questions: 0 before, 48 after", silent_s=INSTALLS_S)
    user.talks(user.copies(r"\S*muster chat .*"), "Where does Rosa live?")


def recipe(user: User) -> None:
    """A recipe for a model and data of one's own, and what can be asked before it trains."""
    user.does(". .venv/bin/activate")
    user.does("muster --help", "Write and check a recipe:", fits=True)
    user.errs("muster init --model tiny-llama --data chat.jsonl > my.yaml", "did you mean 'chats.jsonl'?")
    user.does("muster init --model tiny-llama --data chats.jsonl > my.yaml")
    user.does("cat my.yaml", "path: chats.jsonl", fits=True)
    user.does("muster preview my.yaml", SYSTEM, "3 rows: 3 samples", fits=True)
    user.does("sed 's/lora /qlora/; s/lr:/learning_rate:/' my.yaml > theirs.yaml")
    user.errs("muster validate theirs.yaml", "lora (with model.quantization: nf4)", "write optimizer.lr", "2 mistakes")
    user.errs("muster validate my.yaml data.chat_template=chatlm", "did you mean 'chatml'?")
    user.does("muster validate my.yaml", "ok  my.yaml", fits=True)
    user.does("muster plan my.yaml", "peak on the device", fits=True)


def training(user: User) -> None:
    """A run that is interrupted and resumed, and what is done with its adapter."""
    user.errs("muster run my.yml", "did you mean 'my.yaml'?")
    user.errs("muster run my.yaml 'data.train.0.columns={messages: talks}'", "columns: conversations")
    user.interrupts(
        "muster run my.yaml name=mine", r"step \d+/\d+", "the same command resumes from the newest checkpoint"
    )
    user.errs("muster run my.yaml name=mine optimizer.lr=1e-3", "another recipe", "0.0002 -> 0.001", "another name")
    user.does("muster run my.yaml name=mine", "continues after step ", "finished: the adapter is")
    chat, report = user.copies(r"^muster chat .*"), user.copies(r"^muster report .*")
    user.does("muster status runs/mine", "mine  succeeded  2 attempts")
    user.talks(chat, "Where does Carlo live?")
    user.does(report, "mine.html", fits=True)
    user.does("ls runs/mine/adapter", "adapter_model.safetensors")


def plain(user: User) -> None:
    """The way from two files to an answer without a mistake, in a storage without prepared data."""
    user.does("muster init --model tiny-llama --data chats.jsonl > plain.yaml")
    user.does("muster preview plain.yaml")
    user.does("muster validate plain.yaml")
    user.does("muster plan plain.yaml")
    user.does("muster run plain.yaml storage=plain-runs")
    user.talks(user.copies(r"^muster chat .*"), "Where does Carlo live?")


def play(
    folder: Path,
    chapters: Sequence[Chapter],
    make_base: Callable[[Path], object],
    venv: Path | None = None,
    tell: Callable[[str], None] = print,
) -> User:
    """Plays the chapters on a clone in ``folder``; returns the user with the steps taken. ``venv``: an environment
    whose libraries are used; without it, `make quickstart` installs them. ``tell`` gets the terminal's lines."""
    checkout = clone(folder)
    if venv is not None:
        reuse(venv, checkout)
    write_chats(checkout / "chats.jsonl")
    make_base(checkout / "tiny-llama")
    terminal = Terminal(checkout, environment(folder / "home"))
    user = User(terminal, tell)
    try:
        for chapter in chapters:
            chapter(user)
    finally:
        terminal.close()
    return user
