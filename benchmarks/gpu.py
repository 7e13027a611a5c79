"""Tokens per second, MFU and memory against the plan on one CUDA device: a Llama of 8B with random weights.

    .venv/bin/python benchmarks/gpu.py                          all cases, and attention by itself
    .venv/bin/python benchmarks/gpu.py nf4-lora-ckpt attention  some of them
    .venv/bin/python benchmarks/gpu.py --layers 8               the first 8 layers: other figures, and said so

Weights are made on the device, so that nothing is downloaded or written; a case that the plan says does not fit is left
out. Needs torch, transformers, peft and bitsandbytes; no Ray. Without a CUDA device it says so, and ends with 0.

MFU is that of the metrics of a run, by the formula of `trainer/worker/mfu.py`; what checkpointing and fused attention
compute again does not count. The peak is the dense one in bfloat16.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention  # noqa: E402

from tests.support.device import HAS_GPU, NO_GPU, DevicePeak, synchronise  # noqa: E402
from tests.support.stepping import full_packs, one_step, random_parts  # noqa: E402
from tests.support.training import small_recipe  # noqa: E402
from trainer.distributed.world import World, join_world  # noqa: E402
from trainer.plan.config import read_base  # noqa: E402
from trainer.plan.known_configs import LLAMA_3_8B  # noqa: E402
from trainer.plan.memory import DEVICE_RESERVE, Planner  # noqa: E402
from trainer.plan.result import Limits  # noqa: E402
from trainer.recipe import Recipe  # noqa: E402
from trainer.worker.mfu import peak_flops  # noqa: E402

GIB = 2**30
WARM_UP, STEPS = 2, 8
CHECKPOINTING = {"training.gradient_checkpointing": True}
NF4 = {"model.quantization": "nf4"}
CASES: dict[str, dict[str, Any]] = {
    "nf4-lora-ckpt": {**NF4, **CHECKPOINTING},
    "nf4-lora": NF4,
    "bf16-lora-ckpt": CHECKPOINTING,
    "bf16-lora": {},
}
ATTENTION = "attention"


class Measured(NamedTuple):
    seconds: float
    peak_bytes: int
    flops: float


def recipe_of(name: str, folder: Path, given: argparse.Namespace, shape: dict[str, Any]) -> Recipe:
    base = folder / name
    base.mkdir(parents=True, exist_ok=True)
    (base / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **shape}))
    common = {
        "model.dtype": "bfloat16",
        "adapter": {"method": "lora", "rank": 16, "alpha": 32, "dropout": 0.0},
        "data.sequence_length": given.length,
        "training.global_batch": given.packs,
        "training.micro_batch": given.packs,
        "resources.gpus_per_worker": int(HAS_GPU),
    }
    return small_recipe(name, base, folder, **{**common, **CASES[name]})


def measured(recipe: Recipe, world: World, samples: int, steps: int = STEPS) -> Measured:
    """The median step after the first ones, and the peak of all; 0 bytes on a CPU, where torch does not count them."""
    peak = DevicePeak(world.device) if world.device.type == "cuda" else None
    parts = random_parts(recipe, world)
    length = recipe.data.sequence_length
    config: Any = read_base(recipe.model).config
    batch = full_packs(recipe.training.micro_batch, length, samples, config.vocab_size)
    if peak:
        peak.restart()
    seconds = [timed(lambda: one_step(parts, batch), world.device) for _ in range(WARM_UP + steps)]
    flops = parts.operations.step(batch.tokens, batch.target_tokens, parts.operations.scores(batch))
    return Measured(statistics.median(seconds[WARM_UP:]), peak.bytes() if peak else 0, flops)


def timed(do: Callable[[], Any], device: torch.device) -> float:
    synchronise(device)
    began = time.perf_counter()
    do()
    synchronise(device)
    return time.perf_counter() - began


def row(name: str, recipe: Recipe, world: World, given: argparse.Namespace) -> list[str]:
    planned = Planner(read_base(recipe.model).config, Limits()).plan(recipe, 1).peak_device_bytes
    cells = [name, f"{planned / GIB:.1f}"]
    total = torch.cuda.get_device_properties(world.device).total_memory
    if planned + DEVICE_RESERVE > total:
        return [*cells, f"does not fit into {total / GIB:.1f}", "", "", "", ""]
    try:
        found = measured(recipe, world, given.samples)
    except torch.cuda.OutOfMemoryError:
        return [*cells, "out of memory", "", "", "", ""]
    tokens_per_s = given.packs * given.length / found.seconds
    most = given.peak_tflops * 1e12 if given.peak_tflops else peak_flops(torch.cuda.get_device_name(world.device))
    mfu = f"{100 * found.flops / found.seconds / most:.1f} %" if most else "peak unknown: --peak-tflops"
    memory = [f"{found.peak_bytes / GIB:.1f}", f"{planned / found.peak_bytes:.2f}"]
    return [*cells, *memory, f"{1000 * found.seconds:.0f}", f"{tokens_per_s:,.0f}", mfu]


def attention_ms(device: torch.device, length: int, samples: int, heads: int = 32, width: int = 128) -> dict[str, str]:
    """Milliseconds of forward and backward of one layer's attention in bfloat16, by kernel. Only those with a mask keep
    the samples of a pack apart; flash attention without one is the same work on a single sample."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def tensor() -> torch.Tensor:
        return torch.randn(1, heads, length, width, device=device, dtype=torch.bfloat16, requires_grad=True)

    q, k, v = tensor(), tensor(), tensor()
    sample = torch.arange(length, device=device) // (length // samples)
    order = torch.arange(length, device=device)
    mask = (sample[:, None] == sample[None]) & (order[:, None] >= order[None])

    def keep(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (sample[query] == sample[key]) & (query >= key)

    blocks = create_block_mask(keep, B=None, H=None, Q_LEN=length, KV_LEN=length, device=str(device))
    compiled = torch.compile(flex_attention)

    def sdpa(backend: SDPBackend, **masked: Any) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, **masked)

        return run

    kernels: dict[str, Callable[[], Any]] = {
        "memory-efficient, mask": sdpa(SDPBackend.EFFICIENT_ATTENTION, attn_mask=mask),
        "cuDNN, mask": sdpa(SDPBackend.CUDNN_ATTENTION, attn_mask=mask),
        "flex_attention, block mask": lambda: compiled(q, k, v, block_mask=blocks),
        "flash, causal, one sample": sdpa(SDPBackend.FLASH_ATTENTION, is_causal=True),
    }
    return {name: _median_ms(forward, device) for name, forward in kernels.items()}


