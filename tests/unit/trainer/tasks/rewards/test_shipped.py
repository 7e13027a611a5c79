"""The reward functions that come with muster: final numbers, answers as mathematics, and code that passes tests."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest

from tests.support.waiting import wait_for
from trainer.errors import InputError
from trainer.recipe.sections.rollouts.reward import RewardFunctionSection
from trainer.tasks.rewards import sandbox, sandbox_start, shipped
from trainer.tasks.rewards.functions import RewardFunctions
from trainer.tasks.rewards.shipped import code_of, final_number, gsm8k, python_tests

SHIPPED = "trainer.tasks.rewards.shipped"
ADDS = "def add(a, b):\n    return a + b"
TEST = "assert add(2, 3) == 5"


@pytest.mark.parametrize(
    ("text", "number"),
    [("so 3 + 4 = 7", 7.0), ("#### 1,234", 1234.0), ("#### -2.5 and 9", -2.5), ("none", None), ("", None), ("-", None)],
)
def test_the_final_number(text: str, number: float | None) -> None:
    assert final_number(text) == number


def test_gsm8k_compares_numbers() -> None:
    completions = ["It is 1,234.", "It is 12.", "no idea", "18.0"]
    references = ["… #### 1234", "… #### 13", "#### 1", "#### 18"]
    assert gsm8k(prompts=[""] * 4, completions=completions, references=references) == [1.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("name", ["trainer.tasks.ppo.rewards:gsm8k", f"{SHIPPED}:gsm8k", f"{SHIPPED}:math_answer"])
def test_they_are_found_by_their_names(name: str) -> None:
    functions = RewardFunctions([RewardFunctionSection(function=name)])
    assert list(functions(["", ""], ["4", "5"], ["4", "4"]).values()) == [[1.0, 0.0]]
    functions.close()


def test_they_are_imported_without_torch() -> None:
    code = f"import sys, {SHIPPED}, trainer.tasks.rewards.process; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[5]).returncode == 0


MATHEMATICS = [
    (r"So it is \boxed{\frac{1}{2}}.", "0.5", 1.0),
    (r"So it is \boxed{\frac{1}{2}}.", r"\frac{2}{4}", 1.0),
    (r"First 3, then $\boxed{4}$, but not 5", "4", 1.0),
    (r"\frac{3}{4}", "0.75", 1.0),
    (r"2\sqrt{3}", r"$\sqrt{12}$", 1.0),
    ("x^2 + 2x + 1", "(x + 1)^2", 1.0),
    ("The answer is 1,234.", "1234", 1.0),
    ("72", "#### 72", 1.0),
    ("5", "5 dollars", 1.0),
    (r"\boxed{(1, 2)}", "(1,2)", 1.0),
    (r"\boxed{\text{even}}", r"\text{even}", 1.0),
    (r"\boxed{7}", "8", 0.0),
    ("no idea", "5", 0.0),
    (r"\boxed{", "5", 0.0),
    ("", "5", 0.0),
]


@pytest.mark.parametrize(("completion", "reference", "reward"), MATHEMATICS)
def test_answers_are_compared_as_mathematics(completion: str, reference: str, reward: float) -> None:
    assert shipped.math_answer(prompts=[""], completions=[completion], references=[reference]) == [reward]


def test_an_answer_that_takes_for_ever_to_compare_is_wrong() -> None:
    began = time.monotonic()
    completions = [r"\boxed{9^{9^{9^{9}}}}", r"\boxed{4}"]
    assert shipped.math_answer(prompts=["", ""], completions=completions, references=["4", "4"]) == [0.0, 1.0]
    assert time.monotonic() - began < 15


def test_answers_are_compared_in_any_thread() -> None:
    found: list[float] = []
    thread = threading.Thread(target=lambda: found.extend(shipped.math_answer([""], [r"\boxed{4}"], ["4"])))
    thread.start()
    thread.join()
    assert found == [1.0]


def test_a_reference_without_an_answer_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert shipped.math_answer(["", ""], ["4", "5"], ["", ""]) == [0.0, 0.0]
    assert capsys.readouterr().out == "math_answer: the reference '' has no answer that can be read; its texts get 0\n"


def test_without_its_library_the_recipe_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "math_verify.py").write_text("raise ImportError('not here')")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        InputError, match=r'math_answer.* needs math-verify.*: pip install "math-verify\[antlr4_13_2\]"'
    ):
        RewardFunctions([RewardFunctionSection(function=f"{SHIPPED}:math_answer")])


def test_the_code_of_a_text_is_its_last_block() -> None:
    assert code_of("a = 1") == "a = 1"
    assert code_of("```python\na = 1\n```\nor\n```python\na = 2\n```\nis it") == "a = 2\n"
    assert code_of("```sh\nls\n```\n```py\na = 3\n```") == "a = 3\n"


def passed(*programs: str, tests: str = "") -> list[float]:
    return python_tests([""] * len(programs), programs, [tests] * len(programs))


def test_code_that_passes_the_tests_is_rewarded() -> None:
    block = f"Here it is:\n```python\n{ADDS}\n```\nDone."
    wrong = ADDS.replace("+", "-")
    assert passed(ADDS, block, wrong, "def add(", "", tests=TEST) == [1.0, 1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("leaves", ["import sys\nsys.exit(0)", "import os\nos._exit(0)", "raise SystemExit", "quit()"])
def test_code_that_ends_before_the_tests_is_not(leaves: str) -> None:
    assert passed(leaves, tests=TEST) == [0.0]


LIMITED = {
    "time": "while True: pass",
    "memory": "kept = bytearray(4 << 30)",
    "a file": "open('big', 'wb').write(bytes(64 << 20))",
    "files": "kept = [open('f%d' % n, 'w') for n in range(200)]",
}


@pytest.mark.parametrize("what", LIMITED)
def test_code_that_uses_too_much_fails(what: str) -> None:
    began = time.monotonic()
    assert passed(LIMITED[what]) == [0.0]
    assert time.monotonic() - began < 30


def test_processes_are_limited() -> None:
    """Those of root never are, so that root becomes another user here, and takes a Python that this user may run."""
    is_root = os.getuid() == 0
    python = shutil.which("python3", path="/usr/bin:/bin") if is_root else sys.executable
    if python is None:
        pytest.skip("no Python for every user")
    codes = []
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        start = shutil.copy(sandbox_start.__file__, folder)
        for count in (10, 200):
            program = Path(folder, f"{count}.py")
            program.write_text(
                f"import os, time\nfor n in range({count}):\n    os.fork() or time.sleep(5) or os._exit(0)"
            )
            command = [python, "-I", start, str(program)]
            user = {"user": 65534, "group": 65534, "extra_groups": []} if is_root else {}
            codes.append(subprocess.run(command, stderr=subprocess.DEVNULL, timeout=60, **user).returncode)
    assert codes == [0, 1]


def test_it_has_a_folder_of_its_own_and_no_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "mine.py").write_text("")
    monkeypatch.chdir(tmp_path)
    check = (
        "import os, tempfile\n"
        "assert set(os.environ) <= {'PATH', 'LANG', 'LC_ALL', 'LC_CTYPE', 'LD_LIBRARY_PATH', 'HOME', 'TMPDIR'}\n"
        "here = os.path.realpath('.')\n"
        f"assert here != {str(tmp_path)!r} and os.listdir() == ['program.py']\n"
        "assert here == os.path.realpath(os.environ['HOME']) == os.path.realpath(tempfile.gettempdir())\n"
        "open('written', 'w').write('x')\n"
    )
    assert passed(check, "import mine") == [1.0, 0.0]
    assert os.listdir(tmp_path) == ["mine.py"]


def test_it_has_no_network() -> None:
    if subprocess.run(["unshare", "-rn", "true"]).returncode != 0:
        pytest.skip("the kernel allows no network namespace")
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = server.getsockname()
        connects = f"import socket\nsocket.create_connection({place!r}, timeout=5)"
        assert subprocess.run([sys.executable, "-c", connects]).returncode == 0
        assert passed(connects) == [0.0]


def test_what_it_leaves_behind_is_killed() -> None:
    mark = f"muster-test-{os.getpid()}-"
    begin = "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)', '{}'], {})"
    programs = [begin.format(f"{mark}a", ""), begin.format(f"{mark}b", "start_new_session=True")]
    assert sandbox.run_all(programs) == [True, True]
    wait_for(lambda: not running(mark), "end of its processes", 10)


def running(mark: str) -> list[int]:
    return [p.pid for p in psutil.process_iter(["cmdline"]) if any(mark in word for word in p.info["cmdline"] or ())]


def test_it_ends_with_the_process_that_runs_it(tmp_path: Path) -> None:
    mark = tmp_path / "begun"
    program = f"import sys, time\nopen({str(mark)!r}, 'w').close()\ntime.sleep(600)"
    code = f"from trainer.tasks.rewards.sandbox import run_all; run_all([{program!r}], 600)"
    started = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[5])
    wait_for(mark.exists, "the program")
    children = psutil.Process(started.pid).children(recursive=True)
    started.kill()
    started.wait()
    assert children
    wait_for(lambda: not any(child.is_running() for child in children), "end of the program", 10)


def test_programs_run_side_by_side(tmp_path: Path) -> None:
    """Each of them waits for the others."""
    count = os.cpu_count() or 1
    meet = "from pathlib import Path\nimport time\nhere = Path({!r})\n(here / {!r}).touch()\n"
    meet += "while len(list(here.iterdir())) < {}:\n    time.sleep(0.05)\n"
    programs = [meet.format(str(tmp_path), str(n), count) for n in range(count)]
    assert sandbox.run_all(programs, 240.0) == [True] * count
    assert sandbox.run_all(["import time\ntime.sleep(600)"], 0.5) == [False]
    assert sandbox.run_all([]) == []
