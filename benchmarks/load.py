"""Loading a base measured: bytes read, peak of host memory and time, by shard against whole on every rank.

    .venv/bin/python benchmarks/load.py [shards] [quantised] [storage] [experts] [layer]       all parts, or some

shards      a made-up model of 1 GB in bfloat16, from a folder, on 1 to 4 ranks of this machine, each against
            transformers' from_pretrained on every rank, in turns
quantised   the same model to NF4 while it is read, on 2 ranks, and from an NF4 copy
storage     the same model from S3 (moto's server on this machine), on 2 ranks
experts     a made-up mixture of experts of 0.7 GB, whose files hold each matrix of each expert by itself, on 2 ranks
layer       one decoder layer of Llama 70B's shape to NF4 on 2 ranks, and three training steps

Ranks are gloo processes. A peak is of a process's resident memory over what it held before; what is planned for it is
what the rank keeps plus 64 MiB for what is on its way.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from tests.support.models import packed  # noqa: E402
from tests.support.s3 import serve  # noqa: E402
from tests.support.training import small_recipe  # noqa: E402
from tests.support.waiting import free_port  # noqa: E402
from trainer.recipe import Recipe  # noqa: E402

GIGABYTE: dict[str, Any] = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 8, "vocab_size": 32000,
    "num_attention_heads": 16, "num_key_value_heads": 4,
}  # fmt: skip
LAYER_70B: dict[str, Any] = {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 1, "vocab_size": 512,
    "num_attention_heads": 64, "num_key_value_heads": 8,
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 2816, "moe_intermediate_size": 1408, "num_hidden_layers": 4,
    "vocab_size": 32000, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64, "num_experts": 16,
    "num_experts_per_tok": 2,
}  # fmt: skip
BUDGET = 64 * 2**20
FILE_BYTES = 2**28
MIB = 2**20
PAGE = 4096


class Loaded(NamedTuple):
    """Of one load: seconds until the last rank was ready; of each rank bytes read, its peak and what it keeps."""

    seconds: float
    read: list[int]
    peak: list[int]
    kept: list[int]
    losses: list[float]


def make_model(folder: Path, kind: str = "Llama", **shape: Any) -> int:
    """Random weights in several safetensors files, written one file at a time; their bytes."""
    import transformers
    from safetensors.torch import save_file

    config = getattr(transformers, f"{kind}Config")(
        max_position_embeddings=2048, architectures=[f"{kind}ForCausalLM"], **shape
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
    draw = torch.Generator().manual_seed(7)
    weight_map: dict[str, str] = {}
    pending: dict[str, torch.Tensor] = {}
    names = dict(stored for parameter in model.named_parameters() for stored in _stored(*parameter))
    for name, like in names.items():
        pending[name] = torch.empty(like, dtype=torch.bfloat16).normal_(0, 0.02, generator=draw)
        if sum(t.numel() * 2 for t in pending.values()) >= FILE_BYTES or name == list(names)[-1]:
            file = f"model-{len(set(weight_map.values())):05d}.safetensors"
            save_file(pending, folder / file, {"format": "pt"})
            weight_map.update(dict.fromkeys(pending, file))
            pending.clear()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def _stored(name: str, parameter: torch.Tensor) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields the names and shapes under which a parameter lies in files: experts one by one."""
    layer, _, attribute = name.partition(".experts.")
    parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(attribute, ())
    if not parts:
        yield name, tuple(parameter.shape)
    for expert in range(parameter.shape[0] if parts else 0):
        for part in parts:
            shape = (parameter.shape[1] // len(parts), parameter.shape[2])
            yield f"{layer}.experts.{expert}.{part}.weight", shape


def recipe_of(location: str, folder: Path, **changes: Any) -> Recipe:
    settings: dict[str, Any] = {"model.path": location, "model.dtype": "bfloat16", "strategy.kind": "fsdp"}
    settings["adapter.dropout"] = 0.0
    settings["data.packing"] = False  # otherwise two forwards, which look for leaks in packs, are part of a load
    return small_recipe("load", folder, folder, **{**settings, **changes})


def load(recipe: Recipe, ranks: int, load_one: Callable[..., Any], steps: int = 0) -> Loaded:
    """Runs ``load_one`` on each rank, in processes of their own."""
    import torch.multiprocessing as mp

    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, args=(recipe, ranks, free_port(), load_one, steps, folder), nprocs=ranks)
        rows = [json.loads(Path(folder, str(rank)).read_text()) for rank in range(ranks)]
    seconds = max(row["seconds"] for row in rows)
    kinds = ("read", "peak", "kept")
    return Loaded(seconds, *([row[kind] for row in rows] for kind in kinds), losses=rows[0]["losses"])


def _rank(
    rank: int, recipe: Recipe, ranks: int, port: int, load_one: Callable[..., Any], steps: int, folder: str
) -> None:
    import torch.distributed as dist

    from trainer.distributed.world import join_world

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks))
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo")
    with join_world(gpu=False) as world:
        Path(folder, str(rank)).write_text(json.dumps(load_one(recipe, world, steps)))
    dist.destroy_process_group()


def by_shard(recipe: Recipe, world: Any, steps: int) -> dict[str, Any]:
    import bitsandbytes  # noqa: F401 - imports are no part of loading
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    from trainer.storage import open_storage
    from trainer.worker.build import build

    storage = open_storage(recipe.storage)
    world.all_gather(None)
    began = time.perf_counter()
    built = build(recipe, world, storage)
    seconds = time.perf_counter() - began
    mine = built.load[world.rank]
    kept = built.strategy.local_bytes()
    losses = [_step(built, world, step) for step in range(steps)]
    return {"seconds": seconds, "read": mine["bytes_fetched"], "peak": mine["peak_host_bytes"], "kept": kept,
            "losses": losses}  # fmt: skip