def _median_ms(forward: Callable[[], Any], device: torch.device) -> str:
    def both() -> None:
        out = forward()
        out.backward(torch.ones_like(out))

    try:
        seconds = [timed(both, device) for _ in range(WARM_UP + STEPS)]
    except Exception as error:  # a kernel that this device or this build lacks; each library has its own exception
        return f"does not run here: {str(error).splitlines()[0][:80]}"
    return f"{1000 * statistics.median(seconds[WARM_UP:]):.2f}"


def table(head: list[str]) -> None:
    print("\n| " + " | ".join(head) + " |\n|" + "---|" * len(head), flush=True)


def about(given: argparse.Namespace, shape: dict[str, Any]) -> str:
    libraries = ", ".join(f"{name} {version(name)}" for name in ("transformers", "peft", "bitsandbytes"))
    layers, whole = shape["num_hidden_layers"], LLAMA_3_8B["num_hidden_layers"]
    part = "" if layers == whole else f", {layers} OF ITS {whole} LAYERS: no figures of an 8B"
    return (
        f"{torch.cuda.get_device_name()}, {torch.cuda.get_device_properties(0).total_memory / GIB:.1f} GiB; torch "
        f"{torch.__version__}, CUDA {torch.version.cuda}, {libraries}\nLlama of 8B with random weights{part}; LoRA of "
        f"rank 16, bfloat16, {given.packs} packs of {given.length} tokens in {given.samples} samples; memory in GiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[*CASES, ATTENTION, []], help="which; all without")
    parser.add_argument("--layers", type=int, default=LLAMA_3_8B["num_hidden_layers"], help="how many of the 32")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a pack")
    parser.add_argument("--packs", type=int, default=1, help="packs of a micro-batch")
    parser.add_argument("--samples", type=int, default=8, help="samples of a pack")
    parser.add_argument("--peak-tflops", type=float, help="of the device in bfloat16, where the table lacks it")
    given = parser.parse_args()
    if not HAS_GPU:
        print(f"nothing measured: {NO_GPU}")
        return
    shape = {**LLAMA_3_8B, "num_hidden_layers": given.layers}
    print(about(given, shape))
    asked = given.cases or [*CASES, ATTENTION]
    if set(asked) & set(CASES):
        steps(given, shape, [name for name in CASES if name in asked])
    if ATTENTION in asked:
        table(["attention of one layer, forward and backward", "ms"])
        for name, told in attention_ms(torch.device("cuda", 0), given.length, given.samples).items():
            print(f"| {name} | {told} |", flush=True)


def steps(given: argparse.Namespace, shape: dict[str, Any], names: list[str]) -> None:
    table(["case", "planned", "measured", "planned / measured", "ms per step", "tokens/s", "MFU"])
    with tempfile.TemporaryDirectory(prefix="muster-gpu-") as folder, join_world(gpu=True) as world:
        for name in names:
            cells = row(name, recipe_of(name, Path(folder), given, shape), world, given)
            print(f"| {' | '.join(cells)} |", flush=True)
            gc.collect()  # hooks of the model refer to each other
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
