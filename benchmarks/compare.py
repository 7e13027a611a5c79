"""What moved between two results of a benchmark, beyond the spread of their rounds.

    .venv/bin/python benchmarks/compare.py BEFORE.json AFTER.json [--all]

A figure has moved when the ranges of its rounds do not meet and its median is another by more than 3 %. Figures of
different machines are compared all the same, and the difference is said. Ends with 0 whatever has moved.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.results import moves, read  # noqa: E402


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Of what the figures depend on; the load is no difference."""
    found = []
    for part in ("machine", "versions"):
        names = [n for n in {**before[part], **after[part]} if n != "load"]
        found += [
            f"{name}: {before[part].get(name, 'none')} → {after[part].get(name, 'none')}"
            for name in names
            if before[part].get(name) != after[part].get(name)
        ]
    return found


def report(before: dict[str, Any], after: dict[str, Any], *, everything: bool = False) -> str:
    """Markdown. ``everything``: with the figures that have not moved."""
    if before["benchmark"] != after["benchmark"]:
        raise ValueError(f"{before['benchmark']} and {after['benchmark']} are not the same benchmark")
    found = moves(before["figures"], after["figures"])
    shown = found if everything else [move for move in found if move.beyond]
    lines = [f"- {line}" for line in differences(before, after)]
    if shown:
        lines += ["", "| figure | before | after | change | moved |", "|---|---|---|---|---|"]
    for move in shown:
        said = "yes" if move.beyond else ""
        lines.append(f"| {move.name} | {move.before} | {move.after} | {move.change - 1:+.1%} | {said} |")
    moved = sum(move.beyond for move in found)
    lines += ["", f"{moved} of {len(found)} figures moved beyond their spread"]
    for one, other, where in ((before, after, "before"), (after, before, "after")):
        only = [name for name in one["figures"] if name not in other["figures"]]
        lines += [f"only {where}: {', '.join(only)}"] if only else []
    return "\n".join(lines).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description="Show what moved between two results of a benchmark.")
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--all", action="store_true", help="show what has not moved, too")
    options = parser.parse_args()
    try:
        print(report(read(options.before), read(options.after), everything=options.all))
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
