"""`muster generate` and `muster chat`: in a file's order, in a pipe and on a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.cli.app import main
from launcher.cli.generate import Shown
from tests.support.training import run_of, small_recipe, train_here, write_pairs
from trainer.artifacts.chat import Conversation, frame_for
from trainer.errors import UsageError
from trainer.recipe import Recipe
from trainer.run import layout

ROOT = Path(__file__).resolve().parents[4]
TERMINAL_LIMIT_S = 120


@pytest.fixture(scope="module")
def recipe(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("answering")
    write_pairs(folder / "data" / "a.jsonl", 60)
    few = {"training.steps": 3, "checkpoint.every_steps": 3, "optimizer.lr": 2e-2}
    made = small_recipe("answering", tiny_model, folder, **few)
    assert train_here(made) == "succeeded"
    return made


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


def muster(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["muster", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        main()
    return int(left.value.code or 0)


def plainly(recipe: Recipe, prompts: list[Any], tokens: int) -> list[str]:
    """By transformers and peft alone, one prompt at a time."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base: Any = AutoModelForCausalLM.from_pretrained(recipe.model.path, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, f"{run_of(recipe).url}/{layout.ADAPTER}").eval()
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.path)
    said = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt])
        out = model.generate(input_ids=ids, max_new_tokens=tokens, do_sample=False)
        said.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return said


