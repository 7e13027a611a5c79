"""Loads a recipe from a file, a text or plain data, or reports all of its mistakes at once.

pydantic does not validate the parts around an invalid value. So every invalid value is replaced by a valid one and the
recipe is validated again, until no error is left. Then the rules across values are checked, without those that involve
a replaced value.
"""

from __future__ import annotations

import copy
import json
import pathlib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from trainer.errors import Mistake, RecipeError
from trainer.parsing import DEEPEST, is_deep
from trainer.recipe import plugins, synonyms
from trainer.recipe.base import STORED, KeyPath, show
from trainer.recipe.document import Document, read_json, read_yaml
from trainer.recipe.overrides import Applied, apply, expand
from trainer.recipe.root import Recipe
from trainer.recipe.sentences import path_of, sentence
from trainer.recipe.tree import annotation_at, dotted, field_at, section_of, stand_in, stand_in_for
from trainer.redact import redact
from trainer.registry import choose_hint

COMMAND_LINE, OVERRIDE = "command line", "override"
"""Where a mistake is that is in no file."""
LARGEST_RECIPE = 1 << 20
"""In bytes. A text of this size takes seconds to parse."""
LONGEST_PATH, LONGEST_MESSAGE = 200, 1500


SHIPPED = pathlib.Path(__file__).resolve().parents[2] / "recipes"


def shipped() -> dict[str, pathlib.Path]:
    """Returns the recipes that come with muster, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}


def recipe_name(text: str) -> str:
    """Returns a text as the name of a shipped recipe: ``qwen3-0.6b-chat`` is ``qwen3_0_6b_chat``."""
    return re.sub(r"[-.]", "_", text.lower())


class LocatedMistake(NamedTuple):
    """A mistake and the paths of the values that it involves, the main one first."""

    paths: tuple[KeyPath, ...]
    message: str


def load(path: str | pathlib.Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a ``.yaml`` or ``.json`` recipe, or a shipped one by its name, and applies ``KEY=VALUE`` overrides; raises
    RecipeError with all mistakes."""
    return loads(*read_file(path), overrides)


