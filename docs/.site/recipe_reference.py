"""Writes docs/recipe.md and recipes/recipe.schema.json from the model in `trainer/recipe/`: ``make schema``."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from pydantic.fields import FieldInfo

from trainer.recipe.base import KeyPath, Section
from trainer.recipe.methods import METHODS
from trainer.recipe.root import Recipe
from trainer.recipe.rules.compatibility import RULES
from trainer.recipe.rules.matrix import refusals, sides_of, values_of
from trainer.recipe.sections.datasets import DATASETS
from trainer.recipe.tree import dotted, element, section_of
from trainer.recipe.writing import changeable, schema
from trainer.registry import CODE

ROOT = pathlib.Path(__file__).resolve().parents[2]
CITATION = re.compile(r"^(arXiv:[\d.]+(?:, (?:section|appendix) [\w.]+)?): .*")
"""Where a default is from; what is said there stands behind the colon, in the table of methods."""

HEAD = """# Every setting of a recipe

A recipe is a YAML file (or the same in JSON, ending in `.json`) that names everything about a run. A short one is
enough, as the [first recipe](../README.md#a-recipe-of-your-own) shows: only what is *required* below has to be given.
Unknown keys and wrong types are refused; `muster validate RECIPE` lists every mistake with its line. Any value can be
set on the command line by its dotted path, an entry of a list by its index from 0:

```sh
muster run recipes/quickstart.yaml optimizer.lr=1e-4 data.train.0.weight=2 training.max_grad_norm=null
```

YAML is read by the rules of version 1.2: `1e-4` is a number, and only `true` and `false` are booleans. The first line
`# yaml-language-server: $schema=recipe.schema.json` gives editors completion and checks. These are refused: tags
(`!!binary`), a text of more than 1 MiB, more than 100,000 values (aliases expanded), more than 100 levels, and numbers
of more than 100 digits.

<!-- Made by `make schema` from the fields in trainer/recipe/: change the text there. -->
"""


def pages() -> dict[pathlib.Path, str]:
    """Returns the text of each generated file, by its path below the project's root."""
    return {
        pathlib.Path("docs/recipe.md"): markdown(),
        pathlib.Path("recipes/recipe.schema.json"): json.dumps(schema(), indent=2, ensure_ascii=False) + "\n",
    }


def markdown() -> str:
    parts = [HEAD, *_sections(Recipe, ()), _methods(), _datasets(), _rules(), _matrix(), _changes()]
    return "\n".join(parts)


def _sections(section: type[Section], path: KeyPath) -> Iterator[str]:
    """Yields a table per section: the section itself, then those inside it, in the order of the file."""
    name = dotted(path) or "Top level"
    title = f"## {name} (each entry, of eval too)" if path == ("data", "train") else f"## {name}"
    shapes = schema()["$defs"].get(section.__name__, schema())["properties"]
    rows = [_row((*path, name), field, shapes[name]) for name, field in section.model_fields.items()]
    lines = [
        title,
        "",
        _one_line(section.__doc__ or ""),
        "",
        "| key | takes | default | |",
        "|---|---|---|---|",
        *rows,
        "",
    ]
    yield "\n".join(lines)
    for name, field in section.model_fields.items():
        inner = section_of(element(field.annotation) or field.annotation)
        if inner is not None and inner is not section and (path, name) != (("data",), "eval"):
            yield from _sections(inner, (*path, name))


def _row(path: KeyPath, field: FieldInfo, described: dict[str, Any]) -> str:
    inner, name = section_of(field.annotation), path[-1]
    # The heading's anchor: its letters, without the dots.
    about = f"see [{name}](#{dotted(path).replace('.', '')})" if inner else _one_line(field.description or "")
    users = [method for method, row in METHODS.items() if path == ("adapter", name) and name in row.settings]
    if 0 < len(users) < 7:  # settings that most methods have need no list
        about = f"With {', '.join(f'`{method}`' for method in users)}: {about[0].lower()}{about[1:]}"
    takes = "a section" if inner else "a list of sources" if section_of(element(field.annotation)) else shape(described)
    cells = (f"`{name}`", takes, _default(field), about)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def shape(described: dict[str, Any]) -> str:
    """Describes the JSON Schema of one value in a few words."""
    if "anyOf" in described:
        return " or ".join(shape(option) for option in described["anyOf"])
    if described.get("pattern") == f"^{CODE.pattern}$":
        return "`package.module:NAME`"
    if "enum" in described:
        return ", ".join(f"`{name}`" for name in described["enum"])
    if described.get("type") == "array":
        if "prefixItems" in described:
            return f"[{', '.join(shape(item) for item in described['prefixItems'])}]"
        return "a list of " + re.sub("^(integer|number)", r"\1s", shape(described.get("items", {})))
    words = {"integer": "integer", "number": "number", "string": "text", "boolean": "`true`, `false`"}
    words |= {"null": "`null`", "object": "a mapping"}
    comparisons = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {described[key]:g}" for key, sign in comparisons.items() if key in described]
    return words[described["type"]] + (f" {', '.join(bounds)}" if bounds else "")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Section):
        return "its defaults"
    return f"`{json.dumps(value)}`" if not isinstance(value, str) else f"`{value}`"