def _step(built: Any, world: Any, step: int) -> float:
    strategy = built.strategy
    strategy.module.train()
    with strategy.micro_batch(True), strategy.autocast():
        loss = built.task.loss(strategy.module, packed([[24]], vocabulary=500), world.device).loss_sum
        strategy.backward(loss / 21)
    strategy.step(5e-3)
    return float(loss.detach()) / 21


def whole(recipe: Recipe, world: Any, steps: int) -> dict[str, Any]:
    """transformers by itself, as every rank of a plain script does it."""
    import transformers.models.llama.modeling_llama  # noqa: F401
    from transformers import AutoModelForCausalLM

    from trainer.model.peak_rss import HostPeak

    world.all_gather(None)
    host, began = HostPeak(), time.perf_counter()
    model: Any = AutoModelForCausalLM.from_pretrained(recipe.model.path, dtype=torch.bfloat16)
    for parameter in model.parameters():  # it is mapped: what is not touched is not read
        parameter.data.view(-1)[:: PAGE // parameter.element_size()].sum()
    world.all_gather(None)
    seconds = time.perf_counter() - began
    kept = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"seconds": seconds, "read": kept, "peak": host.bytes(), "kept": kept, "losses": []}


def row(what: str, got: Loaded, size: int, against: Loaded | None = None) -> str:
    ratio = max(peak / (kept + BUDGET) for peak, kept in zip(got.peak, got.kept, strict=True))
    speed = f"{got.seconds / against.seconds:.2f}" if against else ""
    return (
        f"| {what} | {sum(got.read) / size:.3f} | {max(got.kept) / MIB:,.0f} MiB | {max(got.peak) / MIB:,.0f} MiB | "
        f"{ratio:.2f} | {got.seconds:.1f} s | {speed} |"
    )


def shards(model: Path, size: int) -> Iterator[str]:
    recipe = recipe_of(str(model), model.parent)
    for ranks in (1, 2, 3, 4):
        plain = load(recipe, ranks, whole)
        got = load(recipe, ranks, by_shard)
        yield row(f"from_pretrained on each of {ranks}", plain, size)
        yield row(f"by shard, {ranks} ranks", got, size, plain)


def quantised(model: Path, size: int) -> Iterator[str]:
    from trainer.model.prequantised import make_copy
    from trainer.run import layout
    from trainer.storage import open_storage

    recipe = recipe_of(str(model), model.parent, **{"model.quantization": "nf4"})
    yield row("to NF4 while it is read, 2 ranks", load(recipe, 2, by_shard), size)
    make_copy(recipe.model, open_storage(recipe.storage).child(layout.MODELS))
    yield row("from its NF4 copy, 2 ranks", load(recipe, 2, by_shard), size)


def storage(model: Path, size: int) -> Iterator[str]:
    with serve() as s3:
        os.environ.update(s3.env)
        s3.reset()
        s3.filesystem().put(str(model), "models/base", recursive=True)
        recipe = recipe_of("s3://models/base", model.parent)
        yield row("from S3, 2 ranks", load(recipe, 2, by_shard), size)
        yield row("the same again on this host", load(recipe, 2, by_shard), size)


def experts(folder: Path) -> Iterator[str]:
    model = folder / "experts"
    size = make_model(model, "Qwen3Moe", **EXPERTS)
    for what, quantization in (("by shard", "none"), ("to NF4 while it is read", "nf4")):
        got = load(recipe_of(str(model), folder, **{"model.quantization": quantization}), 2, by_shard)
        yield row(f"experts ({size / MIB:,.0f} MiB) {what}, 2 ranks", got, size)
        planned = max(got.kept) + BUDGET
        assert sum(got.read) <= 1.02 * size, f"{sum(got.read):,} bytes read of {size:,}"
        assert max(got.peak) <= 1.2 * planned, f"{max(got.peak):,} bytes of host memory, planned were {planned:,}"
    shutil.rmtree(model)


def layer(folder: Path) -> Iterator[str]:
    model = folder / "layer"
    size = make_model(model, **LAYER_70B)
    recipe = recipe_of(str(model), folder, **{"model.quantization": "nf4"})
    got = load(recipe, 2, by_shard, steps=3)
    shutil.rmtree(model)
    yield row(f"70B's layer ({size / MIB:,.0f} MiB) to NF4, 2 ranks", got, size)
    planned = max(got.kept) + BUDGET
    assert max(got.peak) <= 1.2 * planned, f"{max(got.peak):,} bytes of host memory, planned were {planned:,}"
    assert got.losses[-1] < got.losses[0], got.losses
    yield f"\nits three steps: losses {', '.join(f'{loss:.4f}' for loss in got.losses)}"


def main() -> None:
    parts: dict[str, Callable[[Path, int], Iterator[str]]] = {
        "shards": shards, "quantised": quantised, "storage": storage,
    }  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own: dict[str, Callable[[Path], Iterator[str]]] = {"experts": experts, "layer": layer}
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join([*parts, *own]))
    chosen = parser.parse_args().parts or [*parts, *own]
    with tempfile.TemporaryDirectory(prefix="muster-load-") as scratch:
        folder = Path(scratch)
        os.environ["MUSTER_CACHE"] = str(folder / "cache")
        size = make_model(folder / "model", **GIGABYTE) if set(chosen) & set(parts) else 0
        print("| load | bytes read / bytes of the model | a rank keeps | peak | peak / planned | time | / plain |")
        print("|---|---|---|---|---|---|---|", flush=True)
        for name in chosen:
            for line in own[name](folder) if name in own else parts[name](folder / "model", size):
                print(line, flush=True)


if __name__ == "__main__":
    main()