def test_a_file_is_answered_in_its_order(
    recipe: Recipe, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [f"Q{i}: {'a ferry crosses ' * (5 - i)}? " for i in range(5)]
    turns = [{"role": "user", "content": "who keeps the lighthouse?"}]
    rows: list[dict[str, Any]] = [*({"prompt": p, "id": n} for n, p in enumerate(prompts)), {"messages": turns}]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    asked = ["generate", "--run", run_of(recipe).url, "--input", source, "--output", target, "--batch", 4]
    assert muster(monkeypatch, *asked, "--max-new-tokens", 8) == 0
    written = [json.loads(line) for line in target.read_text().splitlines()]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    chat = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert [row["completion"] for row in written] == plainly(recipe, [*prompts, chat], 8)
    assert [row.get("prompt") for row in written] == [*prompts, None]
    assert written[-1]["messages"] == turns


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            '{"prompt": "a"}\n{"question": "b"}',
            "row 2 of --input has neither a prompt (text) nor messages (a list of objects)",
        ),
        ('{"prompt": "a"}\n{"prompt": 3}', "row 2 of --input has neither"),
        ('{"prompt": "a"}\n\nnot json', "line 3 is not JSON"),
        ('["a"]', "line 1 is no object"),
        ('{"messages": ["hi"]}', "row 1 of --input has neither"),
        ('{"messages": [[{"role": "user", "content": "hi"}]]}', "row 1 of --input has neither"),
        ('{"prompt": "\\ud800"}', "row 1 of --input: "),
    ],
)
def test_a_bad_line_is_said_before_anything_is_written(
    line: str, said: str, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(line)
    asked = ["generate", "--run", run_of(recipe).url, "--input", source, "--output", target]
    assert muster(monkeypatch, *asked) == 2
    assert said in capsys.readouterr().err
    assert not target.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--run", "x"], "either --prompt TEXT or --input FILE.jsonl"),
        (["--run", "x", "--input", "a"], "--input and --output need each other"),
        (["--prompt", "x"], "one of --run RUN_URI, --adapter URI, --model PATH"),
        (["--run", "x", "--prompt", "x", "--top-p", "0.5"], "--top-p has no effect at --temperature 0"),
        (["--adapter", "a=x", "--adapter", "b=y", "--use", "a=", "--prompt", "x"], "--use 'a=' is neither the name"),
        (["--run", "{run}", "--prompt", "x", "--quantization", "nf3"], "--quantization 'nf3' is not one of"),
        (
            ["--run", "{run}", "--prompt", "x", "--frame", "loud"],
            "--frame 'loud' is not one of: chat, qa,",
        ),
        (["--run", "x", "--prompt", "x", "--combination", "svd"], "have no effect without --use"),
        (["--adapter", "a=x", "--prompt", "x", "--use", "a=1,a=2"], "names an adapter twice"),
        (["--model", "s3://AKIAXXXX:secret@bucket/m", "--prompt", "x"], "this cannot be a model"),
        (["--run", "{run}", "--prompt", "x", "--use", "b"], "--use 'b' is none of the adapters default"),
        (
            ["--adapter", "a={run}/adapter", "--adapter", "b={run}/adapter", "--prompt", "x"],
            "choose one of a, b with --use",
        ),
    ],
)
def test_options_that_do_not_go_together(
    arguments: list[str], said: str, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    run = run_of(recipe).url
    assert muster(monkeypatch, "generate", *(a.replace("{run}", run) for a in arguments)) == 2
    found = capsys.readouterr()
    assert said in found.err
    assert "secret@" not in found.err
    assert found.out == ""


def test_one_prompt_is_answered_on_stdout_alone(recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    adapter = f"{run_of(recipe).url}/{layout.ADAPTER}"
    prompt, asked = "Q1: a ferry? ", ["--max-new-tokens", 8, "--adapter", f"a={adapter}", "--adapter", f"b={adapter}"]
    assert muster(monkeypatch, "generate", *asked, "--use", "b", "--prompt", prompt) == 0
    assert capsys.readouterr().out == plainly(recipe, [prompt], 8)[0] + "\n"
    assert muster(monkeypatch, "generate", *asked, "--use", "a=0.5,b=0.5", "--prompt", prompt) == 0
    assert capsys.readouterr().out == plainly(recipe, [prompt], 8)[0] + "\n", "halves of the same are the same"


def talk(recipe: Recipe, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "launcher", "chat", "--run", run_of(recipe).url, "--max-new-tokens", "8", *arguments]


def test_a_chat_in_a_pipe_answers_line_by_line(recipe: Recipe, tokenizer: Any) -> None:
    asked = ["who?", "and why?"]
    lines = [*asked, "/clear", asked[0], "exit", "unheard"]
    done = subprocess.run(
        talk(recipe, "--frame", "chat"), input="\n".join(lines), cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    turns: list[dict[str, str]] = []
    wanted = []
    for text in asked:
        turns.append({"role": "user", "content": text})
        rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        wanted += plainly(recipe, [tokenizer(rendered, add_special_tokens=False)["input_ids"]], 8)
        turns.append({"role": "assistant", "content": wanted[-1]})
    said = [wanted[0], wanted[1], wanted[0]]
    assert done.stdout == "".join(f"{text.lstrip()}\n" for text in said)


def test_a_chat_on_a_terminal(recipe: Recipe) -> None:
    here, there = pty.openpty()
    environment = {**os.environ, "TERM": "xterm"}
    with subprocess.Popen(
        talk(recipe, "--frame", "plain"), stdin=there, stdout=there, stderr=there, cwd=ROOT, env=environment
    ) as process:
        os.close(there)
        try:
            seen = _until(here, "> ")
            assert "/clear starts a new conversation" in seen
            os.write(here, b"Q1: a ferry? \n")
            answer = plainly(recipe, ["Q1: a ferry?"], 8)[0].strip()
            assert answer.splitlines()[0] in _until(here, "> ").replace("\r\n", "\n")
            os.write(here, b"exit\n")
            assert process.wait(TERMINAL_LIMIT_S) == 0
        finally:
            process.kill()
            os.close(here)


def _until(terminal: int, mark: str) -> str:
    """What the terminal shows up to ``mark`` at its end."""
    seen, deadline = b"", time.monotonic() + TERMINAL_LIMIT_S
    while not seen.decode(errors="replace").endswith(mark):
        ready, _, _ = select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"no {mark!r} within {TERMINAL_LIMIT_S} s: {seen!r}"
        seen += os.read(terminal, 4096)
    return seen.decode(errors="replace")


def test_a_question_is_put_as_the_training_data_had_it(tokenizer: Any) -> None:
    assert frame_for(tokenizer, None, "messages") == "chat"
    assert frame_for(tokenizer, None, "qa") == "qa"
    assert frame_for(tokenizer, None, "completion") == "plain"
    assert frame_for(tokenizer, None, None) == "chat", "its tokenizer has a template"
    assert frame_for(tokenizer, "plain", "qa") == "plain"
    assert frame_for(tokenizer, None, "instruction") == "instruction"
    template = "Q: {text}\nA:"
    assert frame_for(tokenizer, None, "completion", template) == "template"
    assert frame_for(tokenizer, None, "completion", "{a} {b}") == "plain", "there are two blanks to fill"
    assert Conversation(tokenizer, "qa").ask("who?") == "Question: who?\nAnswer:"
    assert Conversation(tokenizer, "template", template=template).ask("who?") == "Q: who?\nA:"
    assert Conversation(tokenizer, "instruction").ask("sing").endswith("### Instruction:\nsing\n\n### Response:\n")
    with pytest.raises(UsageError, match="had no template with a single blank"):
        frame_for(tokenizer, "template", "completion")
    with pytest.raises(UsageError, match="--system has no effect with the frame qa"):
        Conversation(tokenizer, "qa", "be brief")
    tokenizer.chat_template = None
    assert frame_for(tokenizer, None, None) == "plain"
    with pytest.raises(UsageError, match="the tokenizer has no chat template"):
        frame_for(tokenizer, "chat", None)


def test_a_question_that_nobody_answered_is_taken_back(tokenizer: Any) -> None:
    talk = Conversation(tokenizer, "chat", "be brief")
    alone = talk.ask("who?")
    talk.take_back()
    assert talk.ask("who?") == alone
    talk.answered("I.")
    talk.clear()
    assert talk.ask("who?") == alone


def test_of_an_answer_to_a_question_the_first_line_is_shown(tokenizer: Any, capsys: Any) -> None:
    shown = Shown(Conversation(tokenizer, "qa"))
    for piece in (" ", "in", " Farley", ".\nQues", "tion: "):
        shown(piece)
    assert capsys.readouterr().out == "in Farley."


@pytest.fixture(scope="module")
def chat_recipe(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A finished run on chats, with a template whose end of turn is text for this tokenizer."""
    folder = tmp_path_factory.mktemp("chats")
    turns = [{"role": "user", "content": "a ferry?"}, {"role": "assistant", "content": "at noon"}]
    (folder / "chats.jsonl").write_text(f"{json.dumps({'messages': turns})}\n" * 20)
    source = [{"path": f"{folder}/chats.jsonl", "format": "messages"}]
    few = {"training.steps": 2, "checkpoint.every_steps": 2, "data.train": source, "data.chat_template": "chatml"}
    made = small_recipe("chats", tiny_model, folder, **few)
    assert train_here(made) == "succeeded"
    return made


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The prompts that models are asked; each answers and goes on with a turn of the user."""
    from trainer.artifacts import Generator

    prompts: list[Any] = []

    def answers(self: Any, asked: Any, tokens: int, ended: Any, done: Any = lambda count: None) -> list[str]:
        prompts.extend(self.tokenizer.decode(p) if isinstance(p, list) else p for p in asked)
        text = "at noon<|im_end|>\n<|im_start|>user\nwhy"
        assert [ended("at noon"), ended(text)] == [False, not isinstance(prompts[-1], str) or "<|im" in prompts[-1]]
        return [text] * len(asked)

    monkeypatch.setattr(Generator, "answers", answers)
    return prompts


FRAMED = "<|im_start|>user\na ferry?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("where", ["the final adapter", "a checkpoint"])
def test_a_run_on_chats_is_asked_as_in_training_and_its_answer_ends_with_the_turn(
    where: str, chat_recipe: Recipe, asked: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    run = Path(run_of(chat_recipe).url)
    if where == "a checkpoint":  # which has no tokenizer of its own
        shutil.copytree(run, tmp_path / "run")
        run = tmp_path / "run"
        shutil.rmtree(run / layout.ADAPTER)
    assert muster(monkeypatch, "generate", "--run", run, "--prompt", "a ferry?") == 0
    found = capsys.readouterr()
    assert (found.out, [prompt[-len(FRAMED) :] for prompt in asked]) == ("at noon\n", [FRAMED])
    said = [line for line in found.err.splitlines() if "prompts" in line]
    assert said == ["prompts go through the chat template, as in training (--frame changes it)"]


def test_another_frame_counts_and_messages_stay_a_chat(
    chat_recipe: Recipe, asked: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    rows = [{"prompt": "a ferry?"}, {"messages": [{"role": "user", "content": "a ferry?"}]}]
    (tmp_path / "in.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    files = ["--input", tmp_path / "in.jsonl", "--output", "-"]
    assert muster(monkeypatch, "generate", "--run", run_of(chat_recipe).url, "--frame", "plain", *files) == 0
    found = capsys.readouterr()
    completions = [json.loads(line)["completion"] for line in found.out.splitlines()]
    assert completions == ["at noon<|im_end|>\n<|im_start|>user\nwhy", "at noon"]
    assert (asked[0], asked[1][-len(FRAMED) :]) == ("a ferry?", FRAMED)
    assert "prompts" not in found.err


def test_a_merge_explains_its_difference_and_no_library_says_anything(recipe: Recipe, tmp_path: Path) -> None:
    asked = ["merge", "--run", run_of(recipe).url, "--out", str(tmp_path / "merged"), "--dtype", "bfloat16"]
    done = subprocess.run(
        [sys.executable, "-m", "launcher", *asked], cwd=ROOT, capture_output=True, text=True, timeout=TERMINAL_LIMIT_S
    )
    assert (done.returncode, done.stdout) == (0, "")
    lines = done.stderr.splitlines()
    assert all(re.match(r"\[ *\d+\.\d s\] |the merged model is |serve it:$|vllm serve ", line) for line in lines), (
        done.stderr
    )
    (merged,) = [line for line in lines if line.startswith("the merged model")]
    assert re.search(r"differ by \d\.\de-\d\d of their norm \(bfloat16 rounding; up to 5e-02 is accepted\)$", merged)
