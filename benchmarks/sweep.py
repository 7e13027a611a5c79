"""Eight LoRA trials on one base model of 100 M parameters: all together, one after the other, and by Ray Tune over trl.

    .venv/bin/python benchmarks/sweep.py [CASE …] [--rounds 3] [--sides …] [--json FILE]

A case is the tokens of each trial and step, with ``-bfloat16`` for another dtype than float32. The trials are four
learning rates times two ranks, of 30 steps each, on rows that fill a pack without padding. Each trial evaluates and
saves its adapter at its end. Sides:

- ``one by one``: `muster run`, eight commands one after the other
- ``together``: `muster sweep --together`
- ``parallel 1``: `muster sweep --parallel 1`, one trial at a time on Ray
- ``trl``: a script with Ray's Tuner over trl's SFTTrainer, one trial at a time

Each side computes on two threads. The sides take turns, forwards in one round and backwards in the next. *Whole* is the
time of all commands of a side; *training* is that between the end of the first step and the end of the last, added up
over the trials (the trials together have one). A peak is the largest sum, at any moment, of the peaks so far of the
processes that then live; pages that processes share count for each of them. trl comes from the package index, into an
environment of its own that borrows the other libraries, Ray among them (`benchmarks/environments.py`).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.environments import NotInstalled, home, python_of  # noqa: E402
from benchmarks.memory import peak_of_tree_mib  # noqa: E402
from benchmarks.results import Spread, ratio, write  # noqa: E402

RATES, RANKS = (1e-4, 2e-4, 5e-4, 1e-3), (8, 16)
TRIALS = list(itertools.product(RATES, RANKS))
ALPHA, SEED, THREADS, VOCABULARY = 32, 17, 2, 32_000
EVALUATED = 4
"""Rows of the evaluation."""
CASES = ("16", "32", "128", "16-bfloat16", "32-bfloat16", "128-bfloat16")
ALONE, TOGETHER, PARALLEL, TRL = "one by one", "together", "parallel 1", "trl"
SIDES = (ALONE, TOGETHER, PARALLEL, TRL)
FASTER, MEMORY = 2.5, 1.4
"""The aims of trials together: times as fast as one by one, and times the memory of one run."""
LOOK_S = 0.25
SIDE_S = 1800


class Case(NamedTuple):
    """``tokens``: of a trial in each step."""

    tokens: int
    dtype: str

    @classmethod
    def of(cls, name: str) -> Case:
        tokens, _, dtype = name.partition("-")
        return cls(int(tokens), dtype or "float32")


class Run(NamedTuple):
    """What a side took in one round."""

    whole_s: float
    training_s: float
    peak_mib: float


def write_inputs(folder: Path) -> None:
    from benchmarks.workloads import hundred_million, write_model

    write_model(hundred_million(VOCABULARY), folder / "base")
    for tokens in {Case.of(name).tokens for name in CASES}:
        write_rows(folder / f"train-{tokens}.jsonl", tokens, 64)
        write_rows(folder / f"eval-{tokens}.jsonl", tokens, EVALUATED)


def write_rows(path: Path, tokens: int, count: int) -> None:
    """Rows of random words, with so many tokens together with the first and the last one."""
    drawn = random.Random(path.name)
    with path.open("w") as file:
        for _ in range(count):
            words = [f"w{drawn.randrange(4, VOCABULARY)}" for _ in range(tokens - 2)]
            middle = len(words) // 2
            row = {"prompt": " ".join(words[:middle]), "completion": " " + " ".join(words[middle:])}
            file.write(json.dumps(row) + "\n")


def write_recipe(folder: Path, inputs: Path, case: Case, steps: int) -> Path:
    """JSON, which is YAML too."""
    rows = {
        kind: [{"path": str(inputs / f"{kind}-{case.tokens}.jsonl"), "format": "completion"}]
        for kind in ("train", "eval")
    }
    recipe = {
        "name": "trial",
        "seed": SEED,
        "model": {"path": str(inputs / "base"), "dtype": case.dtype},
        "adapter": {"method": "lora", "rank": RANKS[0], "alpha": ALPHA, "dropout": 0.0},
        "data": {**rows, "sequence_length": case.tokens},
        "training": {"steps": steps, "global_batch": 1, "micro_batch": 1},
        "optimizer": {"name": "adamw", "lr": RATES[0]},
        "schedule": {"name": "constant", "warmup_steps": 0},
        "strategy": {"kind": "ddp"},
        "resources": {"workers": 1, "cpus_per_worker": THREADS},
        "checkpoint": {"every_steps": 10**6},
        "samples": {"count": 0},  # trl writes no texts
        "storage": str(folder / "runs"),
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    return path


def measured(commands: Sequence[Sequence[str]], folder: Path) -> tuple[float, float]:
    """Seconds of the commands, one after the other, and the peak in MiB of the one with the highest."""
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "RAY_ADDRESS")}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": str(THREADS)}
    began, peak = time.monotonic(), 0.0
    for number, command in enumerate(commands):
        log = folder / f"log-{number}"
        with log.open("w") as file:
            process = subprocess.Popen(command, cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT)
        while process.poll() is None:
            peak = max(peak, peak_of_tree_mib(process.pid))
            if time.monotonic() - began > SIDE_S:
                process.terminate()
            try:
                process.wait(LOOK_S)
            except subprocess.TimeoutExpired:
                continue
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{log.read_text()[-3000:]}")
    return time.monotonic() - began, peak


def ends_of_steps(folder: Path, tokens: int) -> Iterator[list[float]]:
    """Yields the times at which each run's steps ended."""
    from trainer.run import layout
    from trainer.run.jsonl import read_rows
    from trainer.storage import open_storage

    for run in sorted((folder / "runs").glob("trial-0*")):
        steps = [row for row in read_rows(open_storage(str(run)), layout.METRICS) if "step_s" in row]
        assert {row["tokens"] for row in steps} == {tokens}, "no row is cut, and no pack is half empty"
        yield [row["time"] for row in sorted(steps, key=lambda row: row["step"])]


