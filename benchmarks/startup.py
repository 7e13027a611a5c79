"""Time from the command to the first optimizer step: muster, bare torchrun of trl, bare Ray Train.

    .venv/bin/python benchmarks/startup.py [CASE …] [--rounds 3] [--workers 2] [--json FILE]

The same small Llama, LoRA of rank 16, DDP in float32, packs of 128 tokens. Each case is a command of its own, timed
from before its process is started until the first update of the optimizer is done on rank 0, by the clock of this host.
They take turns, and each is run once before that is not counted. Cases: ``cold`` (muster run, with a Ray of its own, or
without Ray if ``--workers`` is 1), ``warm`` (muster run, joining a Ray that is up), ``torchrun`` (of trainer, without
Ray), ``trl`` (torchrun of trl's SFTTrainer), ``ray`` (a bare Ray Train, with a Ray of its own, whose workers train as
trl does but by hand). trl comes from the package index, into an environment of its own (`benchmarks/environments.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.environments import NotInstalled, home, python_of  # noqa: E402
from benchmarks.results import write  # noqa: E402

CASES = ("cold", "warm", "torchrun", "trl", "ray")
AIMS = {"warm": 1.7, "cold": 2.5}
WITHOUT_RAY = 1.1
"""The aim for ``cold`` with one worker, which needs no Ray."""
AGAINST = "trl"
DEADLINE_S = 300
LENGTH, BATCH = 128, 4


def recipe_text(folder: Path, workers: int) -> str:
    """JSON, which is YAML too."""
    return json.dumps(
        {
            "name": "run",
            "model": {"path": str(folder / "base"), "dtype": "float32"},
            "adapter": {"method": "lora", "rank": 16, "alpha": 32},
            "data": {
                "train": [{"path": f"{folder}/data/*.jsonl", "format": "completion"}],
                "sequence_length": LENGTH,
            },
            "training": {"steps": 1, "global_batch": BATCH * workers, "micro_batch": BATCH},
            "optimizer": {"lr": 5e-3},
            "strategy": {"kind": "ddp"},
            "resources": {"workers": workers, "gpus_per_worker": 0, "cpus_per_worker": 1},
            "storage": str(folder / "storage"),
        }
    )


def make_inputs(folder: Path, workers: int) -> None:
    from launcher.quickstart.prepare import prepare_base, prepare_data

    prepare_base(folder / "base", texts=500, steps=5)
    prepare_data(folder / "data", folder / "held-out")
    (folder / "recipe.json").write_text(recipe_text(folder, workers))


def muster(folder: Path, command: list[str], address: str | None) -> tuple[float, dict[str, float]]:
    """Seconds to the first step, and their split as the run's events tell it."""
    from trainer.run import layout
    from trainer.run.jsonl import read_rows
    from trainer.storage import open_storage

    shutil.rmtree(folder / "storage", ignore_errors=True)
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    environment |= {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "disabled"} if address else {}
    began = time.time()
    finish(command, environment)
    events = read_rows(open_storage(str(folder / "storage" / "run")), layout.EVENTS)
    told = next(event for event in events if event["event"] == "startup")
    return told["time"] - began, told["seconds"]


def peer(folder: Path, command: list[str]) -> tuple[float, dict[str, float]]:
    """One that writes the time of its first step into a file."""
    mark = folder / "first-step"
    mark.unlink(missing_ok=True)
    began = time.time()
    finish(command, {**os.environ, "FIRST_STEP_FILE": str(mark), "OMP_NUM_THREADS": "1"})
    return float(mark.read_text()) - began, {}


def finish(command: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=DEADLINE_S)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")


@contextmanager
def ray_head(workers: int) -> Iterator[str]:
    """A Ray that is up, stopped by its own processes."""
    import psutil

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray = str(Path(sys.executable).with_name("ray"))
    cpus = max(workers, os.cpu_count() or 1)
    command = [ray, "start", "--head", f"--port={port}", f"--num-cpus={cpus}", "--include-dashboard=false", "--block"]
    quiet = subprocess.DEVNULL
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    with subprocess.Popen(command, env=environment, stdout=quiet, stderr=quiet, start_new_session=True) as head:
        try:
            time.sleep(10)  # its processes start after it listens, and are to be ready
            yield f"127.0.0.1:{port}"
        finally:
            for process in [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]:
                process.kill()


def cases(folder: Path, options: argparse.Namespace) -> dict[str, Callable[[], tuple[float, dict[str, float]]]]:
    recipe, workers = str(folder / "recipe.json"), options.workers

    def torchrun(python: str) -> list[str]:
        return [python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]

    def warm() -> tuple[float, dict[str, float]]:
        with ray_head(workers) as address:
            return muster(folder, run, address)

    run = [sys.executable, "-m", "launcher", "run", recipe]
    given = ["--folder", str(folder), "--workers", str(workers)]
    ray_command = [sys.executable, __file__, "--side", "ray", *given]
    return {
        "cold": lambda: muster(folder, [*run, "--on", "local"], None),
        "warm": warm,
        "torchrun": lambda: muster(folder, [*torchrun(sys.executable), "-m", "trainer", recipe], None),
        "trl": lambda: peer(folder, [*torchrun(trl_python(options)), __file__, "--side", "trl", *given]),
        "ray": lambda: peer(folder, ray_command),
    }


def trl_python(options: argparse.Namespace) -> str:
    return python_of("trl", options.environments)


