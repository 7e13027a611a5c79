"""muster against what a user would take instead: the same model, rows, LoRA, length and number of optimizer steps.

    .venv/bin/python benchmarks/throughput.py                           all cases, about 25 minutes on two cores
    .venv/bin/python benchmarks/throughput.py small-gsm8k --rounds 5    some; --list names them
    .venv/bin/python benchmarks/throughput.py --json NOW.json           for benchmarks/compare.py

Peers are trl's SFTTrainer, padded as by default and packed, transformers' Trainer, and LLaMA-Factory, which is only
there with ``--llamafactory``, since it takes minutes and 7 GB to install. Each has an environment of its own, from the
package index, which is kept (`benchmarks/environments.py`). All train in float32 without gradient checkpointing, at the
same number of threads. ``bare`` is a plain torch loop over muster's batches with muster's loss.

Runs take turns, one process (or one torchrun) after the other; ratios are of neighbours, their median over the rounds
with the least and the greatest. Rates are of all steps after the first few. Whoever packs gets full packs, whoever pads
so many rows that a forward pass has about as many places. The case ``loop`` looks for a difference that is smaller than
what a machine does to one process and not to the next: there the two take turns step by step, in one process. Ends with
0 whatever the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.contenders import Job  # noqa: E402
from benchmarks.environments import NotInstalled, home, python_of  # noqa: E402
from benchmarks.results import Spread, ratio, write  # noqa: E402
from benchmarks.workloads import CASES, Case, write_data, write_model  # noqa: E402

RUN_S = 600
OURS = "muster"
ENVIRONMENTS = {"trl": "trl", "trl-packed": "trl", "llamafactory": "llamafactory"}
"""Sides that have a Python of their own; the others run in this one."""


class Aim(NamedTuple):
    """``of`` over ``against`` in ``figure``, of which the ratio should be at least (``most``: at most) ``bound``."""

    against: str
    figure: str
    bound: float
    most: bool = False
    of: str = OURS

    def text(self) -> str:
        return f"{'≤' if self.most else '≥'} {self.bound:g}"

    def met(self, median: float) -> bool:
        return median <= self.bound if self.most else median >= self.bound


@dataclass(frozen=True)
class Comparison:
    """Sides that take turns on a case, run by run, or ``together``, step by step in one process. A side is ``name`` or
    ``name-xprocesses``. ``longer``: how many times the case's steps."""

    case: str
    sides: tuple[str, ...]
    aims: tuple[Aim, ...] = ()
    longer: int = 1
    together: bool = False


PEERS = (OURS, "trl", "trl-packed", "transformers")
TWO = f"{OURS}-x2"
COMPARISONS = {
    "small-gsm8k": Comparison("small-gsm8k", PEERS, (Aim("trl", "tokens/s", 2.0),)),
    "small-chat": Comparison("small-chat", PEERS, (Aim("trl", "tokens/s", 3.0),)),
    "100m-32k": Comparison("100m-32k", PEERS, (Aim("trl-packed", "tokens/s", 1.35),)),
    "100m-128k": Comparison(
        "100m-128k",
        (OURS, "trl-packed"),
        (Aim("trl-packed", "tokens/s", 1.9), Aim("trl-packed", "peak MiB", 0.7, most=True)),
    ),
    "loop": Comparison("small-gsm8k", (OURS, "bare"), (Aim("bare", "tokens/s", 0.98),), 3, together=True),
    "two": Comparison(
        "small-gsm8k", (OURS, TWO, "trl", "trl-x2"), (Aim(OURS, "tokens/s", 1.7, of=TWO),)
    ),
}  # fmt: skip


class Figures(NamedTuple):
    """Of a run. Rates count what carries data, over all ranks; the peak is that of all processes together."""

    tokens_per_s: float
    targets_per_s: float
    peak_mib: float


NAMES = ("tokens/s", "target tokens/s", "peak MiB")