def read_file(path: str | pathlib.Path) -> tuple[bytes, str]:
    """Returns the bytes and the path of a recipe's file, or of a shipped recipe by its name; raises RecipeError."""
    named = shipped().get(recipe_name(path)) if isinstance(path, str) else None
    path = pathlib.Path(path)
    try:
        if named is not None and not path.is_file():
            path = named
        with path.open("rb") as file:
            body = file.read(LARGEST_RECIPE + 1)
    except FileNotFoundError:
        beside = tuple(file.name for kind in ("yaml", "yml", "json") for file in path.parent.glob(f"*.{kind}"))
        hint = choose_hint(path.name, beside) or (
            "; give the path of a recipe (.yaml or .json), or the name of a shipped one, which muster init lists"
            + choose_hint(recipe_name(path.stem), tuple(shipped()))
        )
        raise _one(str(path), f"there is no such file{hint}") from None
    except (OSError, ValueError) as error:
        raise _one(str(path), f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return body, str(path)


def load_with(source: str | pathlib.Path | dict[str, Any], values: Mapping[str, Any]) -> Recipe:
    """Reads a recipe from a file, by the name of a shipped one, or from plain data, and sets ``values`` by dotted key;
    raises RecipeError with all mistakes."""
    overrides = [f"{key}={json.dumps(value, ensure_ascii=False, default=str)}" for key, value in values.items()]
    try:
        return parse(source, overrides) if isinstance(source, dict) else load(source, overrides)
    except RecipeError as error:
        mistakes = (m._replace(where=OVERRIDE) if m.where == COMMAND_LINE else m for m in error.mistakes)
        raise RecipeError(tuple(mistakes)) from None


def loads(
    text: str | bytes,
    where: str = "recipe.yaml",
    overrides: Sequence[str] = (),
    *,
    stored: bool = False,
    imports: bool = True,
    known: Collection[str] = (),
) -> Recipe:
    """Reads a recipe from a text or its bytes, applies overrides; raises RecipeError with all mistakes.

    ``where``: the text's name in mistakes; the ending ``.json`` selects JSON, any other YAML. ``stored``: the text is
    the recipe of a run, where version 0.1 may have accepted credentials. Overrides are checked for them in any case.
    ``imports``, ``known``: see `plugins.use`; False for every text that is not the user's own.
    """
    if len(text) > LARGEST_RECIPE:
        raise _one(where, f"has more than {LARGEST_RECIPE:,} bytes; a recipe has a few thousand, and names its data")
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError as error:
            raise _one(where, f"is not UTF-8 text ({error.reason} at byte {error.start})") from None
    document = read_json(text) if where.endswith(".json") else read_yaml(text)
    if not isinstance(document.data, dict):
        raise RecipeError(tuple(_not_a_mapping(document, where)))
    data = document.data
    expand(data)
    missing, applied = _overridden(data, overrides, imports=imports, known=known)
    found, recipe = _validate(data, stored=stored)
    found = [*missing, *found]
    mistakes = [_mistake(f"{where}:{note.line}", note.path, note.message) for note in document.notes]
    mistakes += [_mistake(_where(f.paths, document, applied.paths, where), f.paths[0], f.message) for f in found]
    mistakes.sort(key=_line)
    mistakes += [_mistake(COMMAND_LINE, p, message) for p, message in applied.mistakes]
    if mistakes or recipe is None:
        raise RecipeError(tuple(mistakes))
    return recipe


def parse(data: dict[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Makes a recipe from plain data without changing the data, and applies overrides; raises RecipeError with all
    mistakes, without lines."""
    if is_deep(data):
        raise _one("recipe", f"is nested deeper than {DEEPEST} levels")
    if not isinstance(data, dict):
        raise _one("recipe", f"is a mapping of sections, got {show(data)}")
    data = copy.deepcopy(data)
    expand(data)
    missing, applied = _overridden(data, overrides, imports=True)
    found, recipe = _validate(data)
    mistakes = [
        _mistake(COMMAND_LINE if path in applied.paths else "recipe", path, message)
        for (path, *_), message in (*missing, *found)
    ]
    mistakes += [_mistake(COMMAND_LINE, path, message) for path, message in applied.mistakes]
    if mistakes or recipe is None:
        raise RecipeError(tuple(mistakes))
    return recipe


def given(text: str | bytes, where: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Returns a valid recipe (`loads` accepts it) as plain data with the overrides, without filled-in defaults."""
    text = text.decode() if isinstance(text, bytes) else text
    data: dict[str, Any] = (read_json(text) if where.endswith(".json") else read_yaml(text)).data
    expand(data)
    apply(data, overrides)
    expand(data)
    return data


def _overridden(
    data: dict[str, Any], overrides: Sequence[str], *, imports: bool, known: Collection[str] = ()
) -> tuple[list[LocatedMistake], Applied]:
    """Imports the plug-ins of the recipe with its overrides, whose keys are known only then, and applies the overrides
    to ``data``. Returns a mistake for each plug-in that cannot be imported. ``imports``, ``known``: see `plugins.use`.
    """
    apply(resolved := copy.deepcopy(data), overrides)
    missing = [LocatedMistake((path,), said) for path, said in plugins.use(resolved, imports=imports, known=known)]
    return missing, apply(data, overrides)


def _validate(data: dict[str, Any], *, stored: bool = False) -> tuple[list[LocatedMistake], Recipe | None]:
    """Returns all mistakes, and the recipe if there are none. Invalid values in ``data`` are replaced in place."""
    expand(data)
    found: list[LocatedMistake] = []
    replaced = plugins.drop_held(data)
    meant: set[str] = set()
    while True:
        try:
            # Through JSON: a strict model accepts a JSON list for a tuple, but not a Python list.
            recipe = Recipe.model_validate_json(json.dumps(data, default=str), context={STORED: stored})
            break
        except ValidationError as error:
            errors = error.errors(include_url=False)
        before = len(replaced)
        meant |= {synonyms.place_of(path_of(e)[-1]) for e in errors if e["type"] == "extra_forbidden"}
        for detail in errors:
            # The message about another trainer's word names the setting that is missing for it.
            is_named = detail["type"] == "missing" and dotted(path_of(detail)) in meant
            if path_of(detail) not in replaced and not is_named:
                found.append(LocatedMistake((path_of(detail),), sentence(detail)))
            replaced |= {path_of(detail), _replace(data, detail)}
        assert len(replaced) > before, f"nothing was replaced after {errors}"
    for conflict in recipe.conflicts():
        # Not if it involves a replaced value, or a value inside or around one.
        if not any(a[: len(b)] == b or b[: len(a)] == a for a in conflict.paths for b in replaced):
            found.append(LocatedMistake(*conflict))
    return found, None if found else recipe


def _replace(data: dict[str, Any], error: ErrorDetails) -> KeyPath:
    """Removes or replaces the value that caused the error; returns the path of the changed value."""
    path = path_of(error)
    if error["type"] == "extra_forbidden":
        _parent(data, path).pop(path[-1], None)
        return path
    # Up to the nearest field, or entry in a list of sections.
    while field_at(path) is None and not (isinstance(path[-1], int) and section_of(annotation_at(path))):
        path = path[:-1]
    field, parent = field_at(path), _parent(data, path)
    if field is None:
        parent[path[-1]] = stand_in(annotation_at(path))
    elif field.is_required():
        parent[path[-1]] = stand_in_for(field)
    else:
        parent.pop(path[-1], None)
    return path


def _parent(data: Any, path: KeyPath) -> Any:
    for key in path[:-1]:
        data = data[key]
    return data


def _where(paths: Sequence[KeyPath], document: Document, overridden: Sequence[KeyPath], file: str) -> str:
    """Returns the command line if it set one of the values, else the line of the nearest key in the file."""
    if any(path[: len(key)] == key for path in paths for key in overridden):
        return COMMAND_LINE
    path = paths[0]
    while path and path not in document.lines:
        path = path[:-1]
    return f"{file}:{document.lines.get(path, 1)}"


def _line(mistake: Mistake) -> tuple[bool, int]:
    """Returns a sort key: by line, the command line last."""
    _, _, line = mistake.where.rpartition(":")
    return (mistake.where == COMMAND_LINE, int(line) if line.isdecimal() else 0)


def _not_a_mapping(document: Document, where: str) -> list[Mistake]:
    if document.notes:
        return [_mistake(f"{where}:{note.line}", note.path, note.message) for note in document.notes]
    if document.data is None:
        return [_mistake(where, (), "is empty; a recipe is a mapping that begins with name: and model:")]
    return [_mistake(f"{where}:1", (), f"a recipe is a mapping of sections, got {show(document.data)}")]


def _mistake(where: str, path: KeyPath, message: str) -> Mistake:
    # Mistakes are printed and logged, and a message or a path may repeat credentials of the recipe.
    text = redact(message)
    cut = text[:LONGEST_MESSAGE] + "…" * (len(text) > LONGEST_MESSAGE)
    return Mistake(where, redact(dotted(path))[:LONGEST_PATH], cut)


def _one(where: str, message: str) -> RecipeError:
    return RecipeError((_mistake(where, (), message),))
