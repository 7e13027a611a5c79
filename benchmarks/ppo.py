"""PPO against trl's (experimental) on the same tiny model: samples per second, and the peak of memory.

    .venv/bin/python benchmarks/ppo.py [--iterations 6]

Both write 24 tokens to 32 prompts in each iteration, rate them by a sequence classifier of the same base, and learn
from them in 4 epochs of 2 minibatches, by LoRA of rank 8, in float32 on one thread. trl comes from the package index,
into an environment of its own that borrows the other libraries from this one (`benchmarks/environments.py`). In trl,
value and reward are models of their own; its value model is frozen but for its head, so that both train as much. Each
side runs in a process of its own, one after the other.
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
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.environments import NotInstalled, home, python_of  # noqa: E402
from benchmarks.memory import peak_mib  # noqa: E402

PROMPTS, TOKENS, EPOCHS, MINIBATCHES, ROWS = 32, 24, 4, 2, 16
WARM = 2
"""Iterations that are not counted."""


def muster(folder: Path, iterations: int) -> list[float]:
    from tests.support.tasks import task_recipe
    from tests.support.training import run_of, train_here
    from trainer.run import layout
    from trainer.run.jsonl import read_rows

    base = folder / "base"
    length = {"training.steps": 1, "training.eval_every": None, "data.eval": []}
    rater = task_recipe("reward", "rater", base, folder, **length)
    assert train_here(rater) == "succeeded"
    changes = {
        "ppo": {"reward": {"model": run_of(rater).url}, "max_new_tokens": TOKENS},
        "ppo.epochs": EPOCHS,
        "ppo.minibatches": MINIBATCHES,
        "adapter": {"method": "lora", "rank": 8, "alpha": 16, "dropout": 0.0},
        "training": {"steps": iterations, "global_batch": PROMPTS, "micro_batch": ROWS},
        "data.eval": [],
        "checkpoint.every_steps": 100,
    }
    recipe = task_recipe("ppo", "measured", base, folder, **changes)
    assert train_here(recipe) == "succeeded"
    return [row["step_s"] for row in read_rows(run_of(recipe), layout.METRICS)]


def trl(folder: Path, iterations: int) -> list[float]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        TrainerCallback,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    torch.set_num_threads(1)
    base, ends = str(folder / "base"), [time.monotonic()]
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    class Clock(TrainerCallback):
        def on_step_end(self, *given: Any, **named: Any) -> None:
            ends.append(time.monotonic())

    def classifier() -> Any:
        made = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
        made.config.pad_token_id = tokenizer.pad_token_id
        return made

    value = classifier()
    for name, parameter in value.named_parameters():
        parameter.requires_grad_(name.startswith("score"))
    lines = (folder / "ppo" / "train.jsonl").read_text().splitlines()
    ids = [tokenizer(json.loads(line)["prompt"])["input_ids"] for line in lines]
    config = PPOConfig(
        output_dir=str(folder / "trl"), use_cpu=True, bf16=False, report_to="none", save_strategy="no", seed=17,
        per_device_train_batch_size=ROWS, gradient_accumulation_steps=PROMPTS // ROWS,
        total_episodes=PROMPTS * iterations,
        num_mini_batches=MINIBATCHES, num_ppo_epochs=EPOCHS, response_length=TOKENS, temperature=1.0,
        local_rollout_forward_batch_size=ROWS, num_sample_generations=0, learning_rate=5e-3, stop_token="eos",
    )  # fmt: skip
    PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        ref_model=None,
        reward_model=classifier(),
        value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": ids}),
        peft_config=LoraConfig(
            r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[Clock()],
    ).train()
    return [after - before for before, after in pairwise(ends)]


def measured(python: str, side: str, folder: Path, iterations: int) -> dict[str, Any]:
    """In a process of its own, which prints one JSON object last."""
    command = [
        python,
        "-W",
        "ignore",
        __file__,
        "--side",
        side,
        "--folder",
        str(folder),
        "--iterations",
        str(iterations),
    ]
    environment = {**os.environ, "TRL_EXPERIMENTAL_SILENCE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--environments", type=Path, default=home(), help="where trl's environment is kept")
    parser.add_argument("--iterations", type=int, default=6)
    parser.add_argument("--side", choices=("muster", "trl"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        seconds = {"muster": muster, "trl": trl}[options.side](options.folder, options.iterations)
        print(json.dumps({"seconds": seconds, "peak_mib": peak_mib()}))
        return
    from launcher.quickstart.prepare import prepare_base
    from tests.support.tasks import write_task_data

    try:
        pythons = {"trl": python_of("trl-ppo", options.environments), "muster": sys.executable}
    except NotInstalled as reason:
        parser.error(str(reason))
    with tempfile.TemporaryDirectory(prefix="muster-ppo-") as name:
        folder = Path(name)
        prepare_base(folder / "base", steps=60)
        for task in ("ppo", "reward"):
            write_task_data(folder, task)
        found = {side: measured(python, side, folder, options.iterations) for side, python in pythons.items()}
    rates = {side: PROMPTS / statistics.median(said["seconds"][WARM:]) for side, said in found.items()}
    print("| | samples/s | ratio | peak of memory |\n|---|---|---|---|")
    for side, rate in rates.items():
        print(f"| {side} | {rate:.1f} | {rate / rates['trl']:.2f} | {found[side]['peak_mib']:.0f} MiB |")


if __name__ == "__main__":
    main()