def figures(ranks: Sequence[dict[str, Any]], warm: int) -> Figures:
    """Of what each rank wrote, without the first ``warm`` steps. Raises ValueError when there are no others."""
    steps = len(ranks[0]["seconds"])
    if steps <= warm:
        raise ValueError(f"{steps} steps leave none after the first {warm}")
    seconds = sum(ranks[0]["seconds"][warm:])
    fed = [sum(sum(rank[what][warm:steps]) for rank in ranks) for what in ("tokens", "targets")]
    return Figures(fed[0] / seconds, fed[1] / seconds, sum(rank["peak_mib"] for rank in ranks))


@dataclass
class Bench:
    """Models, data and environments that are there once they were needed."""

    folder: Path
    environments: Path
    threads: int
    profile: Path | None = None
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    runs: int = 0

    def run(self, comparison: Comparison, side: str) -> list[Figures]:
        """One run of a side, in processes of its own, or of several (``one+other``) in one: the figures of each. Raises
        NotInstalled for a peer that is not to be had."""
        name, _, processes = side.partition("-x")
        case, world = CASES[comparison.case], int(processes or 1)
        python = python_of(ENVIRONMENTS[name], self.environments) if name in ENVIRONMENTS else sys.executable
        model, data = self._inputs(comparison.case, case)
        self.runs += 1
        job = Job(
            side=name,
            model=str(model),
            data=str(data),
            out=str(self.folder / f"{name.replace('+', '-')}-{self.runs}"),
            length=case.length,
            packs=case.packs,
            rows=case.rows,
            steps=case.warm + (case.steps - case.warm) * comparison.longer,
            warm=case.warm,
            threads=self.threads,
            world=world,
            profile=str(self.profile / f"{comparison.case}-{side}.txt") if self.profile else None,
        )
        ranks = launch(python, job)
        self.versions[side] = ranks[0]["versions"]
        return [figures([one], case.warm) for one in ranks] if "+" in name else [figures(ranks, case.warm)]

    def _inputs(self, name: str, case: Case) -> tuple[Path, Path]:
        folder = self.folder / name
        model, data = folder / "model", folder / "rows.jsonl"
        if not data.exists():
            folder.mkdir()
            write_model(case.shape, model)
            write_data(case, data)
        return model, data


