from __future__ import annotations

import shutil
import sys
import venv
from pathlib import Path

import pytest

from tests.support.packages import PACKAGES, ROOT, run


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the wheel is built from: a build leaves build/ and *.egg-info beside its sources."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in (*PACKAGES, "recipes", "deepspeed", "slurm"):
        shutil.copytree(ROOT / name, source / name)
    return source


@pytest.fixture(scope="session")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    built = run(
        sys.executable, "-m", "pip", "wheel", "-q", ".", "--no-deps", "--no-build-isolation", "-w", out, cwd=source
    )
    assert built.returncode == 0, built.stderr
    return next(out.glob("muster_train-*.whl"))


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel in it; it borrows the dependencies of this one."""
    home = tmp_path_factory.mktemp("elsewhere") / "venv"
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    result = run(
        sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel, cwd=home
    )
    assert result.returncode == 0, result.stderr
    return home


@pytest.fixture(scope="session")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the example of a plug-in, installed from its wheel."""
    source = shutil.copytree(ROOT / "docs" / "extending" / "plugin", tmp_path_factory.mktemp("plugin") / "source")
    pip, made, target = (sys.executable, "-m", "pip"), source.parent / "made", source.parent / "target"
    offline = ("-q", "--no-deps", "--no-index")
    built = run(*pip, "wheel", *offline, "--no-build-isolation", "-w", made, ".", cwd=source)
    assert built.returncode == 0, built.stderr
    installed = run(*pip, "install", *offline, "--target", target, next(made.glob("*.whl")), cwd=source)
    assert installed.returncode == 0, installed.stderr
    return target
