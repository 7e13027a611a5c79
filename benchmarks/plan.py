"""Plan against reality: models with random weights, trained for two steps, their memory measured. One table.

    .venv/bin/python benchmarks/plan.py                  all cases; 10 to 15 minutes on two cores
    .venv/bin/python benchmarks/plan.py lora qlora-ckpt  some of them, by name
    .venv/bin/python benchmarks/plan.py --small          a model of 8 M parameters, to try the benchmark itself

On a CPU: the peak of the rank's resident memory over what the process held before it built anything, its libraries
loaded. On a CUDA device, where there is one: torch's peak of allocated memory. Each case runs in processes of its own.

glibc keeps freed blocks of up to 32 MB for itself, which with default settings adds up to a fifth or more to what a
process has resident. --allocator default measures with it; otherwise freed blocks go back, and tensors are measured.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from tests.support.training import small_recipe  # noqa: E402
from tests.support.waiting import free_port  # noqa: E402
from trainer.data import Batch  # noqa: E402
from trainer.distributed.world import join_world  # noqa: E402
from trainer.model.peak_rss import HostPeak, resident_bytes  # noqa: E402
from trainer.plan.config import read_base  # noqa: E402
from trainer.plan.memory import Planner  # noqa: E402
from trainer.plan.result import Limits, Plan  # noqa: E402
from trainer.recipe import Recipe  # noqa: E402
from trainer.storage import open_storage  # noqa: E402
from trainer.worker.build import build  # noqa: E402

LARGE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 20, "num_attention_heads": 16}
LARGE |= {"num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 2048}
SMALL = {**LARGE, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "vocab_size": 8000}
STEPS = 2

CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "lora": (1, {}),
    "lora-ckpt": (1, {"training.gradient_checkpointing": True}),
    "lora-float32": (1, {"model.dtype": "float32"}),
    "qlora-ckpt": (1, {"model.quantization": "nf4", "training.gradient_checkpointing": True}),
    "full": (1, {"adapter.method": "none"}),
    "lora-fsdp": (2, {"strategy.kind": "fsdp"}),
    "qlora-fsdp-ckpt": (
        2,
        {"strategy.kind": "fsdp", "model.quantization": "nf4", "training.gradient_checkpointing": True},
    ),
    "full-fsdp": (2, {"strategy.kind": "fsdp", "adapter.method": "none"}),
}
"""Ranks, and what is other than in `recipe_of`."""


class Measured(NamedTuple):
    """Bytes of the rank that took most."""

    load: int
    train: int


def make_base(folder: Path, shape: dict[str, Any]) -> int:
    """Random weights and no tokenizer; returns the number of parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape)).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="200MB")
    return sum(p.numel() for p in model.parameters())


def recipe_of(name: str, base: Path, folder: Path, changes: dict[str, Any]) -> Recipe:
    common = {
        "model.dtype": "bfloat16",
        "adapter.dropout": 0.0,
        "adapter.rank": 16,
        "data.sequence_length": 512,
        "data.packing": True,
        "training.micro_batch": 2,
        "resources.gpus_per_worker": int(torch.cuda.is_available()),
    }
    return small_recipe(name, base, folder, **{**common, **changes})


def measured(recipe: Recipe, ranks: int, folder: Path) -> Measured:
    torch.multiprocessing.spawn(_rank, (recipe, ranks, free_port(), str(folder)), nprocs=ranks)
    found = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)]
    return Measured(max(f["load"] for f in found), max(f["train"] for f in found))


def _rank(rank: int, recipe: Recipe, ranks: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks))
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    import bitsandbytes  # noqa: F401 - what libraries take is no part of a plan
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    with join_world(gpu=recipe.resources.gpus_per_worker > 0) as world:
        before = resident_bytes()
        built = build(recipe, world, open_storage(recipe.storage))
        training = HostPeak()
        extra = resident_bytes() - before
        built.strategy.module.train()
        for _ in range(STEPS):
            _step(recipe, built, world.device)
        train = training.bytes() + extra
        if world.device.type == "cuda":
            train = torch.cuda.max_memory_allocated()
        Path(folder, f"{rank}.json").write_text(
            json.dumps({"load": built.load[rank]["peak_host_bytes"], "train": train})
        )
        world.all_gather(None)


def _step(recipe: Recipe, built: Any, device: torch.device) -> None:
    shape = (recipe.training.micro_batch, recipe.data.sequence_length)
    draw = np.random.default_rng(1)
    positions = np.broadcast_to(np.arange(shape[1]), shape).copy()
    targets = positions > 0
    batch = Batch(0, draw.integers(0, 1000, shape), positions, targets, target_tokens=int(targets.sum()))
    dtype = getattr(torch, recipe.model.dtype)
    strategy = built.strategy
    with strategy.micro_batch(last=True):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = built.task.loss(strategy.module, batch, device).loss_sum
        strategy.backward(loss / batch.target_tokens)
    strategy.step(1e-4)


def planned(recipe: Recipe, ranks: int) -> Plan:
    return Planner(read_base(recipe.model).config, Limits()).plan(recipe, ranks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], help="which; all without")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--allocator", choices=["frugal", "default"], default="frugal")
    given = parser.parse_args()
    if given.allocator == "frugal":
        os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # read by the processes that are measured, as they start
    with tempfile.TemporaryDirectory(prefix="muster-plan-") as folder:
        base = Path(folder, "base")
        parameters = make_base(base, SMALL if given.small else LARGE)
        where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        print(f"{parameters / 1e6:.0f} M parameters, packs of 512 tokens, 2 per micro-batch; {where}; MB\n", flush=True)
        print("| case | ranks | planned | measured | ratio | load planned at most | load measured |")
        print("|---|---|---|---|---|---|---|", flush=True)
        for name in given.cases or CASES:
            ranks, changes = CASES[name]
            if torch.cuda.device_count() in range(1, ranks):
                continue
            recipe = recipe_of(name, base, Path(folder), changes)
            plan, found = planned(recipe, ranks), measured(recipe, ranks, Path(folder))
            load = max(rank.peak_host_load_bytes for rank in plan.ranks)
            print(
                f"| {name} | {ranks} | {plan.peak_device_bytes / 1e6:,.0f} | {found.train / 1e6:,.0f} | "
                f"{plan.peak_device_bytes / found.train:.2f} | {load / 1e6:,.0f} | {found.load / 1e6:,.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
