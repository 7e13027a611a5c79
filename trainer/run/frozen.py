"""A run's frozen recipe, and the provenance that is stored with it.

The driver freezes the recipe after it has checked the inputs. Until the first checkpoint is committed, a corrected
recipe may replace the frozen one, because nothing is lost by it.
"""

from __future__ import annotations

import importlib.metadata
import logging
import platform
import shlex
import socket
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

from trainer.errors import CorruptObject, InputError, Mistake, RecipeChanged, RecipeError
from trainer.parsing import Malformed
from trainer.recipe import Recipe, dump, loads
from trainer.recipe.plugins import providers
from trainer.recipe.trust import granted, without_code
from trainer.records import read_record
from trainer.run import layout
from trainer.run.changes import further, is_longer, record_changes, refusals, with_length
from trainer.storage import Storage

log = logging.getLogger(__name__)
DISTRIBUTION = "muster-train"
"""The project's name on the package index, where `muster` is another project."""

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "deepspeed",
    "datasets",
    "ray",
    "fsspec",
    "s3fs",
)


def read_recipe(run: Storage, overrides: Sequence[str] = ()) -> Recipe:
    """Reads the run's frozen recipe without the code that it names (`trainer.recipe.trust`), and applies overrides of
    keys that may change between attempts.

    Raises InputError if there is no run at this address, RecipeChanged if an override changes the result."""
    return without_code(_read_frozen(run, overrides))


def changed_recipe(run: Storage, overrides: Sequence[str]) -> Recipe:
    """Reads the run's frozen recipe without the code that it names, for a command that does not train: the overrides
    may change any key. Raises InputError if there is no run at this address."""
    return without_code(_loaded(run, _frozen_text(run), overrides))


def resumed_recipe(run: Storage, overrides: Sequence[str] = (), *, trust: bool = False) -> Recipe:
    """Reads the frozen recipe for training. Raises UsageError if it names code that the user does not ``trust``."""
    return granted(_read_frozen(run, overrides, imports=trust), run.uri(layout.RECIPE), trust=trust)


def _read_frozen(run: Storage, overrides: Sequence[str] = (), *, imports: bool = False) -> Recipe:
    """Reads the recipe as it was written. The result may name code, so it must only be compared, never acted on, unless
    the user has agreed to that: then its plug-ins are imported too."""
    text = _frozen_text(run)
    try:
        frozen = _loaded(run, text, imports=imports)
    except RecipeError as error:
        raise RecipeError((*error.mistakes, *missing_plugins(run), *_of_another_version(run))) from error
    recipe = _loaded(run, text, overrides, imports=imports)
    if changes := refusals(frozen, recipe):
        raise RecipeChanged(f"between attempts of {run.url} this cannot change:\n  " + "\n  ".join(changes))
    return recipe


def _loaded(run: Storage, text: bytes, overrides: Sequence[str] = (), *, imports: bool = False) -> Recipe:
    load = partial(loads, text, run.uri(layout.RECIPE), overrides, stored=True)
    try:
        return load(imports=imports)
    except RecipeError:
        # A plug-in that is not installed here: its name is that of no row, and its settings are unknown keys.
        known = [plugin.get("name", "") for plugin in read_provenance(run).get("plugins", [])]
        if imports or not known:
            raise
        return load(imports=False, known=known)


def missing_plugins(run: Storage) -> list[Mistake]:
    """Returns a mistake for each package whose plug-ins the run's recipe names, and which is not installed here."""
    named: dict[str, list[str]] = {}
    for plugin in read_provenance(run).get("plugins", []):
        if (package := plugin.get("package")) and _version(package.partition(" ")[0]) is None:
            named.setdefault(package, []).append(f"{plugin.get('key')} {plugin.get('name')}")
    return [
        Mistake(
            run.uri(layout.RECIPE),
            "",
            f"when the run was started, {', '.join(names)} came from {package}, which is not installed here: pip "
            f"install {package.replace(' ', '==')}",
        )
        for package, names in named.items()
    ]


def _frozen_text(run: Storage) -> bytes:
    try:
        return run.read(layout.RECIPE)
    except FileNotFoundError:
        raise no_run(run) from None


