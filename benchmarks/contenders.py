"""One side of `benchmarks/throughput.py`, in a process (or several) of its own: ``contenders.py JOB.json``.

Every rank writes ``<out>-<rank>.json``: the seconds of each step, the tokens with data and the target tokens that it
fed in each, the peak of its memory, and its libraries' versions. Imports stand in the functions, since a peer's
environment lacks what muster's has, and the reverse.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.memory import peak_mib  # noqa: E402
from benchmarks.results import versions  # noqa: E402

RANK, ALPHA, RATE, SEED = 16, 32, 1e-4, 17
IGNORED, PAD = -100, 3
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Job:
    """``packs`` and ``rows`` per forward pass and rank; ``profile``: a file for what the profiler saw."""

    side: str
    model: str
    data: str
    out: str
    length: int
    packs: int
    rows: int
    steps: int
    warm: int
    threads: int
    world: int
    profile: str | None = None


class Clock:
    """What a side saw of its steps. A step lasts from the end of the one before, or from `start`."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.tokens: list[int] = []
        self.targets: list[int] = []
        self.start()

    def start(self) -> None:
        self._began = time.monotonic()

    def fed(self, tokens: int, targets: int) -> None:
        """Before the forward pass of the one micro-batch of a step."""
        self.tokens.append(tokens)
        self.targets.append(targets)

    def ended(self) -> None:
        self.seconds.append(time.monotonic() - self._began)
        self.start()


def muster(job: Job, clock: Clock) -> None:
    """As `torchrun -m trainer RECIPE`, in this process."""
    from trainer.worker.telemetry import Telemetry

    _watch(Telemetry, clock)
    _train(job)


def _train(job: Job) -> None:
    import yaml

    from trainer.__main__ import main

    recipe = Path(f"{job.out}.yaml")
    if _rank() == 0:
        recipe.write_text(yaml.safe_dump(recipe_of(job)))
    while not recipe.exists():
        time.sleep(0.05)
    if code := main([str(recipe)]):
        raise SystemExit(f"muster ended with {code}")


def recipe_of(job: Job) -> dict[str, Any]:
    return {
        "name": Path(job.out).name,
        "seed": SEED,
        "model": {"path": job.model, "dtype": "float32"},
        "adapter": {"method": "lora", "rank": RANK, "alpha": ALPHA, "dropout": 0.0},
        "data": {"train": [{"path": job.data, "format": "completion"}], "sequence_length": job.length},
        "training": {"steps": job.steps, "global_batch": job.packs * job.world, "micro_batch": job.packs},
        "optimizer": {"name": "adamw", "lr": RATE},
        "schedule": {"name": "constant", "warmup_steps": 0},
        "strategy": {"kind": "ddp"},
        "resources": {"workers": job.world, "cpus_per_worker": job.threads},
        "checkpoint": {"every_steps": 10**6},
        "storage": str(Path(job.out).parent / "runs"),
    }


def _watch(telemetry: Any, clock: Clock) -> None:
    """Steps are timed from end to end, with everything between them."""
    on_step_end = telemetry.on_step_end

    def timed(self: Any, metrics: Any, batches: Any) -> None:
        on_step_end(self, metrics, batches)
        # Of all ranks; the peers' ranks count their own.
        clock.fed(metrics.tokens if _rank() == 0 else 0, metrics.target_tokens if _rank() == 0 else 0)
        clock.ended()

    telemetry.on_step_end = timed


class Bare:
    """The least that trains the same: muster's batches, its attention and loss, and torch's optimizer."""

    def __init__(self, job: Job, clock: Clock) -> None:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        from trainer.model.kernels.attention import VARLEN, register
        from trainer.tasks.lm_head_loss import TargetHead

        self.clock = clock
        model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
        register()
        model.set_attn_implementation(VARLEN)
        model.requires_grad_(False)
        adapter = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LINEARS)
        self.model = get_peft_model(model, adapter).train()
        self.head, self.trained = TargetHead(self.model), [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=RATE)

    def step(self, batch: Any) -> None:
        import torch

        self.clock.start()
        self.clock.fed(batch.tokens, batch.target_tokens)
        loss = self.head.losses(self.model, batch, torch.device("cpu")).sum() / batch.target_tokens
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        float(loss.detach())
        self.clock.ended()


def muster_and_bare(job: Job, clock: Clock) -> None:
    """In one process: after each step of muster the bare loop's, on the same batch, so that what the machine does to
    one it does to the other a moment later."""
    from trainer.worker.telemetry import Telemetry

    other = Clock()
    loop = Bare(job, other)

    def on_step_end(self: Any, metrics: Any, batches: Any) -> None:
        timed(self, metrics, batches)
        loop.step(batches[0])
        clock.start()

    _watch(Telemetry, clock)
    timed = Telemetry.on_step_end
    Telemetry.on_step_end = on_step_end  # type: ignore[method-assign]
    _train(job)
    _write(job, other, 1)


