"""Chat templates that try to leave their sandbox, to loop for ever or to fill the memory: one sentence, in bounds."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from launcher.cli.app import main
from trainer.artifacts.chat import CHAT, Conversation
from trainer.chat_templates import rendering
from trainer.chat_templates.rendering import Unrendered, render
from trainer.data import formats
from trainer.data.formats.chat import Chat
from trainer.data.formats.turns import turns_of
from trainer.data.sample import RowError
from trainer.errors import UsageError

TURNS: list[Any] = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
LEAVING = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ messages.append.__globals__ }}",
    "a macro's code": "{% macro m() %}{% endmacro %}{{ m.__call__.__func__.__globals__['os'].system('touch OWNED') }}",
    "str.format": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "str.format_map": "{{ '{a.__class__}'.format_map({'a': messages}) }}",
    "attr": "{{ messages | attr('__class__') | attr('__mro__') }}",
    "cycler": "{{ cycler.__init__.__globals__.os.system('touch OWNED') }}",
    "lipsum": "{{ lipsum.__globals__['os'].system('touch OWNED') }}",
    "raise_exception": "{{ raise_exception.__globals__['__builtins__'].open('OWNED', 'w') }}",
    "another file": "{% include '/etc/passwd' %}",
    "an import": "{% import 'os' as os %}",
    "changing what it is given": "{{ messages.append(messages) }}",
}
BOMBS = {
    "a long range": "{% for i in range(10**9) %}{% endfor %}",
    "loops in loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a long text": "{{ 'a' * 10**10 }}",
    "a text that doubles": (
        "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}"
    ),
    "a wide field": "{{ '%999999999999d' | format(1) }}",
    "a list": "{{ ([0] * 10**10) | length }}",
    "a large number": "{{ 10 ** (10 ** 10) }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "division": "{{ 1 / 0 }}",
    "a text that is too long": "{{ 'a' * 2**25 }}",
    "nonsense": "{% for %}",
    "deep nesting": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
}


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(rendering, "CPU_S", 1.0)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.mark.parametrize("name", [*LEAVING, *BOMBS])
def test_a_template_keeps_to_its_sandbox_and_its_bounds(name: str, tokenizer: Any, tmp_path: Path) -> None:
    template = {**LEAVING, **BOMBS}[name]
    limits = resource.getrlimit(resource.RLIMIT_DATA), signal.getsignal(signal.SIGVTALRM)
    (found,) = Chat(tokenizer, template).encode([formats.chat.Conversation(turns_of(TURNS))])
    assert isinstance(found, RowError) or name in ("str.format_map", "attr", "globals"), "refused, or nothing is seen"
    if isinstance(found, RowError):
        if found.reason.startswith("the chat template leaves out"):
            return
        assert found.reason.startswith(("the chat template refuses the conversation: ", "the chat template renders"))
        with pytest.raises(Unrendered, match=r"\A.+\Z"):
            render(tokenizer, TURNS, template)
    else:
        text = render(tokenizer, TURNS, template)
        assert "class" not in text
        assert "builtins" not in text
    assert not (tmp_path / "OWNED").exists()
    assert limits == (resource.getrlimit(resource.RLIMIT_DATA), signal.getsignal(signal.SIGVTALRM))


@pytest.mark.parametrize(
    "name",
    ["a long text", *(pytest.param(n, marks=pytest.mark.night) for n in ("a long range", "loops in loops", "classes"))],
)
def test_a_conversation_with_such_a_template_ends_in_a_sentence(name: str, tiny_model: Path, tmp_path: Path) -> None:
    own = AutoTokenizer.from_pretrained(tiny_model)
    own.chat_template = {**LEAVING, **BOMBS}[name]
    with pytest.raises(UsageError, match="the chat template refuses the conversation: "):
        Conversation(own, CHAT).ask("hello")


@pytest.mark.night
def test_a_model_with_such_a_template_is_asked_in_vain(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    for jinja in model.glob("*.jinja"):
        jinja.unlink()
    told = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**told, "chat_template": BOMBS["loops in loops"]}))
    words = ["generate", "--model", str(model), "--prompt", "hello", "--frame", "chat"]
    monkeypatch.setattr(sys, "argv", ["muster", *words])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert "the chat template refuses the conversation: it has used 1 s of CPU time" in capfd.readouterr().err


def test_an_honest_template_is_rendered_in_any_thread(tokenizer: Any) -> None:
    wanted = tokenizer.apply_chat_template(TURNS, tokenize=False)
    found = []
    thread = threading.Thread(target=lambda: found.append(render(tokenizer, TURNS)))
    thread.start()
    thread.join()
    assert found == [wanted] == [render(tokenizer, TURNS)]
