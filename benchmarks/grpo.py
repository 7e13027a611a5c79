"""GRPO against trl's on the same tiny model: texts and tokens per second, and the peak of memory.

    .venv/bin/python benchmarks/grpo.py [--vllm PYTHON] [--rounds 3] [--steps 16]

Both write 8 answers of up to 48 tokens to each of 16 prompts in a step, rate them by the same Python function, and
learn from them in one update, by LoRA of rank 8 in float32, 16 texts at a time. One thread computes on each side. The
loss is that of DAPO without a reference, the default of both. The sides run at the same time, each in a process of its
own, and take turns step by step: one computes, the others wait. The first steps of a run are not counted. A peak is the
sum of the peaks of all processes of a side.

trl comes from the package index, into an environment of its own that borrows the other libraries from this one
(`benchmarks/environments.py`). With ``--vllm``, the Python of an environment with vLLM, a third side is muster with a
server of vLLM. trl has no such side on a CPU: it sends weights to a server by NCCL, and into an engine in its own
process through parameters that vLLM removes on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.environments import NotInstalled, home, python_of  # noqa: E402
from benchmarks.memory import peak_mib  # noqa: E402
from benchmarks.results import Spread, ratio  # noqa: E402

PROMPTS, ANSWERS, TOKENS, ROWS = 16, 8, 48, 16
TEXTS = PROMPTS * ANSWERS
LR = 1e-5
"""So small that the texts stay as long as they are."""
WARM = 4
"""Steps that are not counted."""
ENDING_S = 120.0
MARK = "step done: "


def vowels(prompts: list[str], completions: list[str], references: Any = None) -> list[float]:
    """The reward: how much of a text are the vowels of English."""
    return [sum(text.count(v) for v in "aeiou") / max(1, len(text)) for text in completions]


class Turns:
    """One side's end of the turns."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def step_done(self, tokens: float) -> None:
        """Says how long the step took, and waits for the next turn. ``tokens``: of the step's texts."""
        print(f"\n{MARK}{json.dumps([time.monotonic() - self._began, tokens])}", flush=True)
        sys.stdin.readline()
        self._began = time.monotonic()


def muster(folder: Path, steps: int, vllm: str | None) -> None:
    """``vllm``: the Python of a server that writes the texts."""
    import torch

    from launcher.testing.training import small_recipe, train_here
    from trainer.worker.telemetry import Telemetry

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    turns, on_step_end = Turns(), Telemetry.on_step_end

    def ended(self: Any, metrics: Any, batches: Any) -> None:
        on_step_end(self, metrics, batches)
        turns.step_done(metrics.task["response_tokens"])

    Telemetry.on_step_end = ended  # type: ignore[method-assign]
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
        changes["rollout"] = {"engine": "vllm", "vllm": {"python": vllm}}
    name = "grpo-vllm" if vllm else "grpo"
    assert train_here(small_recipe(name, folder / "base", folder, **changes)) == "succeeded"


def trl(folder: Path, steps: int) -> None:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    base, turns, tokens = str(folder / "base"), Turns(), list[int]()

    class Watch(TrainerCallback):
        def on_step_end(self, *given: Any, **named: Any) -> None:
            turns.step_done(tokens[-1])

    def rate(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **columns: Any) -> Any:
        tokens.append(sum(map(len, completion_ids)))
        return vowels(prompts, completions)

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
        reward_funcs=rate,
        train_dataset=Dataset.from_dict({"prompt": [json.loads(line)["prompt"] for line in lines]}),
        peft_config=LoraConfig(
            r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[Watch()],
    ).train()


class Run(NamedTuple):
    """The medians of a side's steps, and its peak of memory."""

    texts_per_s: float
    tokens_per_s: float
    peak_mib: float