def training_s(runs: Sequence[Sequence[float]], steps: int, *, at_once: bool) -> float:
    """Seconds from the end of the first step to the end of the last, of all runs. ``at_once``: they have trained at the
    same time, and a step has ended when it has in all of them."""
    if [len(run) for run in runs] != [steps] * len(TRIALS):
        raise SystemExit(f"{len(TRIALS)} trials of {steps} steps have steps {[len(run) for run in runs]}")
    if at_once:
        return max(run[-1] for run in runs) - max(run[0] for run in runs)
    return sum(run[-1] - run[0] for run in runs)


class Bench(NamedTuple):
    """``theirs``: the Python of trl's environment."""

    inputs: Path
    theirs: str
    steps: int

    def run(self, side: str, case: Case, folder: Path) -> Run:
        folder.mkdir()
        recipe = str(write_recipe(folder, self.inputs, case, self.steps))
        whole_s, peak = measured(self._commands(side, case, recipe, folder), folder)
        trials = sorted(folder.glob("trl-*.json"))
        ends = (
            [json.loads(path.read_text()) for path in trials]
            if side == TRL
            else list(ends_of_steps(folder, case.tokens))
        )
        return Run(whole_s, training_s(ends, self.steps, at_once=side == TOGETHER), peak)

    def _commands(self, side: str, case: Case, recipe: str, folder: Path) -> list[list[str]]:
        muster = [str(Path(sys.executable).with_name("muster"))]
        every = [f"optimizer.lr={','.join(map(str, RATES))}", f"adapter.rank={','.join(map(str, RANKS))}"]
        alone = [
            [*muster, "run", recipe, f"name=trial-{n:03}", f"optimizer.lr={lr}", f"adapter.rank={rank}"]
            for n, (lr, rank) in enumerate(TRIALS, 1)
        ]
        given = {"inputs": self.inputs, "folder": folder, "tokens": case.tokens, "dtype": case.dtype}
        told = json.dumps({name: str(value) for name, value in given.items()} | {"steps": self.steps})
        return {
            ALONE: alone,
            TOGETHER: [[*muster, "sweep", recipe, *every, "--together"]],
            PARALLEL: [[*muster, "sweep", recipe, *every, "--parallel", "1"]],
            TRL: [[self.theirs, __file__, "--told", told]],
        }[side]


def tune(told: dict[str, Any]) -> None:
    """The side ``trl``."""
    import ray
    from ray import tune

    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.init(address="local", num_cpus=THREADS, include_dashboard=False)
    space = {"lr": tune.grid_search(list(RATES)), "rank": tune.grid_search(list(RANKS)), **told}
    results = tune.Tuner(
        tune.with_resources(trl_trial, {"cpu": THREADS}),
        param_space=space,
        tune_config=tune.TuneConfig(metric="eval_loss", mode="min", max_concurrent_trials=1),
        run_config=tune.RunConfig(name="trl", storage_path=str(Path(told["folder"]) / "ray")),
    ).fit()
    if results.errors:
        raise SystemExit(f"{len(results.errors)} trials failed: {results.errors[0]}")
    print(results.get_best_result().config)