def no_run(run: Storage) -> InputError:
    above = run.url.rpartition("/")[0]
    listed = run.url if above in ("", f"{run.url.partition('://')[0]}:/") else above  # nothing is above a bucket
    return InputError(f"there is no run at {run.url}; `{shlex.join(['muster', 'ls', listed])}` lists the runs there")


def _of_another_version(run: Storage) -> list[Mistake]:
    """Returns a mistake that names both versions if another version of muster froze the recipe, which may explain why
    it is not valid here."""
    theirs, ours = read_provenance(run).get("muster"), code_version()
    if theirs is None or theirs.partition("+")[0] == ours.partition("+")[0]:
        return []
    message = f"the run was started with muster {theirs}, and this is {ours}; continue with that version or a newer one"
    return [Mistake(run.uri(layout.RECIPE), "", message)]


def has_commits(run: Storage) -> bool:
    return bool(run.list(layout.COMMITS))


def check_same_recipe(run: Storage, recipe: Recipe) -> None:
    """Raises RecipeChanged if the run has commits of a recipe that gives another result."""
    if not has_commits(run):
        return
    frozen = _read_frozen(run)
    if changes := refusals(frozen, recipe):
        advice = "Run it with its own recipe, or give the new recipe another name"
        if is_longer(frozen, recipe) and (begin := further(frozen, run, run.uri(layout.ADAPTER))):
            advice += f"; to train longer, {begin}"
        lines = "\n  ".join(changes)
        raise RecipeChanged(f"{run.url} was started with another recipe:\n  {lines}\n{advice}.")


def lasting(recipe: Recipe) -> Recipe:
    """Returns the recipe without ``training.stop_after``, which belongs to one command and not to the run."""
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"stop_after": None})})


def freeze_recipe(run: Storage, recipe: Recipe, driver: int | None = None) -> None:
    """Writes the resolved recipe and the provenance before the first commit. Afterwards, records what ``driver`` has
    changed, and writes the length of a run that becomes longer. Raises RecipeChanged."""
    check_same_recipe(run, recipe)
    if not has_commits(run):
        run.write(layout.RECIPE, dump(lasting(recipe)).encode())
        run.write_json(layout.PROVENANCE, {**provenance(), "plugins": providers(recipe)})
        return
    frozen = _read_frozen(run)
    if driver is not None:  # before the length is written, so that the record is not lost if this process ends here
        record_changes(run, frozen, recipe, driver)
    if is_longer(frozen, recipe):
        run.write(layout.RECIPE, dump(with_length(frozen, recipe.training)).encode())


def provenance() -> dict[str, Any]:
    """Returns package versions, host and code version. Environment variables are left out: some hold credentials."""
    return {
        "muster": code_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "command": Path(sys.argv[0]).name,
    }


class Provenance(TypedDict, total=False):
    """The program's environment when the recipe was frozen."""

    muster: str | None
    packages: dict[str, str | None]
    python: str | None
    platform: str | None
    host: str | None
    command: str | None
    plugins: list[dict[str, str]]
    """Those of the recipe: the ``key`` that names each one, its ``name``, and its ``package`` with the version."""


def read_provenance(run: Storage) -> Provenance:
    """Reads the stored provenance. Returns an empty one if it is missing or malformed: a run does not depend on it."""
    try:
        return read_record(Provenance, run.read_json(layout.PROVENANCE))
    except (FileNotFoundError, CorruptObject, Malformed) as error:
        log.warning("the provenance of %s cannot be read: %s", run.url, error)
        return {}


def versions() -> dict[str, str]:
    """Returns the versions of muster, Python and the installed packages of this attempt."""
    found = {name: version for name in PACKAGES if (version := _version(name)) is not None}
    return {"muster": code_version(), "python": platform.python_version(), **found}


def code_version() -> str:
    """Returns the version: of a checkout as pyproject.toml has it, plus the commit, else as installed."""
    root = Path(__file__).resolve().parents[2]
    project = root / "pyproject.toml"
    if project.exists():  # a checkout runs without being installed
        version: str = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"]
    else:
        version = _version(DISTRIBUTION) or "unknown"
    if not (root / ".git").exists():
        return version
    try:
        found = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return version
    return f"{version}+{found.stdout.strip()}" if found.returncode == 0 else version


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
