"""Writes the tables of docs/models.md from the rows in tests/golden/families.json: ``make families``."""

from __future__ import annotations

import json
import pathlib
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
ROWS = ROOT / "tests" / "golden" / "families.json"
PAGE = pathlib.Path("docs/models.md")
BEGIN = "<!-- From here on, the page is made by `make families`. -->\n"

LONGEST = 240
CHECKS = ("plain", "gradients", "reload", "merge", "fsdp", "nf4", "nf4_fsdp")
SIGNS = {"ok": "=", "refused": "refused", "fault": "**fails**"}
COLUMNS = ("model type", "has", "packing", "attention", "adapted", *(check.replace("_", ", ") for check in CHECKS))


def pages() -> dict[pathlib.Path, str]:
    """Returns the text of the page, by its path below the project's root: what was written by hand, and the tables."""
    written = (ROOT / PAGE).read_text(encoding="utf-8").partition(BEGIN)[0]
    return {PAGE: written + BEGIN + "\n" + "\n".join(_tables(json.loads(ROWS.read_text(encoding="utf-8")))) + "\n"}


def _tables(stored: dict[str, Any]) -> Iterator[str]:
    made = {name: row for name, row in stored["rows"].items() if "not_made" not in row}
    good = [name for name, row in made.items() if all(row.get(check) == "ok" for check in CHECKS)]
    yield f"Examined: {len(stored['rows'])} of the {stored['known']} causal language models of transformers"
    yield f"{stored['transformers']}. {len(good)} of {len(made)} small models pass every check.\n"
    yield f"| {' | '.join(COLUMNS)} |"
    yield "|---" * len(COLUMNS) + "|"
    for name, row in made.items():
        yield f"| {' | '.join(_cells(name, row))} |"
    left = {name: row["left_out"] for name, row in made.items() if row.get("left_out")}
    yield "\n## What has no adapter under `all-linear`\n"
    yield "Weights that are more than 1 % of those between the embeddings of the small model:\n"
    for name, shares in left.items():
        yield f"- `{name}`: {', '.join(f'`{weight}` {share:.0%}' for weight, share in shares.items())}"
    for sign, title in (("refused", "What is refused, and why"), ("fault", "What fails")):
        reasons = _grouped(made, sign)
        if reasons:
            yield f"\n## {title}\n"
            yield from (f"- {reason} ({', '.join(names)})" for reason, names in reasons.items())
    yield "\n## What warnings say\n"
    warnings: dict[str, list[str]] = defaultdict(list)
    for name, row in made.items():
        said = [*row.get("warnings", []), *row.get("fsdp_warnings", [])]
        for warning in dict.fromkeys(_text(text, row) for text in said):
            warnings[warning].append(f"`{name}`")
    yield from (f"- {warning} ({', '.join(names)})" for warning, names in warnings.items())
    if len(made) < len(stored["rows"]):
        yield "\n## Not measured\n"
        yield "No small model of these could be made that transformers runs on text alone:\n"
    for name, row in stored["rows"].items():
        if "not_made" in row:
            yield f"- `{name}`: {_text(row['not_made'], row)}"


def _cells(name: str, row: dict[str, Any]) -> Iterator[str]:
    yield f"`{name}`"
    yield ", ".join(row["kinds"])
    yield ("yes" if row["packing"] else "no") if "losses" in row else ""
    yield row.get("kernel", "")
    yield f"{row['adapted']:.0%}" if "adapted" in row else ""
    for check in CHECKS:
        sign = SIGNS.get(row.get(check, "").partition(":")[0], "")
        yield f"{sign} (loaded whole)" if sign == "=" and row.get(f"{check}_load") == "whole" else sign


def _grouped(rows: dict[str, Any], sign: str) -> dict[str, list[str]]:
    """Returns the architectures by the reason for which a check ended with ``sign``."""
    found: dict[str, list[str]] = defaultdict(list)
    for name, row in rows.items():
        reasons = {check: row[check] for check in CHECKS if row.get(check, "").startswith(f"{sign}: ")}
        if sign == "refused" and "unpacked" in row:
            reasons["packing"] = row["unpacked"]
        for check, reason in reasons.items():
            text = _text(reason.removeprefix(f"{sign}: "), row)
            found[f"{check.replace('_', ', ')}: {text}"].append(f"`{name}`")
    return dict(found)


def _text(reason: str, row: dict[str, Any]) -> str:
    """Returns the reason as text that Markdown leaves as it is, the same for all models that have it."""
    for name in {row.get("class_name"), row["model_type"]} - {None}:
        reason = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "MODEL", reason)
    plain = re.sub(r"(?<!\w)\d[\d.]*(e[+-]\d+)?(?!\w)", "N", reason).replace("`", "'")
    return f"`{plain[:LONGEST]}{'…' if plain[LONGEST:] else ''}`"


def main() -> None:
    for path, text in pages().items():
        (ROOT / path).write_text(text, encoding="utf-8")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
