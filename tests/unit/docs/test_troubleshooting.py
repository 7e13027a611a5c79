"""docs/troubleshooting.md goes by what is printed: every message that it quotes stands in the sources. docs/watching.md
shows events as they are drawn."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from trainer.progress.texts import event_text
from trainer.run.events import StartEvent
from trainer.run.failure import Failure

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "troubleshooting.md"
PARTS = ("launcher", "trainer", "cluster")
GAP = "…"
SECTION = re.compile(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", flags=re.S | re.M)


def messages() -> list[str]:
    """Every text of the sources but what explains them, with a gap where a value is filled in; texts that stand side by
    side are one."""
    found = []
    for part in PARTS:
        for file in sorted((ROOT / part).rglob("*.py")):
            nodes = list(ast.walk(ast.parse(file.read_text())))
            explaining = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
            for node in nodes:
                if id(node) in explaining:
                    continue
                if isinstance(node, ast.JoinedStr):
                    found.append("".join(str(p.value) if isinstance(p, ast.Constant) else GAP for p in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


def rows(title: str) -> list[str]:
    """What is seen, of each row of a section's table."""
    (body,) = [body for name, body in SECTION.findall(PAGE.read_text()) if name == title]
    return [line.split("|")[1].strip() for line in body.splitlines() if line.startswith("| ")][1:]


def quoted(seen: str) -> list[str]:
    return re.findall(r"`([^`]+)`", seen)


def is_said(text: str, said: list[str]) -> bool:
    """In one message, with the gaps in their places: what is filled in may be a message of its own."""
    pattern = re.compile(".*".join(re.escape(part.strip()) for part in text.split(GAP)), flags=re.S)
    return any(pattern.search(message) for message in said)


def of_libraries(text: str) -> bool:
    """Whether a failure with this text is one that the advice knows a sign of."""
    return any(re.search(sign, text, flags=re.IGNORECASE) for sign in signs())


@cache
def signs() -> list[str]:
    """The patterns of the table of advice."""
    (table,) = [
        file for part in PARTS for file in (ROOT / part).rglob("symptoms.py") if "SYMPTOMS = (" in file.read_text()
    ]
    calls = [node for node in ast.walk(ast.parse(table.read_text())) if isinstance(node, ast.Call)]
    found = [c.args[0] for c in calls if isinstance(c.func, ast.Name) and c.func.id == "_sign"]
    return [str(pattern.value) for pattern in found if isinstance(pattern, ast.Constant)]


def test_the_signs_were_found() -> None:
    assert len(signs()) > 4


@pytest.fixture(scope="module")
def said() -> list[str]:
    return messages()


def test_each_symptom_that_is_quoted_can_be_seen(said: list[str]) -> None:
    titles = [title for title, _ in SECTION.findall(PAGE.read_text())]
    symptoms = [text for title in titles for seen in rows(title) for text in quoted(seen)]
    assert len(symptoms) > 20
    assert [text for text in symptoms if not is_said(text, said) and not of_libraries(text)] == []


@pytest.mark.parametrize("title", ["It does not start", "It ends"])
def test_what_ends_a_run_is_quoted(title: str) -> None:
    assert not [seen for seen in rows(title) if not quoted(seen)]


@pytest.mark.parametrize("text", ["the cluster has too few …", "the storage failed for …", "rank … on … was lost"])
def test_what_nothing_says_is_found_out(text: str, said: list[str]) -> None:
    assert not is_said(text, said)
    assert not of_libraries(text)


def test_the_events_that_are_shown_are_drawn_so() -> None:
    page = " ".join((PAGE.parent / "watching.md").read_text().split())
    died = "ActorDiedError: The actor died unexpectedly before finishing this task."
    cause = f"rank 6 on c died (last seen at step 104, backward of micro-batch 1): {died}"
    before = ["a"] * 3 + ["b"] * 3 + ["c"] * 2
    failure = Failure(cause).event("", retried=True)
    start = StartEvent(attempt=2, hosts=tuple(before[:6]), strategy={"kind": "fsdp"}, step=100)
    assert f"2 min ago {event_text(failure)}" in page
    assert f"1 min ago {event_text(start, before)}" in page