def trl(job: Job, clock: Clock, *, packing: bool = False) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(
        **common(job, job.packs if packing else job.rows), bf16=False, max_length=job.length, packing=packing
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32),
        args=args,
        train_dataset=Dataset.from_list(_rows(job)),
        processing_class=AutoTokenizer.from_pretrained(job.model),
        peft_config=_lora(),
        callbacks=[_callback(clock)],
    )
    trainer.train()


def trl_packed(job: Job, clock: Clock) -> None:
    trl(job, clock, packing=True)


def transformers(job: Job, clock: Clock) -> None:
    """As its documentation does it: tokens beforehand, and a collator that pads to the longest of a batch."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    tokenizer = AutoTokenizer.from_pretrained(job.model)
    encoded = []
    for row in _rows(job):
        prompt = tokenizer(row["prompt"])["input_ids"]
        completion = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        ids, labels = [*prompt, *completion], [IGNORED] * len(prompt) + completion
        encoded.append({"input_ids": ids[: job.length], "labels": labels[: job.length]})
    trainer = Trainer(
        model=get_peft_model(AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32), _lora()),
        args=TrainingArguments(**common(job, job.rows)),
        train_dataset=encoded,  # type: ignore[arg-type]
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[_callback(clock)],
    )
    trainer.train()


def llamafactory(job: Job, clock: Clock) -> None:
    from llamafactory.train.tuner import run_exp

    folder = Path(job.data).parent
    columns = {"prompt": "prompt", "response": "completion"}
    if _rank() == 0:
        described = {"rows": {"file_name": Path(job.data).name, "columns": columns}}
        (folder / "dataset_info.json").write_text(json.dumps(described))
    arguments = {
        **common(job, job.rows),
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": job.model,
        "finetuning_type": "lora",
        "lora_rank": RANK,
        "lora_alpha": ALPHA,
        "lora_target": ",".join(LINEARS),
        "dataset": "rows",
        "dataset_dir": str(folder),
        "template": "empty",
        "cutoff_len": job.length,
        "overwrite_cache": True,
        "disable_gradient_checkpointing": True,
    }
    del arguments["gradient_checkpointing"]
    run_exp(arguments, callbacks=[_callback(clock)])


def common(job: Job, batch: int) -> dict[str, Any]:
    """What transformers' Trainer and those built on it take; all else is as each has it by default."""
    return {
        "output_dir": f"{job.out}-output",
        "max_steps": job.steps,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": 1,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "seed": SEED,
        "disable_tqdm": True,
        "ddp_find_unused_parameters": False,
    }


def _lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def _rows(job: Job) -> list[dict[str, str]]:
    return [json.loads(line) for line in Path(job.data).read_text().splitlines()]


def _callback(clock: Clock) -> Any:
    """Counts what the model is given, and tells the clock of a step's end."""
    from transformers import TrainerCallback

    def count(module: Any, args: Any, given: dict[str, Any]) -> None:
        clock.fed(int((given["input_ids"] != PAD).sum()), int((given["labels"] != IGNORED).sum()))

    class Watching(TrainerCallback):
        def on_train_begin(self, *args: Any, model: Any = None, **named: Any) -> None:
            model.register_forward_pre_hook(count, with_kwargs=True)

        def on_step_end(self, *args: Any, **named: Any) -> None:
            clock.ended()

    return Watching()


SIDES: dict[str, Callable[[Job, Clock], None]] = {
    "muster": muster,
    "muster+bare": muster_and_bare,
    "trl": trl,
    "trl-packed": trl_packed,
    "transformers": transformers,
    "llamafactory": llamafactory,
}


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def main() -> None:
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(job.threads)
    clock = Clock()
    if job.profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            SIDES[job.side](job, clock)
        Path(job.profile).write_text(seen.key_averages().table(sort_by="self_cpu_time_total", row_limit=40))
    else:
        SIDES[job.side](job, clock)
    _write(job, clock, _rank())


def _write(job: Job, clock: Clock, rank: int) -> None:
    found = {
        "seconds": clock.seconds,
        "tokens": clock.tokens,
        "targets": clock.targets,
        "peak_mib": peak_mib(),
        "versions": versions(("torch", "transformers", "peft", "accelerate", "trl", "llamafactory")),
    }
    Path(f"{job.out}-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
