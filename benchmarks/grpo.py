"""GRPO against trl's on the same tiny model: texts and tokens per second, and the peak of memory.

    .venv/bin/python benchmarks/grpo.py [--vllm PYTHON] [--rounds 3] [--steps 14]

Both write 8 answers of up to 48 tokens to each of 16 prompts in a step, rate them by the same Python function, and
learn from them in one update, by LoRA of rank 8 in float32, 16 texts at a time. One thread computes on each side. The
loss is that of DAPO without a reference, the default of both. A step of muster is that of its metrics; a step of trl is
the time from the end of one to the end of the next. The sides take turns, each in a process of its own; the first steps
of a run are not counted. A peak is that of all processes of a side together, five times a second.

trl comes from the package index, into an environment of its own that borrows the other libraries from this one
(`benchmarks/environments.py`). With ``--vllm``, the Python of an environment with vLLM, two more sides are muster with
a server of vLLM: without, and with the texts of the next step written ahead. trl has no such side on a CPU: it sends
weights to a server by NCCL, and into an engine in its own process through parameters that vLLM for CPUs removes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.environments import NotInstalled, home, python_of  # noqa: E402
from benchmarks.results import Spread, ratio  # noqa: E402

PROMPTS, ANSWERS, TOKENS, ROWS = 16, 8, 48, 16
TEXTS = PROMPTS * ANSWERS
LR = 1e-5
"""So small that the texts stay as long as they are."""
WARM = 4
"""Steps that are not counted."""
SAMPLED_S = 0.2


def vowels(prompts: list[str], completions: list[str], references: Any = None, **columns: Any) -> list[float]:
    """The reward: how much of a text are the vowels of English."""
    return [sum(text.count(v) for v in "aeiou") / max(1, len(text)) for text in completions]


class Steps(NamedTuple):
    """Of the steps of a run: how long each took, and how many tokens its texts have."""

    seconds: list[float]
    tokens: list[float]


def muster(folder: Path, steps: int, vllm: str | None, ahead: int) -> Steps:
    """``vllm``: the Python of the servers; ``ahead``: steps that they may write ahead."""
    import torch

    from launcher.testing.training import run_of, small_recipe, train_here
    from trainer.run import layout
    from trainer.run.jsonl import read_rows

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    changes: dict[str, Any] = {
        "task": "grpo",
        "grpo": {"reward": {"function": f"{__file__}:vowels"}, "max_new_tokens": TOKENS, "group_size": ANSWERS},
        "adapter": {"method": "lora", "rank": 8, "alpha": 16, "dropout": 0.0},
        "training": {"steps": steps, "global_batch": PROMPTS, "micro_batch": ROWS},
        "data.packing": False,
        "optimizer.lr": LR,
        "checkpoint.every_steps": 1000,
    }
    if vllm:
        changes["rollout"] = {"engine": "vllm", "max_staleness": ahead, "vllm": {"python": vllm}}
    recipe = small_recipe(f"grpo-{time.time_ns()}", folder / "base", folder, **changes)
    assert train_here(recipe) == "succeeded"
    rows = list(read_rows(run_of(recipe), layout.METRICS))
    return Steps([row["step_s"] for row in rows], [row["response_tokens"] for row in rows])


def trl(folder: Path, steps: int) -> Steps:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    base, ends, lengths = str(folder / "base"), [time.monotonic()], list[float]()

    class Watch(TrainerCallback):
        def on_step_end(self, *given: Any, **named: Any) -> None:
            ends.append(time.monotonic())

        def on_log(self, *given: Any, **named: Any) -> None:
            if "completions/mean_length" in named["logs"]:
                lengths.append(named["logs"]["completions/mean_length"])

    lines = (folder / "data" / "train.jsonl").read_text().splitlines()
    config = GRPOConfig(
        output_dir=str(folder / "trl"), use_cpu=True, bf16=False, report_to="none", save_strategy="no", seed=17,
        disable_tqdm=True, logging_steps=1, gradient_checkpointing=False, per_device_train_batch_size=ROWS,
        gradient_accumulation_steps=TEXTS // ROWS, num_generations=ANSWERS, max_completion_length=TOKENS,
        max_steps=steps, learning_rate=LR, lr_scheduler_type="constant", loss_type="dapo", epsilon_high=0.28,
        beta=0.0, temperature=1.0,
    )  # fmt: skip
    GRPOTrainer(
        args=config,
        processing_class=AutoTokenizer.from_pretrained(base, padding_side="left"),
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        reward_funcs=vowels,
        train_dataset=Dataset.from_dict({"prompt": [json.loads(line)["prompt"] for line in lines]}),
        peft_config=LoraConfig(
            r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[Watch()],
    ).train()
    return Steps([after - before for before, after in pairwise(ends)], [length * TEXTS for length in lengths])


class Run(NamedTuple):
    """Of a run of a side, without its first steps."""

    texts_per_s: float
    tokens_per_s: float
    peak_mib: float


class Bench(NamedTuple):
    """``pythons``: of each side."""

    folder: Path
    pythons: dict[str, str]
    vllm: str | None
    steps: int

    def run(self, side: str) -> Run:
        """Runs a side in a process of its own, which prints one JSON object last."""
        command = [self.pythons[side], "-W", "ignore", __file__, "--side", side, "--folder", str(self.folder)]
        command += ["--steps", str(self.steps), *(["--vllm", self.vllm] if self.vllm else [])]
        log = self.folder / f"{side}.log"
        with log.open("w") as written:
            peak, code = watched(command, written)
        lines = log.read_text().splitlines()
        if code:
            raise SystemExit("\n".join([f"{side} ended with {code}:", *lines[-40:]]))
        steps = Steps(**json.loads(lines[-1]))
        seconds, tokens = steps.seconds[WARM:], steps.tokens[WARM:]
        rates = [texts / s for texts, s in zip(tokens, seconds, strict=True)]
        return Run(TEXTS / statistics.median(seconds), statistics.median(rates), peak)


def watched(command: Sequence[str], written: Any) -> tuple[float, int]:
    """Returns the peak of the memory of a command and of what it starts, in MiB, and its exit code. Pages that several
    of the processes share, as of one that was just forked, count once (PSS)."""
    import psutil

    peak = 0
    with subprocess.Popen(command, stdout=written, stderr=subprocess.STDOUT) as process:
        root = psutil.Process(process.pid)
        while process.poll() is None:
            used = 0
            with suppress(psutil.NoSuchProcess):
                for one in [root, *root.children(recursive=True)]:
                    used += one.memory_full_info().pss
            peak = max(peak, used)
            time.sleep(SAMPLED_S)
    return peak / 2**20, process.returncode


def table(found: dict[str, list[Run]]) -> list[str]:
    rows = ["| | texts/s | tokens/s | peak memory | texts/s, ratio | peak, ratio |", "|---|---|---|---|---|---|"]
    for side, runs in found.items():
        medians = [f"{Spread.of(values).median:,.0f}" for values in zip(*runs, strict=True)]
        ratios = [str(ratio([run[i] for run in runs], [run[i] for run in found["trl"]])) for i in (0, 2)]
        rows.append(f"| {side} | {' | '.join(medians)} MiB | {' | '.join(ratios)} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure muster's GRPO against trl's.")
    parser.add_argument("--environments", type=Path, default=home(), help="where trl's environment is kept")
    parser.add_argument("--vllm", help="the Python of an environment with vLLM")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=14, help=f"of a run, of which the first {WARM} are not counted")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps <= WARM:
        parser.error(f"--steps {options.steps} leaves none after the first {WARM}")
    if options.side:
        steps = SIDES[options.side](options.folder, options.steps, options.vllm)
        print("\n" + json.dumps(steps._asdict()))
        return
    try:
        theirs = python_of("trl", options.environments)
    except NotInstalled as reason:
        parser.error(str(reason))
    sides = [side for side in SIDES if options.vllm or "vllm" not in side]
    pythons = {side: theirs if side == "trl" else sys.executable for side in sides}
    with tempfile.TemporaryDirectory(prefix="muster-grpo-") as name:
        bench = Bench(Path(name), pythons, options.vllm, options.steps)
        write_inputs(bench.folder)
        print("\n".join(table(measured(bench, options.rounds))))


def write_inputs(folder: Path) -> None:
    from launcher.quickstart.prepare import prepare_base
    from launcher.testing.training import write_pairs

    prepare_base(folder / "base", steps=60)
    write_pairs(folder / "data" / "train.jsonl", 4 * PROMPTS)


def measured(bench: Bench, rounds: int) -> dict[str, list[Run]]:
    """Returns the runs of each side, one for each round."""
    found: dict[str, list[Run]] = {side: [] for side in bench.pythons}
    for turn in range(rounds):
        # Back and forth, so that a machine that slowly gets busier favours none.
        for side in list(found)[:: 1 if turn % 2 == 0 else -1]:
            run = bench.run(side)
            found[side].append(run)
            load = os.getloadavg()[0]
            print(f"round {turn + 1}: {side}: {run.texts_per_s:.0f} texts/s, load {load:.1f}", file=sys.stderr)
    return found


SIDES: dict[str, Callable[[Path, int, str | None], Steps]] = {
    "trl": lambda folder, steps, vllm: trl(folder, steps),
    "muster": lambda folder, steps, vllm: muster(folder, steps, None, 0),
    "muster, vllm": lambda folder, steps, vllm: muster(folder, steps, vllm, 0),
    "muster, vllm ahead": lambda folder, steps, vllm: muster(folder, steps, vllm, 1),
}

if __name__ == "__main__":
    main()
