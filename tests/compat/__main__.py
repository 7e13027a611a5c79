"""``make compat``: runs the tests at both ends of the versions that muster allows, and prints a table.

Each end has an environment of its own under ``build/compat``: that of constraints.txt, in which the libraries of
``RANGES`` are replaced by the oldest or the newest versions of pyproject.toml's ranges. torch stays, since another
version may be a build for GPUs.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
import tomllib
import venv
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENDS = ("oldest", "newest")
RANGES = ("ray", "transformers", "peft", "accelerate", "bitsandbytes")
SHOWN = (*RANGES, "torch", "deepspeed", "datasets")
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
    rows += [(name, *(versions[name] for versions, _ in found.values())) for name in SHOWN]
    rows += [(name, *(str(outcomes[name]) for _, outcomes in found.values())) for name in CHECKS]
    for number, row in enumerate(rows):
        print(f"| {' | '.join(row)} |")
        if number == 0:
            print("|---" * len(row) + "|")
    return 0 if all(outcome.passed for _, outcomes in found.values() for outcome in outcomes.values()) else 1


def _examine(end: str) -> tuple[dict[str, str], dict[str, Outcome]]:
    """Returns the versions that pip has chosen, and the outcome of each check."""
    folder = ROOT / "build" / "compat" / end
    python, whole = folder / "bin" / "python", folder / "installed"
    if not whole.exists():
        venv.create(folder, clear=True, with_pip=True, upgrade_deps=True)
    pip = [python, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "-e", ".[dev]", "-c", "constraints.txt"], cwd=ROOT, check=True)
    subprocess.run([*pip, "--upgrade", *_requirements(end)], cwd=ROOT, check=True)
    whole.touch()
    return _versions(python), {name: _run(end, python, name) for name in CHECKS}


def _requirements(end: str) -> list[str]:
    """Returns the libraries of ``RANGES`` as pyproject.toml has them, or with their lower bounds only."""
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    found = [line for line in asked if re.split(r"[\[><=]", line)[0] in RANGES]
    return [re.sub(r">=([\d.]+).*", r"==\1", line) for line in found] if end == "oldest" else found


def _versions(python: Path) -> dict[str, str]:
    asked = f"from importlib.metadata import version; print(*map(version, {SHOWN!r}))"
    told = subprocess.run([python, "-c", asked], check=True, capture_output=True, text=True).stdout
    return dict(zip(SHOWN, told.split(), strict=True))


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