def trl_trial(config: dict[str, Any]) -> None:
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from ray import tune
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    inputs, tokens, ends = Path(config["inputs"]), int(config["tokens"]), list[float]()
    bfloat16 = config["dtype"] == "bfloat16"

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *given: Any, **named: Any) -> None:
            ends.append(time.time())

    name = f"{config['lr']}-{config['rank']}"
    args = SFTConfig(
        output_dir=str(Path(config["folder"]) / name), max_steps=config["steps"], per_device_train_batch_size=1,
        per_device_eval_batch_size=1, gradient_accumulation_steps=1, learning_rate=config["lr"],
        lr_scheduler_type="constant", gradient_checkpointing=False, save_strategy="no", report_to="none", use_cpu=True,
        bf16=bfloat16, max_length=tokens, seed=SEED, disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    files = {kind: str(inputs / f"{kind}-{tokens}.jsonl") for kind in ("train", "eval")}
    rows = load_dataset("json", data_files=files, cache_dir=str(Path(config["folder"]) / "datasets"))
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(inputs / "base", dtype=getattr(torch, config["dtype"])),
        args=args,
        train_dataset=rows["train"],
        eval_dataset=rows["eval"],
        processing_class=AutoTokenizer.from_pretrained(inputs / "base"),
        peft_config=LoraConfig(
            r=config["rank"], lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[Watch()],
    )
    assert {len(row["input_ids"]) for row in trainer.train_dataset} == {tokens}, "no padding, nothing cut"
    trainer.train()
    found = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    (Path(config["folder"]) / f"trl-{name}.json").write_text(json.dumps(ends))
    tune.report({"eval_loss": found})


def table(name: str, found: dict[str, list[Run]]) -> list[str]:
    """Rows of Markdown. Ratios are of a side over the trials together in seconds, and over one run in memory."""
    lines = []
    for side, runs in found.items():
        whole, training, peak = (Spread.of(values) for values in zip(*runs, strict=True))
        cells = [name, side, f"{whole.median:.0f}", f"{training.median:.1f}"]
        for i in (0, 1):
            ours = [run[i] for run in found.get(TOGETHER, [])]
            cells.append(str(ratio([run[i] for run in runs], ours)) if ours and side != TOGETHER else "")
        one = [run.peak_mib for run in found.get(ALONE, [])]
        against = str(ratio([run.peak_mib for run in runs], one)) if one and side != ALONE else ""
        lines.append(f"| {' | '.join([*cells, f'{peak.median:,.0f}', against])} |")
    return lines


HEAD = """| tokens | side | whole, s | training, s | whole / together | training / together | peak, MiB | peak / one |
|---|---|---|---|---|---|---|---|"""


def measure(bench: Bench, names: Sequence[str], sides: Sequence[str], rounds: int) -> dict[str, list[float]]:
    aims = f"≥ {FASTER} times as fast as {ALONE}, whole and training, in ≤ {MEMORY} times the memory of one run"
    print(f"Aim of the trials together: {aims}.\n\n{HEAD}", flush=True)
    figures: dict[str, list[float]] = {}
    for name in names:
        found: dict[str, list[Run]] = defaultdict(list)
        for turn in range(rounds):
            for side in sides if turn % 2 == 0 else sides[::-1]:
                load = os.getloadavg()[0]
                run = bench.run(side, Case.of(name), bench.inputs / f"{name}-{side.replace(' ', '-')}-{turn}")
                found[side].append(run)
                said = f"whole {run.whole_s:.1f} s, training {run.training_s:.1f} s, {run.peak_mib:,.0f} MiB"
                print(f"{name}, round {turn + 1}: {side}: {said}; load before {load:.1f}", file=sys.stderr, flush=True)
        print("\n".join(table(name, {side: found[side] for side in sides})), flush=True)
        for side, runs in found.items():
            for figure, values in zip(Run._fields, zip(*runs, strict=True), strict=True):
                figures[f"{name} {side} {figure}"] = list(values)
    return figures


def main() -> None:
    options = parsed()
    if options.told:
        tune(json.loads(options.told))
        return
    sides = [side for side in SIDES if side in options.sides]
    try:
        theirs = python_of("trl", options.environments) if TRL in sides else ""
    except NotInstalled as reason:
        print(f"trl is left out: {reason}", file=sys.stderr)
        theirs, sides = "", [side for side in sides if side != TRL]
    with tempfile.TemporaryDirectory(prefix="muster-sweep-") as folder:
        write_inputs(Path(folder))
        figures = measure(Bench(Path(folder), theirs, options.steps), options.cases or CASES, sides, options.rounds)
    if options.json:
        write(options.json, "sweep", figures)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure trials together against trials one after the other.")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"some of {', '.join(CASES)}; all without one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps of each trial")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES, help="only these")
    parser.add_argument("--environments", type=Path, default=home(), help="where trl's environment is kept")
    parser.add_argument("--json", type=Path, help="write what was found, for benchmarks/compare.py")
    parser.add_argument("--told", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := [name for name in options.cases if name not in CASES]:
        parser.error(f"no case {unknown[0]!r}; there are {', '.join(CASES)}")
    if options.steps < 2:
        parser.error(f"--steps {options.steps} leaves none after the first")
    return options


if __name__ == "__main__":
    main()