def _methods() -> str:
    lists = "`modules_to_save`, `trainable_tokens`"
    head = ["## Methods", "", f"A recipe that leaves a setting out gets these defaults; lists ({lists}) are empty.", ""]
    head += ["| `adapter.method` | | takes, with its defaults | `optimizer.lr` to begin with | source |"]
    rows = []
    for name, method in METHODS.items():
        if name == "none":
            continue  # it takes nothing
        values = {key: json.dumps(value).strip('"') for key, value in method.settings.items()}
        settings = ", ".join(f"`{key}: {value}`" for key, value in values.items() if value != "[]")
        source = CITATION.sub(r"\1", method.source)
        rows.append(f"| `{name}` | {method.what} | {settings} | {method.lr:g} | {source} |")
    return "\n".join([*head, "|---|---|---|---|---|", *rows, ""])


def _datasets() -> str:
    rows = [f"| `{name}` | `{d.path}` | `{d.format}` |" for name, d in DATASETS.items()]
    head = ["## Known data sets", "", "| `dataset` | path | format |", "|---|---|---|"]
    return "\n".join([*head, *rows, ""])


def _rules() -> str:
    # Names only: the message of `validate` gives the reason.
    pairs: dict[str, list[str]] = {}
    for first, *others in [*(rule.paths for rule in RULES), (("task",), ("data", "train", 0, "format"))]:
        pairs.setdefault(dotted(first), []).append(" and ".join(f"`{dotted(path)}`" for path in others))
    head = ["## What is checked together", "", "Some values of these settings exclude each other:", ""]
    return "\n".join([*head, *(f"- `{first}` and {', '.join(others)}" for first, others in pairs.items()), ""])


def _matrix() -> str:
    lines = ["## What works together", ""]
    lines += ["Every method works with every quantisation, strategy and task, except for these combinations. `muster"]
    lines += ["matrix` prints the table, and `muster validate` names the nearest choice that works.", ""]
    for refused in refusals():
        sides = (
            f"{side} {', '.join(f'`{value}`' for value in values_of(refused, side))}" for side in sides_of(refused)
        )
        lines.append(f"- {' with '.join(sides)}: {refused.why}.")
    return "\n".join([*lines, ""])


def _changes() -> str:
    names = ", ".join(f"`{dotted(path)}`" for path in changeable())
    text = (
        "The recipe is frozen into the run at its first start. Between attempts only these may change, since they do "
        f"not decide the result: {names}. The run reports each change, and an event records it. `training.steps` or "
        "`training.epochs` may grow, also of a finished run, if no step depends on the length of the run: with "
        "`schedule.name: constant`, without `warmup_ratio`, and with any method but "
        f"{', '.join(f'`{name}`' for name, row in METHODS.items() if row.spans_run)}."
    )
    return "\n".join(["## What may change when a run is resumed", "", text, ""])


def _one_line(text: str) -> str:
    return " ".join(text.split())


def main() -> None:
    for path, text in pages().items():
        (ROOT / path).parent.mkdir(exist_ok=True)
        (ROOT / path).write_text(text, encoding="utf-8")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