def launch(python: str, job: Job) -> list[dict[str, Any]]:
    """What each rank of the job wrote. Raises RuntimeError, with its last words, when it failed."""
    told = Path(f"{job.out}.json")
    told.write_text(json.dumps(asdict(job)))
    program = [str(Path(__file__).with_name("contenders.py")), str(told)]
    several = ["-m", "torch.distributed.run", f"--nproc-per-node={job.world}", f"--master-port={free_port()}"]
    done = subprocess.run(
        [python, *(several if job.world > 1 else []), *program],
        capture_output=True,
        text=True,
        timeout=RUN_S,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": str(job.threads), "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        raise RuntimeError(f"{job.side} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
    return [json.loads(written.read_text()) for written in sorted(told.parent.glob(f"{Path(job.out).name}-*.json"))]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def measure(bench: Bench, comparison: Comparison, rounds: int) -> dict[str, list[Figures]]:
    """By side, one run per round; sides that cannot be installed are left out, and ``bench.missing`` says why."""
    found: dict[str, list[Figures]] = defaultdict(list)
    runs = ("+".join(comparison.sides),) if comparison.together else comparison.sides
    for turn in range(rounds):
        # Back and forth, so that a machine that slowly gets busier favours nobody.
        for side in runs if turn % 2 == 0 else runs[::-1]:
            if side in bench.missing:
                continue
            try:
                for name, run in zip(side.split("+"), bench.run(comparison, side), strict=True):
                    found[name].append(run)
                    print(f"round {turn + 1}: {name}: {run.tokens_per_s:.0f} tokens/s", file=sys.stderr, flush=True)
            except NotInstalled as reason:
                bench.missing[side] = str(reason)
                print(f"{side} is left out: {reason}", file=sys.stderr)
    return found


def table(name: str, comparison: Comparison, found: dict[str, list[Figures]]) -> list[str]:
    """Rows of Markdown, one for each side, in the order of the comparison."""
    rows = []
    for side in (side for side in comparison.sides if side in found):
        rates = [str(round(Spread.of(values).median)) for values in zip(*found[side], strict=True)]
        against = ["", ""] if side == OURS else [str(relation(found, OURS, side, i)) for i in (0, 2)]
        if comparison.together:  # one process, whose memory is that of both
            rates[2] = against[1] = ""
        rows.append(f"| {name} | {side} | {' | '.join([*rates, *against])} |")
    return rows


def relation(found: dict[str, list[Figures]], of: str, against: str, index: int) -> Spread:
    return ratio([run[index] for run in found[of]], [run[index] for run in found[against]])


def judged(name: str, comparison: Comparison, found: dict[str, list[Figures]]) -> list[str]:
    lines = []
    for aim in comparison.aims:
        if aim.of not in found or aim.against not in found:
            continue
        got = relation(found, aim.of, aim.against, NAMES.index(aim.figure))
        said = "" if aim.met(got.median) else ", **missed**"
        lines.append(f"- {name}: {aim.of} / {aim.against} in {aim.figure}: {got}, aim {aim.text()}{said}")
    return lines


HEAD = """| case | side | tokens/s | target tokens/s | peak MiB | muster's rate / its | muster's peak / its |
|---|---|---|---|---|---|---|"""


def main() -> None:
    options = parsed()
    every: dict[str, list[float]] = {}
    verdicts: list[str] = []
    print(HEAD, flush=True)
    with tempfile.TemporaryDirectory(prefix="muster-throughput-") as folder:
        bench = Bench(Path(folder), options.environments, options.threads, options.profile)
        for name in options.cases or list(COMPARISONS):
            comparison = chosen(COMPARISONS[name], options)
            found = measure(bench, comparison, options.rounds)
            print("\n".join(table(name, comparison, found)), flush=True)
            verdicts += judged(name, comparison, found)
            for side, runs in found.items():
                for figure, values in zip(NAMES, zip(*runs, strict=True), strict=True):
                    every[f"{name} {side} {figure}"] = list(values)
    print("\n" + "\n".join(verdicts))
    if options.json:
        write(options.json, "throughput", every, sides=bench.versions, left_out=bench.missing)


def chosen(comparison: Comparison, options: argparse.Namespace) -> Comparison:
    sides = comparison.sides
    if comparison.together:
        return comparison
    if options.llamafactory and "transformers" in sides:
        sides = (*sides, "llamafactory")
    if options.sides:
        sides = tuple(side for side in sides if side in options.sides)
    return replace(comparison, sides=sides)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure muster against other trainers.")
    parser.add_argument("cases", nargs="*", help=f"some of {', '.join(COMPARISONS)}; all without one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of each process (1)")
    parser.add_argument("--sides", nargs="+", help="only these")
    parser.add_argument("--llamafactory", action="store_true", help="LLaMA-Factory, too")
    parser.add_argument("--environments", type=Path, default=home(), help="where the peers' environments are kept")
    parser.add_argument("--json", type=Path, help="write what was found, with versions and machine")
    parser.add_argument("--profile", type=Path, help="a folder for tables of torch's profiler; rates mean little then")
    parser.add_argument("--list", action="store_true", help="name the cases and end")
    options = parser.parse_args()
    if options.list:
        print("\n".join(f"{name}: {', '.join(c.sides)}" for name, c in COMPARISONS.items()))
        sys.exit(0)
    if unknown := [name for name in options.cases if name not in COMPARISONS]:
        parser.error(f"no case {unknown[0]!r}; there are {', '.join(COMPARISONS)}")
    if options.profile:
        options.profile.mkdir(parents=True, exist_ok=True)
    return options


if __name__ == "__main__":
    main()
