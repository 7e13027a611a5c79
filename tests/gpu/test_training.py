"""Whole runs on a CUDA device: they train like the same run on the CPU, and go on after a stop as if there was none."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file

from tests.support.device import DEVICE, ON_DEVICE
from tests.support.training import losses, run_of, small_recipe, train_here, write_pairs
from trainer.distributed.world import World
from trainer.optim import make_optimizer
from trainer.recipe import OptimizerSection, Recipe
from trainer.run import layout
from trainer.run.jsonl import read_rows
from trainer.strategies.held import Itself
from trainer.strategies.optimizer_state import OptimizerState

FLOAT32, FOUR_BIT, MIXED = 1e-3, 5e-3, 2e-2
"""Relative difference between a loss on the device and on the CPU, over ten steps. Kernels add in another order, and
Adam's first steps follow the sign of a gradient, however small it is. In 4 bits a scale may also be rounded to the
other of two codes; in bfloat16 each product is rounded to 8 bits."""
AGAIN = 1e-4
"""The same of two runs on the device: some kernels add in the order in which their blocks finish."""

LORA = {"adapter.dropout": 0.0}  # the device draws other random numbers than the CPU
NF4 = {**LORA, "model.quantization": "nf4"}
FULL = {"adapter.method": "none", "optimizer.lr": 1e-3}
BFLOAT16 = {"model.dtype": "bfloat16"}
FSDP = {"strategy.kind": "fsdp"}
OFFLOAD = {"strategy": {"kind": "fsdp", "offload": True}}
ZERO3 = {"strategy.kind": "zero3"}

CASES: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "ddp": (LORA, {}, FLOAT32),
    "fsdp": (LORA, FSDP, FLOAT32),
    "fsdp-offload": (LORA, OFFLOAD, FLOAT32),
    "fsdp-full": (FULL, FSDP, FLOAT32),
    "fsdp-full-bfloat16": ({**FULL, **BFLOAT16}, FSDP, MIXED),
    "checkpointing": ({**LORA, "training.gradient_checkpointing": True}, {}, FLOAT32),
    "bfloat16": ({**LORA, **BFLOAT16}, {}, MIXED),
    "dora": ({**LORA, "adapter.method": "dora"}, FSDP, FLOAT32),
    "qlora": (NF4, {}, FOUR_BIT),
    "qlora-fsdp": (NF4, FSDP, FOUR_BIT),
    "qlora-fsdp-offload": (NF4, OFFLOAD, FOUR_BIT),
    "qlora-fsdp-bfloat16": ({**NF4, **BFLOAT16}, FSDP, MIXED),
    "qdora": ({**NF4, "adapter.method": "dora"}, {}, FOUR_BIT),
    "qdora-fsdp": ({**NF4, "adapter.method": "dora"}, FSDP, FOUR_BIT),
    "zero3": (LORA, ZERO3, FLOAT32),
    "compiled": (LORA, {"compute": {"compile": True}}, FLOAT32),
    "compiled-qlora-fsdp-checkpointing": (
        {**NF4, **BFLOAT16, "training.gradient_checkpointing": True},
        {**FSDP, "compute": {"compile": True}},
        MIXED,
    ),
    "tf32": (LORA, {"compute": {"tf32": True}}, MIXED),
    "flex": (LORA, {"compute": {"attention": "flex"}}, FLOAT32),
    "varlen": ({**LORA, **BFLOAT16}, {"compute": {"attention": "varlen"}}, MIXED),
    "varlen-fsdp-full-compiled": (
        {**FULL, **BFLOAT16},
        {**FSDP, "compute": {"attention": "varlen", "compile": True}},
        MIXED,
    ),
    "flash": ({**LORA, **BFLOAT16}, {"compute": {"attention": "flash"}}, MIXED),
    "liger": ({**LORA, **BFLOAT16}, {"compute": {"kernels": "liger"}}, MIXED),
}
"""What is trained, what is other than DDP on the device, and how far the losses may lie from DDP on the CPU."""

NEEDED = {"zero3": "deepspeed", "flash": "flash-attn", "liger": "liger-kernel"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_pairs(tmp_path / "data" / "a.jsonl", 90)
    return tmp_path


def worst(one: Recipe, other: Recipe) -> float:
    """The largest relative difference between the losses of two finished runs, which have learnt something."""
    want, got = losses(one), losses(other)
    assert list(want) == list(got) == list(range(1, 11))
    assert want[10] < want[1]
    return max(abs(got[step] - want[step]) / want[step] for step in want)


@pytest.mark.parametrize("case", CASES)
def test_trains_like_the_cpu(case: str, tiny_model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    what, where, bound = CASES[case]
    needed = NEEDED.get(case)
    if needed and not _installed(needed):
        pytest.skip(f"{needed} is not installed")
    if where is ZERO3:
        monkeypatch.setenv("LOCAL_RANK", "0")  # DeepSpeed asks for it; torchrun sets it
    on_cpu = small_recipe("on-cpu", tiny_model, folder, **what)
    on_device = small_recipe("on-device", tiny_model, folder, **what, **where, **ON_DEVICE)
    assert train_here(on_cpu) == train_here(on_device) == "succeeded"
    assert worst(on_cpu, on_device) <= bound


def _installed(distribution: str) -> bool:
    """Not whether it can be imported: a folder of that name in the checkout can be, too."""
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


RESUMED: dict[str, tuple[dict[str, Any], float]] = {
    "lora": ({}, AGAIN),
    "fsdp-offload": (OFFLOAD, AGAIN),
    "qdora-bfloat16": ({**FSDP, **BFLOAT16, "model.quantization": "nf4", "adapter.method": "dora"}, MIXED),
    "float16": ({"model.dtype": "float16"}, MIXED),
    "8bit": ({"optimizer.name": "adamw_8bit", "adapter.rank": 128, "adapter.alpha": 128}, AGAIN),
    "paged-8bit": ({"optimizer.name": "paged_adamw_8bit", "adapter.rank": 2048, "adapter.alpha": 256}, AGAIN),
}
"""With dropout: its random numbers have to come back too. The ranks give 8-bit moments, and paged ones (from 100,000
elements on), to a model of 64 units."""


@pytest.mark.parametrize("case", RESUMED)
def test_a_stopped_run_goes_on_as_if_it_had_not_been_stopped(case: str, tiny_model: Path, folder: Path) -> None:
    changes, bound = RESUMED[case]
    changes = {**changes, **ON_DEVICE}
    straight = small_recipe("straight", tiny_model, folder, **changes)
    assert train_here(straight) == "succeeded"
    stopped = small_recipe("stopped", tiny_model, folder, **changes, **{"training.stop_after": 5})
    assert train_here(stopped) == "interrupted"
    assert train_here(small_recipe("stopped", tiny_model, folder, **changes)) == "succeeded"
    assert [e["step"] for e in read_rows(run_of(stopped), layout.EVENTS) if e["event"] == "start"] == [0, 5]
    assert worst(straight, stopped) <= bound


def test_paged_moments_are_saved_and_come_back_paged(tmp_path: Path) -> None:
    section, nobody = OptimizerSection(name="paged_adamw_8bit", lr=1e-2), cast(World, None)

    def made(parameter: torch.nn.Parameter) -> tuple[Any, OptimizerState]:
        optimizer, held = make_optimizer(section, {"w": parameter}), {"w": Itself(parameter)}
        like = lambda saved, existing: saved.to(existing.device, existing.dtype)  # noqa: E731
        return optimizer, OptimizerState(optimizer, section.row, held, nobody, lambda tensor: tensor, like)

    def step(optimizer: Any, parameter: torch.nn.Parameter, number: int) -> None:
        parameter.grad = torch.full_like(parameter, 1.0 + number)
        optimizer.param_groups[0]["lr"] = section.lr  # as a strategy does; a load leaves 0
        optimizer.step()

    one = torch.nn.Parameter(torch.linspace(-1, 1, 512 * 512, device=DEVICE).view(512, 512))
    first, saved = made(one)
    for number in range(3):
        step(first, one, number)
    state = dict(saved.tensors())
    assert state["w.state1"].any()
    save_file({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "moments.safetensors")

    two = torch.nn.Parameter(one.detach().clone())
    second, loaded = made(two)
    loaded.load({"w": [name.removeprefix("w.") for name in state]}, state.__getitem__)
    for optimizer, parameter in ((first, one), (second, two)):
        assert optimizer.state[parameter]["state1"].is_paged
        assert optimizer.state[parameter]["state2"].is_paged
        step(optimizer, parameter, 3)
    assert torch.equal(one, two)


def test_the_choice_of_attention_and_the_share_of_the_peak_are_told(tiny_model: Path, folder: Path) -> None:
    changes = {**LORA, **BFLOAT16, "compute": {"peak_tflops": 100.0}}
    recipe = small_recipe("told", tiny_model, folder, **changes, **ON_DEVICE)
    assert train_here(recipe) == "succeeded"
    (start,) = [e for e in read_rows(run_of(recipe), layout.EVENTS) if e["event"] == "start"]
    assert start["attention"] == "varlen"
    rows = [r for r in read_rows(run_of(recipe), layout.METRICS) if "loss" in r]
    assert all(0 < row["mfu"] == row["hfu"] < 1 for row in rows)