class Side:
    """A side's process. It waits after each step."""

    def __init__(self, python: str, name: str, folder: Path, *options: str) -> None:
        command = [python, "-W", "ignore", __file__, "--side", name, "--folder", str(folder), *options]
        # Two sides may have one name.
        self._name, self._log = name, folder / f"{name}-{len(options)}.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        self._steps: list[tuple[float, float]] = []

    def wait(self) -> None:
        """Returns at the end of the step that is computed."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(MARK):
                self._steps.append(tuple(json.loads(line.removeprefix(MARK))))
                return
        words = "\n".join(self._log.read_text().splitlines()[-40:])
        raise SystemExit(f"{self._name} ended with {self._process.wait()}:\n{words}")

    def go(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def run(self) -> Run:
        """Returns what the side did, while it waits after its last step."""
        import psutil

        every = [self._process.pid, *(one.pid for one in psutil.Process(self._process.pid).children(recursive=True))]
        counted = self._steps[WARM:]
        return Run(
            statistics.median(TEXTS / seconds for seconds, _ in counted),
            statistics.median(tokens / seconds for seconds, tokens in counted),
            sum(peak_mib(str(pid)) for pid in every),
        )

    def end(self) -> None:
        """Ends the process, which is complete but for its last checkpoint."""
        self._process.terminate()
        self._process.communicate(timeout=ENDING_S)


def one_round(sides: dict[str, Side], steps: int) -> dict[str, Run]:
    try:
        for side in sides.values():
            side.wait()
        for _ in range(steps - 1):
            for side in sides.values():
                side.go()
                side.wait()
        return {name: side.run() for name, side in sides.items()}
    finally:
        for side in sides.values():
            side.end()


def table(found: dict[str, list[Run]]) -> list[str]:
    rows = ["| | texts/s | tokens/s | peak memory | texts/s, ratio | peak, ratio |", "|---|---|---|---|---|---|"]
    for name, runs in found.items():
        medians = [f"{Spread.of(values).median:,.0f}" for values in zip(*runs, strict=True)]
        ratios = [str(ratio([run[i] for run in runs], [run[i] for run in found["trl"]])) for i in (0, 2)]
        rows.append(f"| {name} | {' | '.join(medians)} MiB | {' | '.join(ratios)} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure muster's GRPO against trl's.")
    parser.add_argument("--environments", type=Path, default=home(), help="where trl's environment is kept")
    parser.add_argument("--vllm", help="the Python of an environment with vLLM")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16, help=f"of a run, of which the first {WARM} are not counted")
    parser.add_argument("--side", choices=("trl", "muster"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps <= WARM:
        parser.error(f"--steps {options.steps} leaves none after the first {WARM}")
    if options.side == "trl":
        trl(options.folder, options.steps)
    elif options.side:
        muster(options.folder, options.steps, options.vllm)
    else:
        try:
            measure(python_of("trl", options.environments), options.vllm, options.rounds, options.steps)
        except NotInstalled as reason:
            parser.error(str(reason))


def measure(theirs: str, vllm: str | None, rounds: int, steps: int) -> None:
    found: dict[str, list[Run]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="muster-grpo-") as name:
        write_inputs(Path(name))
        for number in range(rounds):
            folder = Path(name, str(number))
            shutil.copytree(Path(name, "inputs"), folder)
            given = (folder, "--steps", str(steps))
            sides = {"trl": Side(theirs, "trl", *given), "muster": Side(sys.executable, "muster", *given)}
            if vllm:
                sides["muster, vLLM"] = Side(sys.executable, "muster", *given, "--vllm", vllm)
            for side, run in one_round(sides, steps).items():
                found[side].append(run)
                load = os.getloadavg()[0]
                print(f"round {number + 1}: {side}: {run.texts_per_s:.0f} texts/s, load {load:.1f}", file=sys.stderr)
    print("\n".join(table(found)))


def write_inputs(folder: Path) -> None:
    from launcher.quickstart.prepare import prepare_base
    from launcher.testing.training import write_pairs

    prepare_base(folder / "inputs" / "base", steps=60)
    write_pairs(folder / "inputs" / "data" / "train.jsonl", 4 * PROMPTS)


if __name__ == "__main__":
    main()
