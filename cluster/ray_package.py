"""The files that a submitted Ray job gets: packages, as Ray keeps them under their hash, and the same for a shell.

The job's working directory is this program's own tree with the recipe in it, and next to them the files of the user's
working directory, so that the modules of both can be imported.
"""

from __future__ import annotations

import hashlib
import io
import shlex
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cluster.job import ClusterError
from cluster.shell import written

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("launcher", "cluster", "trainer", "recipes", "deepspeed", "slurm")
RECIPE = "submitted.yaml"
LARGEST_PACKAGE = 500 << 20
"""In bytes; Ray refuses larger ones."""

Upload = Callable[[str, bytes], str]
"""Uploads a package under a name and returns its URI."""


def runtime_env(settings: Mapping[str, Any], recipe: str, upload: Upload) -> dict[str, Any]:
    """Returns the job's runtime environment: that of ``cluster.ray.runtime_env``, with its local files uploaded."""
    given: Mapping[str, Any] = settings["runtime_env"]
    found = {**given, "working_dir": _uploaded(working_directory(recipe, given.get("working_dir")), upload)}
    if modules := given.get("py_modules"):
        found["py_modules"] = [module if "://" in module else _module(module, upload) for module in modules]
    return found


def shell_commands(settings: Mapping[str, Any], recipe: str) -> tuple[str, dict[str, Any]]:
    """Returns the commands for a shell that put the working directory together in ``$job``, and the rest of the runtime
    environment, whose local files `ray job submit` uploads."""
    given = dict(settings["runtime_env"])
    folder = given.pop("working_dir", None)
    own = [str(path) for path in _entries(folder)] if folder else []
    commands = f'job=$(mktemp -d)\n{shlex.join(["cp", "-R", *own, *(str(ROOT / part) for part in PARTS)])} "$job"\n'
    commands += written(f'"$job"/{RECIPE}', recipe) + "\n"
    if modules := given.get("py_modules"):
        given["py_modules"] = [module if "://" in module else str(Path(module).resolve()) for module in modules]
    return commands, given


def working_directory(recipe: str, folder: str | None = None) -> bytes:
    """A zip of this program, the recipe and the user's folder."""
    own = _entries(folder) if folder else []
    return _zipped([*own, *(ROOT / part for part in PARTS)], {RECIPE: recipe.encode()})


def _entries(folder: str) -> list[Path]:
    """Returns the files and folders of the user's working directory, without those that are hidden. A checkout of this
    program is added once. Raises ClusterError for a name that this program needs."""
    path = Path(folder).expanduser().resolve()
    if not path.is_dir():
        raise ClusterError(f"cluster.ray.runtime_env: the working_dir {folder} is no folder of this machine")
    found = [entry for entry in sorted(path.iterdir()) if not entry.name.startswith(".")]
    if path == ROOT:
        return [entry for entry in found if entry.name not in PARTS]
    if taken := [entry.name for entry in found if entry.name in (*PARTS, RECIPE)]:
        raise ClusterError(
            f"cluster.ray.runtime_env: the working_dir {folder} has {', '.join(taken)}, where the job has muster's own "
            "files: rename them, or name a folder below"
        )
    return found


def _module(path: str, upload: Upload) -> str:
    place = Path(path).expanduser().resolve()
    if place.suffix == ".whl" and place.is_file():
        return upload(place.name, place.read_bytes())
    if place.is_dir():
        return _uploaded(_zipped([place], {}), upload)
    raise ClusterError(f"cluster.ray.runtime_env: {path} of py_modules is no folder and no wheel of this machine")


def _uploaded(package: bytes, upload: Upload) -> str:
    if len(package) > LARGEST_PACKAGE:
        raise ClusterError(
            f"cluster.ray.runtime_env: the files of the job have {len(package) >> 20} MiB, and Ray takes at most "
            f"{LARGEST_PACKAGE >> 20}: name a folder with the code only, and read data from a storage"
        )
    return upload(f"_ray_pkg_{hashlib.sha256(package).hexdigest()[:32]}.zip", package)


def _zipped(entries: list[Path], texts: Mapping[str, bytes]) -> bytes:
    """A zip of files, folders and texts; the same bytes for the same content, since Ray keeps it under its hash."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as package:
        for entry in entries:
            for path in sorted(entry.rglob("*")) if entry.is_dir() else [entry]:
                if path.is_file() and "__pycache__" not in path.parts:
                    _add(package, str(path.relative_to(entry.parent)), path.read_bytes())
        for name, body in texts.items():
            _add(package, name, body)
    return content.getvalue()


def _add(package: zipfile.ZipFile, name: str, body: bytes) -> None:
    entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
    entry.external_attr = 0o644 << 16
    package.writestr(entry, body, zipfile.ZIP_DEFLATED)
