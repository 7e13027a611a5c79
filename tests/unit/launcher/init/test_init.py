"""muster init: the list, a shipped recipe, and one that is written after a look at a model and its rows."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from launcher.init import choices, gpus
from launcher.init.base_model import look, parameters
from launcher.init.rows import format_of
from launcher.init.rows import look as look_at_rows
from launcher.init.writing import written as text_of
from tests.unit.launcher.cli.test_app import Muster
from trainer.plan.known_configs import SHAPES
from trainer.recipe import Recipe, load, loads
from trainer.recipe.loading import shipped

CHAT = [{"from": "human", "value": "What is a fox?"}, {"from": "gpt", "value": "An animal."}]
ROWS: dict[str, dict[str, Any]] = {
    "chats": {"conversations": CHAT},
    "turns": {"dialog": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]},
    "alpaca": {"instruction": "Name a fruit.", "input": "", "output": "Apple."},
    "pairs": {"prompt": "1 + 1 =", "completion": " 2"},
    "asked": {"query": "1 + 1?", "response": "2"},
    "qa": {"question": "1 + 1?", "answer": "2"},
    "ranked": {"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"},
    "rated": {"prompt": "1 + 1 =", "completion": " 2", "label": True},
    "texts": {"text": "A fox is an animal."},
}
FORMATS = {
    "chats": "messages",
    "turns": "messages",
    "alpaca": "instruction",
    "pairs": "completion",
    "asked": "completion",
    "qa": "qa",
    "ranked": "preference",
    "rated": "unpaired_preference",
    "texts": "text",
}


@pytest.fixture
def muster(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Muster:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(gpus, "COMMAND", ("no-such-program",))
    return Muster(capsys, monkeypatch)


def rows_file(folder: Path, row: dict[str, Any], count: int = 200) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row | {"id": n}) + "\n" for n in range(count)))
    return path


def without_template(model: Path, folder: Path) -> Path:
    """A copy of the model whose tokenizer has no chat template."""
    copy = folder / "plain"
    shutil.copytree(model, copy)
    (copy / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    return copy


def test_the_list_has_every_shipped_recipe_on_a_line_of_80_columns(muster: Muster) -> None:
    assert muster("init") == 0
    head, *lines = muster.out.splitlines()
    assert head.split()[0] == "name"
    names = [line.split()[0] for line in lines]
    assert sorted(names) == sorted(shipped())
    assert names[:2] == ["quickstart", "qwen3_0_6b_chat"]
    assert max(map(len, lines)) <= 80
    chats = [line.split()[1] == "chats" for line in lines[1:]]
    assert chats == sorted(chats, reverse=True), "chats first"


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_recipe_is_written_for_a_file_of_ones_own(
    name: str, muster: Muster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert muster("init", name) == 0
    assert muster.err == ""
    assert "$schema" not in muster.out
    assert "recipes/" not in muster.out
    assert loads(muster.out) == load(name)
    monkeypatch.chdir(tmp_path)
    start = f"# muster {'sweep' if load(name).sweep else 'run'} "
    commands = [line for line in muster.out.splitlines() if line.startswith(start)]
    (tmp_path / "my.yaml").write_text(muster.out)
    for command in commands:
        file, *overrides = shlex.split(command.removeprefix(start))
        assert load(file, overrides)
    assert len(commands) == 2


@pytest.mark.parametrize(
    ("kind", "chatty"), [*((kind, True) for kind in ROWS), ("chats", False), ("asked", False), ("qa", False)]
)
def test_what_is_written_is_valid_previewed_and_planned(
    kind: str, chatty: bool, muster: Muster, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny_model if chatty else without_template(tiny_model, tmp_path)
    rows = rows_file(tmp_path, ROWS[kind])
    assert muster("init", "--model", str(model), "--data", str(rows)) == 0, muster.err
    assert muster.err == ""
    (tmp_path / "my.yaml").write_text(muster.out)
    recipe = load("my.yaml")
    framed = chatty and kind in ("alpaca", "asked", "qa")
    assert recipe.data.train[0].format == ("instruction" if framed else FORMATS[kind])
    assert recipe.data.train[0].style == ("chat" if framed else "text")
    assert (recipe.data.chat_template is None) == (chatty or kind != "chats")
    assert recipe.resources.gpus_per_worker == 0, "no GPU here, and the model is small"
    source = ("- path", "format", "as", "columns")
    lines = muster.out.splitlines()
    choices = [
        i for i, line in enumerate(lines) if ": " in line.split("#")[0] and line.split(":")[0].strip() not in source
    ]
    assert [lines[i] for i in choices if "# " not in lines[i] + lines[i + 1]] == [], "each choice has its reason"
    assert [line for line in lines if len(line) > 80 and str(tmp_path) not in line and str(model) not in line] == []
    assert muster("validate", "my.yaml") == 0, muster.err
    assert muster("preview", "my.yaml", "--rows", "2") == 0, muster.err
    assert "fault" not in muster.out
    if kind == "chats" and chatty:
        assert muster("plan", "my.yaml") == 0, muster.err


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": CHAT}, ("messages", {})),
        ({"dialog": CHAT}, ("messages", {"messages": "dialog"})),
        ({"instruction": "a", "response": "b"}, ("instruction", {"output": "response"})),
        ({"input": "a", "target": "b"}, ("completion", {"prompt": "input", "completion": "target"})),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "messages": CHAT}, ("preference", {})),
        (
            {"question": "a", "answer": "b", "label": True},
            ("unpaired_preference", {"prompt": "question", "completion": "answer"}),
        ),
        ({"messages": CHAT, "label": False}, ("unpaired_preference", {"completion": "messages"})),
        ({"prompt": CHAT[:1], "completion": CHAT[1:], "label": False}, ("unpaired_preference", {})),
        ({"prompt": "a", "completion": "b", "label": 1}, ("completion", {})),
        ({"question": "a", "chosen": "b", "rejected": "c"}, ("preference", {"prompt": "question"})),
        (
            {"sentence1": "a", "sentence2": "b", "label": 1},
            ("classification", {"text": "sentence1", "text_pair": "sentence2"}),
        ),
        ({"text": "a", "label": 1}, ("classification", {})),
        ({"content": "a"}, ("text", {"text": "content"})),
        ({"a": 1}, (None, {})),
        ({"messages": []}, (None, {})),
    ],
)
def test_rows_are_known_by_their_columns(row: dict[str, Any], expected: tuple[str | None, dict[str, str]]) -> None:
    assert format_of(row) == expected


def test_a_large_file_is_read_in_part(tmp_path: Path) -> None:
    path = rows_file(tmp_path, {"prompt": "1 + 1 =", "completion": " 2", "source": "a book " * 50}, 5000)
    found = look_at_rows(str(path))
    assert (found.exact, len(found.texts)) == (False, 2000)
    assert found.rows == pytest.approx(5000, rel=0.03)
    assert found.texts[0] == "1 + 1 =\n 2", "what no format reads takes no tokens"
    ranked = look_at_rows(str(rows_file(tmp_path, ROWS["ranked"])))
    assert (ranked.rows, ranked.exact, ranked.texts[0]) == (200, True, "1 + 1 =\n 2"), "a pair is two samples"


def test_a_bad_input_is_one_sentence(muster: Muster, tiny_model: Path, tmp_path: Path) -> None:
    model, rows = str(tiny_model), str(rows_file(tmp_path, ROWS["pairs"]))
    odd = tmp_path / "odd.jsonl"
    odd.write_text('{"a": 1}\n')
    empty, broken = tmp_path / "empty.jsonl", tmp_path / "broken.jsonl"
    empty.write_text("")
    broken.write_text("{oops\n")
    (tmp_path / "folder").mkdir()
    for arguments, said in (
        (["no-such"], "'no-such' is no shipped recipe; muster init lists them"),
        (["qwen3_06b_chat"], "did you mean 'qwen3_0_6b_chat'?"),
        (["quickstart", "--model", model], "or --model and --data"),
        (["--model", model], "--data is missing"),
        (["--data", rows], "--model is missing"),
        (["--model", model, "--data", str(tmp_path / "none.jsonl")], "none.jsonl: nothing there matches"),
        (["--model", str(tmp_path / "folder"), "--data", rows], "holds no config.json"),
        (["--model", str(tmp_path / "nothing"), "--data", rows], "is no folder on this host"),
        (["--model", model, "--data", str(odd)], "no format reads the columns a; rows may have a conversation"),
        (["--model", model, "--data", str(empty)], "holds no rows"),
        (["--model", model, "--data", str(broken)], "row 0 cannot be read"),
    ):
        assert muster("init", *arguments) == 2, arguments
        assert muster.out == ""
        assert said in muster.err
        assert len(muster.err.strip().splitlines()) == 1


def test_an_encoder_learns_to_classify(muster: Muster, tmp_path: Path) -> None:
    (tmp_path / "bert").mkdir()
    shape = SHAPES["ModernBERT-base"]
    config = {**shape, "architectures": ["ModernBertForMaskedLM"], "max_position_embeddings": 8192}
    (tmp_path / "bert" / "config.json").write_text(json.dumps(config))
    rows = rows_file(tmp_path, {"sentence": "fine", "label": 1})
    assert muster("init", "--model", str(tmp_path / "bert"), "--data", str(rows)) == 0
    recipe = loads(muster.out)
    assert (recipe.task, recipe.data.packing) == ("classification", False)
    assert recipe.data.train[0].columns == {"text": "sentence"}
    chats = rows_file(tmp_path, ROWS["chats"])
    assert muster("init", "--model", str(tmp_path / "bert"), "--data", str(chats)) == 2
    assert "is an encoder, which learns to classify" in muster.err


@pytest.mark.parametrize(
    ("name", "count"),
    [("Qwen3-8B", 8.19e9), ("Qwen3-30B-A3B", 30.5e9), ("Llama-3.2-1B", 1.236e9), ("gpt-oss-20b", 20.9e9)],
)
def test_weights_are_counted_from_the_configuration(name: str, count: float) -> None:
    assert parameters(SHAPES[name]) == pytest.approx(count, rel=0.02)


def with_shape(folder: Path, name: str, tiny_model: Path, **more: Any) -> Path:
    made = folder / name
    made.mkdir()
    (made / "config.json").write_text(json.dumps({**SHAPES[name], **more}))
    (made / "tokenizer.json").symlink_to(tiny_model / "tokenizer.json")
    return made


@pytest.mark.parametrize(
    ("name", "memories", "quantization", "strategy", "workers"),
    [
        ("Qwen3-0.6B", (), "none", "ddp", 1),
        ("Qwen3-8B", (), "nf4", "ddp", 1),
        ("Qwen3-8B", (80,), "none", "ddp", 1),
        ("Qwen3-8B", (24, 24), "nf4", "ddp", 2),
        ("Qwen3-30B-A3B", (), "nf4", "fsdp", 2),
        ("Llama-3.1-70B", (24,) * 4, "nf4", "fsdp", 4),
        ("Llama-3.1-70B", (), "nf4", "fsdp", 4),
    ],
)
def test_a_model_is_made_to_fit(
    name: str,
    memories: tuple[int, ...],
    quantization: str,
    strategy: str,
    workers: int,
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    recipe = written(with_shape(tmp_path, name, tiny_model), rows_file(tmp_path, ROWS["chats"]), memories)
    assert (recipe.model.quantization, recipe.strategy.kind) == (quantization, strategy)
    assert recipe.resources.workers == workers
    on_gpus = bool(memories) or name != "Qwen3-0.6B"
    assert recipe.resources.gpus_per_worker == on_gpus
    assert recipe.model.dtype == ("bfloat16" if on_gpus else "float32")


def written(model: Path, rows: Path, memories: tuple[int, ...] = ()) -> Recipe:
    found = choices.choices(look(str(model)), look_at_rows(str(rows)), tuple(one << 30 for one in memories))
    return loads(text_of(found, str(model), str(rows)))


def test_what_cannot_be_packed_is_not(tiny_model: Path, tmp_path: Path) -> None:
    rows = rows_file(tmp_path, ROWS["chats"])
    assert not written(with_shape(tmp_path, "gpt-oss-20b", tiny_model), rows).data.packing
    assert written(with_shape(tmp_path, "Qwen3-8B", tiny_model), rows).data.packing


def test_how_weights_are_stored_decides(tiny_model: Path, tmp_path: Path, muster: Muster) -> None:
    rows = rows_file(tmp_path, ROWS["chats"])
    packed = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    assert written(with_shape(tmp_path, "Qwen3-0.6B", tiny_model, **packed), rows).model.quantization == "nf4"
    model = with_shape(tmp_path, "Qwen3-8B", tiny_model, quantization_config={"quant_method": "gptq"})
    assert muster("init", "--model", str(model), "--data", str(rows)) == 2
    assert "quantised by 'gptq', which muster does not train" in muster.err


def test_the_gpus_are_asked_of_nvidias_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = [sys.executable, "-c", "print('24564\\n24564')"]
    monkeypatch.setattr(gpus, "COMMAND", told)
    assert gpus.gpus_here() == (24564 << 20, 24564 << 20)
    for broken in (
        ["no-such-program"],
        [sys.executable, "-c", "exit(9)"],
        [sys.executable, "-c", "print('No devices')"],
    ):
        monkeypatch.setattr(gpus, "COMMAND", broken)
        assert gpus.gpus_here() == ()


def test_odd_names_stay_values_and_comments(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "it's: #1"
    folder.mkdir()
    rows = rows_file(folder, ROWS["chats"])
    recipe = written(tiny_model, rows)
    assert recipe.data.train[0].path == str(rows)


def test_neither_torch_nor_transformers_is_imported_for_files_here(tiny_model: Path, tmp_path: Path) -> None:
    rows = rows_file(tmp_path, ROWS["chats"])
    code = (
        "import sys; from launcher.cli.init import looked_at; "
        f"looked_at({str(tiny_model)!r}, {str(rows)!r}); "
        "sys.exit(bool({'torch', 'transformers', 'ray', 'peft'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_the_tokens_of_a_row_are_counted_by_the_tokenizer(tiny_model: Path) -> None:
    assert look(str(tiny_model)).count("a fox") == len(AutoTokenizer.from_pretrained(tiny_model)("a fox")["input_ids"])
