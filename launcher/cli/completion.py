"""What a shell completes after a command's name: recipes, runs, and the values of options. Everything is found on this
machine's disk and without an import of weight, since a person waits for it.

A shell that gets no answer completes names of files by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from trainer.run.layout import RECIPE

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
SUFFIXES = (".yaml", ".yml", ".json")


def recipes(incomplete: str) -> list[str]:
    """Returns recipe files and folders that begin with ``incomplete``, and names of shipped recipes."""
    shipped = (path.stem for path in RECIPES.glob("*.yaml"))
    return sorted({*_paths(incomplete, lambda path: path.suffix in SUFFIXES), *_starting(incomplete, shipped)})


def runs(incomplete: str) -> list[str]:
    """Returns runs in folders of this machine, and the folders that may hold some. A storage behind a URL is not
    contacted."""
    return _paths(incomplete, lambda path: (path / RECIPE).is_file())


def one_of(*values: str) -> Callable[[str], list[str]]:
    """Returns the completion of an option that takes one of these values."""

    def complete(incomplete: str) -> list[str]:
        return _starting(incomplete, values)

    return complete


def _starting(incomplete: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def _paths(incomplete: str, wanted: Callable[[Path], bool]) -> list[str]:
    """Returns the wanted paths that begin with ``incomplete``, and folders, with a slash at their end."""
    if "://" in incomplete:
        return []
    folder, _, start = incomplete.rpartition("/")
    lead = f"{folder}/" if "/" in incomplete else ""
    found = []
    try:
        for path in sorted(Path(lead or ".").expanduser().iterdir()):
            if path.name.startswith(start) and (start.startswith(".") or not path.name.startswith((".", "_"))):
                if wanted(path):
                    found.append(lead + path.name)
                elif path.is_dir():
                    found.append(f"{lead}{path.name}/")
    except OSError:
        return []
    # A shell puts a space after a single answer. So the only folder is answered by what is in it.
    if len(found) == 1 and found[0].endswith("/"):
        return _paths(found[0], wanted) or found
    return found
