"""Writes docs/recipe.md and recipes/recipe.schema.json from the model in `trainer/recipe/`: ``make schema``."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator
from typing import Any

from pydantic.fields import FieldInfo

from trainer.recipe.base import KeyPath, Section
from trainer.recipe.compatibility import RULES
from trainer.recipe.formats import FORMATS, formats_of
from trainer.recipe.matrix import alike, axes, refusals, sides_of, signs, values_of
from trainer.recipe.methods import METHODS
from trainer.recipe.root import Recipe
from trainer.recipe.sections.datasets import DATASETS
from trainer.recipe.tasks import TASKS
from trainer.recipe.tree import dotted, element, section_of
from trainer.recipe.writing import changeable, schema

ROOT = pathlib.Path(__file__).resolve().parents[2]

HEAD = """# The recipe

Made from the model in `trainer/recipe/` by `make schema`; change the text under the fields there, not here.

A recipe is a YAML file (or the same in JSON, ending in `.json`). Unknown keys and wrong types are refused; `muster
validate RECIPE` lists every mistake with its line. Any value can be set on the command line by its dotted path, an
entry of a list by its index from 0:

```sh
muster run recipes/quickstart.yaml optimizer.lr=1e-4 data.train.0.weight=2 training.max_grad_norm=null
```

YAML is read by the rules of version 1.2: `1e-4` is a number, only `true` and `false` are truth values. The first line
`# yaml-language-server: $schema=recipe.schema.json` gives editors completion and checks. Tags (`!!binary`) are refused,
and so is a text of more than 1 MiB, more than 100,000 values (aliases expanded), 100 levels or 100 digits of a number.
"""


def pages() -> dict[pathlib.Path, str]:
    """Returns the text of each generated file, by its path below the project's root."""
    return {
        pathlib.Path("docs/recipe.md"): markdown(),
        pathlib.Path("recipes/recipe.schema.json"): json.dumps(schema(), indent=2, ensure_ascii=False) + "\n",
    }


def markdown() -> str:
    parts = [HEAD, *_sections(Recipe, ()), _methods(), _columns(), _datasets(), _rules(), _matrix(), _changes()]
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
    takes = "a section" if inner else "a list of sources" if section_of(element(field.annotation)) else shape(described)
    cells = (f"`{name}`", takes, _default(field), about)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def shape(described: dict[str, Any]) -> str:
    """Describes the JSON Schema of one value in a few words."""
    if "anyOf" in described:
        return " or ".join(shape(option) for option in described["anyOf"])
    if "enum" in described:
        return ", ".join(f"`{name}`" for name in described["enum"])
    if described.get("type") == "array":
        if "prefixItems" in described:
            return f"[{', '.join(shape(item) for item in described['prefixItems'])}]"
        return f"a list of {shape(described.get('items', {}))}"
    words = {"integer": "whole number", "number": "number", "string": "text", "boolean": "`true`, `false`"}
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
    head = ["## Methods", "", "What a recipe leaves out is filled in with these.", ""]
    head += ["| `adapter.method` | | takes, with its defaults | `optimizer.lr` to begin with | source |"]
    rows = []
    for name, method in METHODS.items():
        if name == "none":
            continue  # it takes nothing
        values = {key: json.dumps(value).strip('"') for key, value in method.settings.items()}
        settings = ", ".join(f"`{key}: {value}`" for key, value in values.items())
        rows.append(f"| `{name}` | {method.what} | {settings} | {method.lr:g} | {method.source} |")
    return "\n".join([*head, "|---|---|---|---|---|", *rows, ""])


def _columns() -> str:
    rows = []
    for name, row in FORMATS.items():
        cells = (f"`{column}`{' (may be missing)' * (column in row.optional)}" for column in row.columns)
        rows.append(f"| `{name}` | {', '.join(cells)} |")
    head = ["## Columns of a format", "", "| format | reads the columns |", "|---|---|"]
    tasks = [f"Task `{task}` learns from {', '.join(f'`{f}`' for f in formats_of(task))}." for task in TASKS.names()]
    return "\n".join([*head, *rows, "", *tasks, ""])


def _datasets() -> str:
    rows = [f"| `{name}` | `{d.path}` | `{d.format}` |" for name, d in DATASETS.items()]
    head = ["## Known data sets", "", "| `dataset` | path | format |", "|---|---|---|"]
    return "\n".join([*head, *rows, ""])


def _rules() -> str:
    # Pairs only: the message of `validate` gives the reason.
    head = [
        "## What is checked together",
        "",
        "`validate` refuses values of these settings that cannot work together:",
        "",
    ]
    pairs = [rule.paths for rule in RULES] + [(("task",), ("data", "train", 0, "format"))]
    return "\n".join([*head, *(f"- {' with '.join(f'`{dotted(path)}`' for path in paths)}" for paths in pairs), ""])


def _matrix() -> str:
    lines = ["## What works together", "", "`x` unquantised, `4` nf4, `8` int8; `muster matrix` prints the same.", ""]
    strategies = axes()["strategy"]
    for tasks in alike(axes()["task"]):
        names = ", ".join(f"`{task}`" for task in tasks)
        lines += [f"| {names} | {' | '.join(f'`{s}`' for s in strategies)} |", "|---|" + "---|" * len(strategies)]
        for method in axes()["method"]:
            works = (signs(method, strategy, tasks[0]) for strategy in strategies)
            lines.append(f"| `{method}` | {' | '.join(' '.join(w).strip() for w in works)} |")
        lines.append("")
    lines += ["Why the others do not:", ""]
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
