"""The wheel carries the checkout's tree under muster/, and works from anywhere."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("launcher", "cluster", "trainer")


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, timeout=120)


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


def site_packages(home: Path) -> Path:
    return next((home / "lib").glob("python*/site-packages"))


def shipped(source: Path) -> set[str]:
    """What the wheel has to carry, read off its sources."""
    code = {p for name in PACKAGES for p in (source / name).rglob("*.py")}
    data = {*(source / "recipes").glob("*.yaml"), source / "recipes" / "recipe.schema.json"}
    data |= {*(source / "deepspeed").glob("*.json"), *(source / "slurm").glob("*.sbatch")}
    data |= {p for p in (source / "cluster" / "kubernetes").iterdir() if p.suffix == ".yaml" or p.name == "Dockerfile"}
    data |= {p for p in (source / "launcher" / "report").iterdir() if p.suffix in (".css", ".js")}
    data |= {*(source / "trainer" / "chat_templates").glob("*.jinja")}
    interface = source / "launcher" / "muster" / "__init__.py"
    paths = {p.relative_to(source).as_posix() for p in (code | data) - {interface}}
    return {f"muster/{path}" for path in paths | {"__init__.py"}}


def test_the_wheel_carries_every_module_and_recipe_and_nothing_else(source: Path, wheel: Path) -> None:
    names = {n for n in zipfile.ZipFile(wheel).namelist() if not n.endswith("/")}
    inside = {n for n in names if n.startswith("muster/")}
    assert inside == shipped(source)
    assert {n.split("/")[0] for n in names - inside} == {f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"}


def test_site_packages_gains_only_muster(installed: Path) -> None:
    gained = {p.name for p in site_packages(installed).iterdir()}
    assert {name for name in gained if not name.endswith(".dist-info")} == {"muster"}
    assert len(gained) == 2


def test_the_wheel_knows_its_version_and_every_shipped_recipe_is_valid(installed: Path, wheel: Path) -> None:
    site = site_packages(installed)
    # A path file adds this environment's libraries without running its editable install of muster.
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    inside = run(
        installed / "bin" / "python", "-c", "from trainer.run.frozen import code_version as v; print(v())",
        cwd=site / "muster",
    )  # fmt: skip
    assert inside.stdout.strip() == wheel.name.split("-")[1], inside.stderr
    result = run(installed / "bin" / "muster", "validate", "--all", cwd=Path("/"))
    said = result.stdout + result.stderr
    assert result.returncode == 0, said
    named = run(installed / "bin" / "muster", "validate", "qwen3-0.6b-chat", "training.epochs=1", cwd=Path("/"))
    assert named.returncode == 0, named.stderr
    written = run(installed / "bin" / "muster", "init", "qwen3-0.6b-chat", cwd=Path("/"))
    assert written.stdout.startswith("# muster run my.yaml"), written.stderr
    python = "import muster; print(muster.Recipe.load('qwen3-0.6b-chat').name)"
    loaded = run(installed / "bin" / "python", "-c", python, cwd=Path("/"))
    assert loaded.stdout == "qwen3-0.6b-chat\n", loaded.stderr
    where = run(installed / "bin" / "python", "-c", "import muster.launcher as m; print(m.__path__)", cwd=Path("/"))
    assert str(site) in where.stdout
    for recipe in (ROOT / "recipes").glob("*.yaml"):
        assert recipe.name in said
