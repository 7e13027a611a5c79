"""``make families``: examines every architecture, or the given ones, and writes their rows and docs/models.md."""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from pathlib import Path

import transformers

from tests.families.bases import architectures
from tests.families.rows import FILE, examine_all, outcomes

PAGE = Path(__file__).resolve().parents[2] / "docs" / ".site" / "models_table.py"


def main(chosen: list[str]) -> int:
    """Returns 1 if a check found a fault, which is any way to end but success and a refusal in a sentence."""
    known, began = architectures(), time.monotonic()
    if unknown := sorted(set(chosen) - set(known)):
        print(f"transformers {transformers.__version__} has no causal language model {', '.join(unknown)}")
        return 2
    stored = json.loads(FILE.read_text())["rows"] if FILE.exists() else {}
    rows = {name: row for name, row in stored.items() if name in known}
    faults = 0
    for row in examine_all(chosen or known, os.cpu_count() or 1):
        name = row["model_type"]
        rows[name] = row
        found = outcomes(row)
        faults += "fault" in found.values()
        print(f"{name}: {row.get('not_made') or ', '.join(f'{c} {o}' for c, o in found.items())}", flush=True)
    body = {"transformers": transformers.__version__, "known": len(known), "rows": dict(sorted(rows.items()))}
    FILE.write_text(json.dumps(body, indent=1, ensure_ascii=False) + "\n")
    runpy.run_path(str(PAGE), run_name="__main__")
    print(f"{len(chosen or known)} architectures, {faults} with faults, {time.monotonic() - began:.0f} s")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
