"""``make compat``: runs the tests at both ends of the versions that muster allows, and prints a table.

Each end has an environment of its own under ``build/compat`` and a file of constraints in this folder. torch is the
same in both, since a machine has one build of it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
import venv
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ENDS = ("oldest", "newest")
LIBRARIES = ("ray", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "deepspeed", "datasets")
ELASTIC = "tests/cluster/test_ray.py::test_a_run_follows_the_hosts_that_come_and_go"
CHECKS: dict[str, tuple[str, ...]] = {
    "unit tests": ("-m", "pytest", "-q", "-n", "2", "tests/unit"),
    "tests/ray": ("-m", "pytest", "-q", "tests/ray"),
    "quickstart": ("-m", "launcher.quickstart", "storage={empty}"),
    "elastic recovery": ("-m", "pytest", "-q", "-rs", ELASTIC),
}


@dataclass(frozen=True)
class Outcome:
    """``counts``: what pytest says of the tests, such as ``20 passed, 1 skipped``."""

    passed: bool
    counts: str
    seconds: float

    def __str__(self) -> str:
        return f"{'ok' if self.passed else 'FAILED'}, {self.counts or 'one run'} ({self.seconds:.0f} s)"


def main(ends: list[str]) -> int:
    """Returns 0 if all checks passed at all ``ends``, by default at both."""
    found = {end: _examine(end) for end in ends or ENDS}
    rows = [("", *found)]
    rows += [(name, *(versions[name] for versions, _ in found.values())) for name in LIBRARIES]
    rows += [(name, *(str(outcomes[name]) for _, outcomes in found.values())) for name in CHECKS]
    for number, row in enumerate(rows):
        print(f"| {' | '.join(row)} |")
        if number == 0:
            print("|---" * len(row) + "|")
    return 0 if all(outcome.passed for _, outcomes in found.values() for outcome in outcomes.values()) else 1


def _examine(end: str) -> tuple[dict[str, str], dict[str, Outcome]]:
    """Returns the versions that pip has chosen, and the outcome of each check."""
    folder = ROOT / "build" / "compat" / end
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True, upgrade_deps=True)
    install = ["-m", "pip", "install", "--quiet", "--upgrade", "-e", ".[dev]", "-c", str(HERE / f"{end}.txt")]
    subprocess.run([python, *install], cwd=ROOT, check=True)
    return _versions(python), {name: _run(end, python, name) for name in CHECKS}


def _versions(python: Path) -> dict[str, str]:
    asked = f"from importlib.metadata import version; print(*map(version, {LIBRARIES!r}))"
    told = subprocess.run([python, "-c", asked], check=True, capture_output=True, text=True).stdout
    return dict(zip(LIBRARIES, told.split(), strict=True))


def _run(end: str, python: Path, name: str) -> Outcome:
    log = ROOT / "build" / "compat" / f"{end}-{name.replace(' ', '-').replace('/', '-')}.log"
    print(f"{end}: {name}, see {log.relative_to(ROOT)}", file=sys.stderr, flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as empty, log.open("w") as out:
        command = [python, *(word.format(empty=empty) for word in CHECKS[name])]
        code = subprocess.run(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT).returncode
    counts = re.findall(r"\d+ (?:passed|failed|skipped|error)", log.read_text(errors="replace")[-300:])
    return Outcome(code == 0, ", ".join(counts), time.monotonic() - began)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
