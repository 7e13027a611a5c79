"""The wheel carries the checkout's tree under muster/, and works from anywhere."""

from __future__ import annotations

import zipfile
from pathlib import Path

from tests.support.packages import PACKAGES, ROOT, borrow_libraries, run, site_packages


def shipped(source: Path) -> set[str]:
    """What the wheel has to carry, read off its sources."""
    code = {p for name in PACKAGES for p in (source / name).rglob("*.py")}
    data = {*(source / "recipes").glob("*.yaml"), source / "recipes" / "recipe.schema.json"}
    data |= {*(source / "deepspeed").glob("*.json"), *(source / "slurm").glob("*.sbatch")}
    data |= {p for p in (source / "cluster" / "kubernetes").iterdir() if p.suffix == ".yaml" or p.name == "Dockerfile"}
    data |= {p for p in (source / "launcher" / "report").iterdir() if p.suffix in (".css", ".js")}
    data |= {*(source / "trainer" / "chat_templates").glob("*.jinja")}
    names = {p.relative_to(source).as_posix() for p in code | data}
    short = {"launcher/testing/": "testing/", "launcher/muster/": ""}
    for folder, place in short.items():
        names = {place + name.removeprefix(folder) if name.startswith(folder) else name for name in names}
    return {f"muster/{name}" for name in names}


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
    borrow_libraries(installed)
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