def trl_side(folder: Path, workers: int) -> None:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Mark(TrainerCallback):
        def on_step_end(self, *given: Any, **named: Any) -> None:
            mark_first_step(int(os.environ["RANK"]))

    base = folder / "base"
    config = SFTConfig(
        output_dir=str(folder / "trl"), use_cpu=True, bf16=False, report_to="none", save_strategy="no", max_steps=1,
        per_device_train_batch_size=BATCH, gradient_accumulation_steps=1, max_length=LENGTH, learning_rate=5e-3,
        packing=False, ddp_backend="gloo",
    )  # fmt: skip
    SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        args=config,
        processing_class=AutoTokenizer.from_pretrained(base),
        train_dataset=Dataset.from_list(rows(folder)),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Mark()],
    ).train()
    torch.distributed.destroy_process_group()  # it may abort at its exit otherwise


def ray_side(folder: Path, workers: int) -> None:
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.init(address="local", num_cpus=max(workers, os.cpu_count() or 1), include_dashboard=False, log_to_driver=False)
    mark = os.environ["FIRST_STEP_FILE"]
    TorchTrainer(
        by_hand,
        train_loop_config={"folder": str(folder), "mark": mark},
        scaling_config=ScalingConfig(num_workers=workers),
        run_config=RunConfig(name="bare", storage_path=str(folder / "ray-train")),
    ).fit()


def by_hand(config: dict[str, str]) -> None:
    """A worker of the bare Ray Train: one step of a LoRA under DDP."""
    import torch
    from peft import LoraConfig, get_peft_model
    from ray.train import get_context
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(config["folder"])
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    text = [row["prompt"] + row["completion"] for row in rows(folder)[:BATCH]]
    ids = torch.tensor([(tokenizer(t)["input_ids"] * LENGTH)[:LENGTH] for t in text])
    plain = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    lora = get_peft_model(plain, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    model = torch.nn.parallel.DistributedDataParallel(lora)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    os.environ["FIRST_STEP_FILE"] = config["mark"]
    mark_first_step(get_context().get_world_rank())


def mark_first_step(rank: int) -> None:
    if rank == 0:
        Path(os.environ["FIRST_STEP_FILE"]).write_text(str(time.time()))


def rows(folder: Path) -> list[dict[str, str]]:
    files = sorted((folder / "data").glob("*.jsonl"))
    found = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [{"prompt": row["prompt"], "completion": row["completion"]} for row in found]


def table(found: dict[str, list[tuple[float, dict[str, float]]]], workers: int = 2) -> list[dict[str, Any]]:
    aims = AIMS if workers > 1 else {"cold": WITHOUT_RAY}
    middle = {name: statistics.median(seconds for seconds, _ in runs) for name, runs in found.items()}
    lines = []
    for name, runs in found.items():
        seconds = [s for s, _ in runs]
        split = {p: statistics.median(told[p] for _, told in runs) for p in runs[0][1]}
        ratio = middle[name] / middle[AGAINST] if AGAINST in middle else None
        lines.append(
            {"case": name, "median_s": middle[name], "seconds": seconds, "ratio": ratio, "split": split,
             "aim": aims.get(name)}
        )  # fmt: skip
    return lines


def show(lines: list[dict[str, Any]]) -> None:
    phases = ", ".join(next((line["split"] for line in lines if line["split"]), {"phases": 0.0}))
    print(f"| case | median | least to most | ratio to trl | aim | {phases} |")
    print("|---|---|---|---|---|---|")
    for line in lines:
        ratio = "" if line["ratio"] is None else f"{line['ratio']:.2f}"
        aim = "" if line["aim"] is None else f"≤ {line['aim']}"
        if line["aim"] and line["ratio"] and line["ratio"] > line["aim"]:
            aim += ", **missed**"
        split = ", ".join(f"{seconds:.1f}" for seconds in line["split"].values())
        span = f"{min(line['seconds']):.1f} to {max(line['seconds']):.1f}"
        print(f"| {line['case']} | {line['median_s']:.1f} s | {span} | {ratio} | {aim} | {split} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all without")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--environments", type=Path, default=home(), help="where trl's environment is kept")
    parser.add_argument("--json", type=Path, help="write what was found, for benchmarks/compare.py")
    parser.add_argument("--side", choices=("trl", "ray"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        {"trl": trl_side, "ray": ray_side}[options.side](options.folder, options.workers)
        return
    if unknown := set(options.cases) - set(CASES):
        parser.error(f"no such case: {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    chosen = [case for case in CASES if case in options.cases or not options.cases]
    with tempfile.TemporaryDirectory(prefix="muster-startup-") as name:
        folder = Path(name)
        make_inputs(folder, options.workers)
        if "trl" in chosen:
            try:
                trl_python(options)  # made before anything is timed
            except NotInstalled as reason:
                print(f"trl is left out: {reason}", file=sys.stderr)
                chosen.remove("trl")
        timed = cases(folder, options)
        found: dict[str, list[tuple[float, dict[str, float]]]] = {case: [] for case in chosen}
        for turn in range(options.rounds + 1):
            for case in chosen:
                seconds, split = timed[case]()
                print(f"round {turn}: {case} {seconds:.1f} s", file=sys.stderr)
                if turn:
                    found[case].append((seconds, split))
    show(table(found, options.workers))
    if options.json:
        write(options.json, "startup", figures(found))


def figures(found: dict[str, list[tuple[float, dict[str, float]]]]) -> dict[str, list[float]]:
    """Seconds of each round: all of them by the case's name, and each phase's by case and phase."""
    named = {f"{case} s": [seconds for seconds, _ in runs] for case, runs in found.items()}
    for case, runs in found.items():
        named |= {f"{case} {phase} s": [told[phase] for _, told in runs] for phase in runs[0][1]}
    return named


if __name__ == "__main__":
    main()
