"""Sizes beside the shards: activations, optimizer, quantisation state, checkpoint, host, and what fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.support.nights import few_by_day
from tests.support.planning import SMALL, config_folder, plan_recipe, planned
from tests.support.training import small_recipe
from trainer.errors import InputError
from trainer.layers.find import decoder_layers
from trainer.plan.activation_memory import working_set
from trainer.plan.config import read_base
from trainer.plan.known_configs import SHAPES
from trainer.plan.memory import DEVICE_RESERVE, HOST_RESERVE, LOAD_BUDGET, Planner
from trainer.plan.meta_model import layer_count, with_layers
from trainer.plan.result import Limits
from trainer.plan.suggestions import suggestions
from trainer.recipe import load
from trainer.recipe.formats import formats_of
from trainer.recipe.optimizers import OPTIMIZERS
from trainer.recipe.tasks import TASKS

GPU = {"resources.gpus_per_worker": 1}
ROOT = Path(__file__).resolve().parents[4]


def activations(folder: Path, layers: int = 5, **changes: Any) -> int:
    recipe = plan_recipe(folder, {**SMALL, "num_hidden_layers": layers}, **changes)
    return working_set(recipe, read_base(recipe.model).config, 1).activations


def saved_bytes(task: Any, model: Any, batch: Any) -> int:
    """The bytes that the forward keeps for the backward, without parameters."""
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        assert task.loss(model, batch, torch.device("cpu")).loss_sum.requires_grad
    return sum(size for pointer, size in saved.items() if pointer not in parameters)


@pytest.mark.parametrize("changes", [{}, {"training.gradient_checkpointing": True}, {"model.dtype": "bfloat16"}])
def test_activations_are_a_line_in_the_depth(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Deep models are never measured: what is said of them lies on the line through shallow ones that are."""
    found = [activations(tmp_path, layers, **changes) for layers in (3, 4, 20)]
    slope = found[1] - found[0]
    assert slope > 0
    assert found[2] == found[0] + 17 * slope


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_the_line_is_what_a_deeper_model_takes(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = plan_recipe(tmp_path, **{"strategy.kind": kind, "model.dtype": "bfloat16"})
    config = with_layers(read_base(recipe.model).config, 9)
    told = working_set(recipe, config, 2)
    monkeypatch.setattr("trainer.plan.activation_memory.MEASURED_LAYERS", 9)
    taken = working_set(recipe, config, 2)
    assert sum(told) == pytest.approx(sum(taken), rel=0.01)
    assert (told.unsharded > 0) == (kind == "fsdp")


def test_activations_grow_with_what_is_fed(tmp_path: Path) -> None:
    plain = activations(tmp_path)
    more = activations(tmp_path, **{"training.micro_batch": 4})
    longer = activations(tmp_path, **{"data.sequence_length": 128})
    assert 1.8 * plain < more < 2.2 * plain
    assert 1.8 * plain < longer < 3.0 * plain  # the mask of a pack grows with the square
    assert activations(tmp_path, 20, **{"training.gradient_checkpointing": True}) < activations(tmp_path, 20) / 2
    assert activations(tmp_path, **{"adapter.method": "dora"}) > plain


def test_activations_are_those_of_a_real_step(tmp_path: Path, tiny_model: Path) -> None:
    """The bytes that autograd saves for the backward, counted on real tensors."""
    from tests.support.models import built, packed
    from trainer.plan.activation_memory import measure
    from trainer.tasks import make_task

    recipe = small_recipe("real", tiny_model, tmp_path, **{"adapter.dropout": 0.0})
    model, _ = built(recipe)
    task = make_task(recipe)
    task.attach(model)
    batch = packed([[40, 24], [32, 32]], prompt=1)  # a mask keeps samples apart, as in a plan
    real = saved_bytes(task, model, batch)
    assert measure(recipe, read_base(recipe.model).config, None).held == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize(
    ("optimizer", "elements", "size"),
    [("adamw", 10_000, 80_000), ("adamw_8bit", 1000, 8000), ("adamw_8bit", 10_000, 20_000 + 2 * 4 * 40)],
)
def test_optimizer_state(optimizer: str, elements: int, size: int) -> None:
    assert OPTIMIZERS[optimizer].state_bytes((elements,), elements, in_layer=True) == size


@pytest.mark.parametrize("optimizer", OPTIMIZERS.names())
@pytest.mark.parametrize("shape", [(96, 128), (33, 130), (64,)])
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU", "ignore:OptimState")
def test_optimizer_state_is_what_the_optimizer_holds(optimizer: str, shape: tuple[int, ...]) -> None:
    from trainer.optim import make_optimizer
    from trainer.recipe.sections.optimizer import OptimizerSection

    parameter, row = torch.nn.Parameter(torch.zeros(shape)), OPTIMIZERS[optimizer]
    matrices = frozenset({"w"} if row.holds == "matrices" and len(shape) == 2 else ())
    made: Any = make_optimizer(OptimizerSection(name=optimizer, lr=1e-3), {"w": parameter}, matrices)
    parameter.grad = torch.ones_like(parameter)
    if row.averages:
        made.train()
    with torch.compiler.set_stance("force_eager"):
        made.step()
    state, codec = made.state[parameter], row.load_codec()
    held = codec.raw(state) if codec else {k: v for k, v in state.items() if isinstance(v, torch.Tensor) and v.ndim}
    size = sum(t.numel() * t.element_size() for t in held.values())
    assert size == row.state_bytes(shape, parameter.numel(), in_layer=True)


def test_a_checkpoint_is_as_large_as_it_is_stored(tmp_path: Path, tiny_model: Path) -> None:
    from tests.support.training import run_of, train_here, write_pairs
    from trainer.run import layout
    from trainer.run.jsonl import read_rows

    write_pairs(tmp_path / "data" / "a.jsonl", 30)
    for name, changes in (("lora", {}), ("full", {"adapter.method": "none", "model.dtype": "bfloat16"})):
        length = {"training": {"steps": 2, "global_batch": 2, "micro_batch": 2}, "checkpoint.every_steps": 1}
        recipe = small_recipe(name, tiny_model, tmp_path, **{**length, **changes})
        assert train_here(recipe) == "succeeded"
        events = read_rows(run_of(recipe), layout.EVENTS)
        stored = min(e["bytes"] for e in events if e["event"] == "checkpoint")  # the last holds the tokenizer too
        assert planned(recipe).checkpoint_bytes == pytest.approx(stored, abs=40_000), name


def test_offload_moves_what_is_kept_to_the_host(tmp_path: Path) -> None:
    on, off = (
        planned(plan_recipe(tmp_path, **{"strategy.kind": "fsdp", "strategy.offload": offload, **GPU}), 2).ranks[0]
        for offload in (False, True)
    )
    kept = on.frozen_bytes + on.trainable_bytes + on.gradient_bytes + on.optimizer_bytes + on.padding_bytes
    assert (on.offloaded_bytes, off.offloaded_bytes) == (0, kept)
    assert off.peak_device_bytes == on.peak_device_bytes - kept
    assert off.peak_host_bytes >= kept


def test_activations_of_long_texts(tmp_path: Path) -> None:
    """The inputs of layers go to the host, and of the MLP one tile is left."""
    length = 512
    long = {**GPU, "data.sequence_length": length, "model.dtype": "bfloat16", "training.gradient_checkpointing": True}
    shape = {**SMALL, "intermediate_size": 8192, "num_hidden_layers": 8}

    def rank(*, gpus: int = 1, **compute: Any) -> Any:
        changes = {**long, "resources.gpus_per_worker": gpus, "compute": compute}
        return planned(plan_recipe(tmp_path, shape, **changes)).ranks[0]

    plain, kept, tiled = rank(), rank(offload_activations=True), rank(tile_tokens=64)
    layer_inputs = 8 * 2 * length * SMALL["hidden_size"] * 2  # layers x packs x tokens x values of two bytes
    assert (plain.offloaded_bytes, kept.offloaded_bytes) == (0, layer_inputs)
    # In the backward of the last layer, the device has its input, that of the layer before, and its output.
    assert plain.activation_bytes - kept.activation_bytes == layer_inputs * 5 // 8
    assert kept.peak_host_bytes >= layer_inputs
    assert tiled.activation_bytes < 0.5 * plain.activation_bytes
    assert rank(gpus=0, offload_activations=True).offloaded_bytes == 0, "a CPU's memory is the host's"


def test_the_hosts_peak(tmp_path: Path) -> None:
    sharded = planned(plan_recipe(tmp_path, **{"strategy.kind": "fsdp", **GPU}), 2).ranks[1]
    assert (
        sharded.peak_host_load_bytes
        == sharded.frozen_bytes + sharded.trainable_bytes + sharded.padding_bytes + LOAD_BUDGET
    )
    whole = planned(plan_recipe(tmp_path, **GPU), 2).ranks[1]
    assert whole.peak_host_load_bytes == whole.frozen_bytes + whole.trainable_bytes
    converted = planned(plan_recipe(tmp_path, {**SMALL, "dtype": "bfloat16"}, **GPU), 2)
    files = 2 * (converted.total_parameters - converted.trainable_parameters)
    assert converted.ranks[1].peak_host_load_bytes == whole.peak_host_load_bytes + files, "mapped while it is read"
    on_cpu = planned(plan_recipe(tmp_path), 2).ranks[1]
    assert on_cpu.peak_host_bytes == max(on_cpu.peak_device_bytes, on_cpu.peak_host_load_bytes)


def test_pissa_is_loaded_whole(tmp_path: Path) -> None:
    rank = planned(plan_recipe(tmp_path, **{"strategy.kind": "fsdp", "adapter.method": "pissa"}), 2).ranks[0]
    assert rank.peak_host_load_bytes > 1.9 * rank.frozen_bytes
    assert rank.peak_host_load_bytes < LOAD_BUDGET


@pytest.mark.parametrize("short", few_by_day([1, 0], 1))
def test_what_fits(tmp_path: Path, short: int) -> None:
    recipe = plan_recipe(tmp_path, **GPU)
    free = planned(recipe, 2)
    assert free.fits is None
    device = free.peak_device_bytes + DEVICE_RESERVE
    host = free.peak_host_bytes + HOST_RESERVE
    assert planned(recipe, 2, Limits(device - short, None)).fits is not bool(short)
    assert planned(recipe, 2, Limits(None, host - short)).fits is not bool(short)
    assert planned(recipe, 2, Limits(device, host - short)).fits is not bool(short)


def test_the_json_contract(tmp_path: Path) -> None:
    plan = planned(plan_recipe(tmp_path, **{"strategy.kind": "fsdp"}), 3, Limits(2**40, None))
    told = json.loads(json.dumps(plan.to_json()))
    assert told["fits"] is True
    assert told["world_size"] == len(told["ranks"]) == 3
    assert told["parameters"]["total"] > told["parameters"]["trainable"] > 0
    assert told["tokens_per_step"] == 6 * 64
    figures = [told["checkpoint_bytes"], *(v for rank in told["ranks"] for v in rank.values())]
    assert all(type(v) is int and v >= 0 for v in figures)
    wanted = {"rank", "frozen_bytes", "trainable_bytes", "gradient_bytes", "optimizer_bytes", "quant_state_bytes"}
    assert wanted | {"activation_bytes", "peak_device_bytes", "peak_host_load_bytes"} <= told["ranks"][0].keys()


WIDE = {**SMALL, "hidden_size": 1024, "intermediate_size": 4096, "head_dim": 256, "num_hidden_layers": 6}
FED = {"training": {"steps": 2, "global_batch": 8, "micro_batch": 8}, "data.sequence_length": 512, **GPU}


def advised(folder: Path, ranks: int, share: float, **changes: Any) -> list[tuple[str, ...]]:
    """Suggestions where each device has only ``share`` of what the recipe takes."""
    recipe = plan_recipe(folder, WIDE, **{**FED, "resources.workers": ranks, "model.dtype": "bfloat16", **changes})
    config = read_base(recipe.model).config
    peak = Planner(config, Limits()).plan(recipe, ranks).peak_device_bytes
    planner = Planner(config, Limits(int(peak * share) + DEVICE_RESERVE))
    found = suggestions(planner, recipe, ranks)
    assert all(s.plan.fits for s in found)
    for suggestion in found:  # planned again from what is told: it fits there too
        changed = load_changed(recipe, suggestion.overrides)
        anew = Planner(config, planner.limits).plan(changed, changed.resources.min_workers)
        assert anew.peak_device_bytes == suggestion.plan.peak_device_bytes
        assert anew.fits
    return [s.overrides for s in found]


def load_changed(recipe: Any, overrides: tuple[str, ...]) -> Any:
    from trainer.recipe import dump, loads

    return loads(dump(recipe), overrides=overrides)


@pytest.mark.night
def test_the_smallest_change_comes_first(tmp_path: Path) -> None:
    found = advised(tmp_path, 2, 0.9)
    assert found[0] == ("training.micro_batch=4",)
    assert found[1] == ("training.gradient_checkpointing=true",)


@pytest.mark.night
def test_what_helps_with_long_texts_in_the_order_of_its_cost(tmp_path: Path) -> None:
    long = {"training.micro_batch": 1, "training.gradient_checkpointing": True, "data.sequence_length": 8192}
    found = advised(tmp_path, 4, 0.75, **long, **{"strategy.kind": "fsdp"})
    assert found[:2] == [
        ("compute.tile_tokens=4096", "compute.offload_activations=true"),
        ("strategy.context_parallel=2",),
    ]


@pytest.mark.night
def test_changes_are_combined_where_one_is_not_enough(tmp_path: Path) -> None:
    found = advised(tmp_path, 1, 0.06)
    assert len(found) == 1
    assert "training.micro_batch=1" in found[0]
    assert len(found[0]) > 1


@pytest.mark.night
def test_nothing_helps_where_nothing_can(tmp_path: Path) -> None:
    assert advised(tmp_path, 1, 0.0) == []


@pytest.mark.parametrize("recipe", sorted(p.name for p in (ROOT / "recipes").glob("*.yaml") if p.stem != "quickstart"))
def test_the_base_of_every_shipped_recipe_is_known(recipe: str) -> None:
    """So that each can be planned without access to it."""
    from trainer.plan.known_configs import known_shape

    assert known_shape(load(ROOT / "recipes" / recipe).model.path) is not None


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Llama-3.1-8B", 8_030_261_248),
        ("Llama-3.1-70B-Instruct", 70_553_706_496),
        ("Mistral-7B-v0.3", 7_248_023_552),
        ("Qwen2.5-0.5B", 494_032_768),
        ("Qwen2.5-7B-Instruct", 7_615_616_512),
        ("Qwen2.5-14B", 14_770_033_664),
        ("Qwen3-0.6B", 596_049_920),
        ("Qwen3-8B", 8_190_735_360),
        ("Qwen3-30B-A3B", 30_532_122_624),
        ("Llama-3.2-1B", 1_235_814_400),
        ("Llama-3.2-3B", 3_212_749_824),
        ("gemma-3-1b-it", 999_885_952),
        ("gemma-3-4b-it", 4_300_079_472),
        ("gpt-oss-20b", 20_914_757_184),
        ("Mistral-Small-24B-Instruct-2501", 23_572_403_200),
        ("SmolLM3-3B", 3_075_098_624),
        ("phi-4", 14_659_507_200),
        ("Phi-4-mini-instruct", 3_836_021_760),
    ],
)
def test_known_shapes_have_their_models_parameters(tmp_path: Path, name: str, parameters: int) -> None:
    from trainer.plan.memory import read_model

    recipe = plan_recipe(tmp_path, dict(SHAPES[name]), **{"adapter.method": "none"})
    assert read_model(recipe, read_base(recipe.model).config).total == parameters


def test_what_is_out_of_reach_is_planned_by_its_name(tmp_path: Path) -> None:
    recipe = small_recipe("away", Path("unused"), tmp_path, **{"model.path": "memory://nowhere/Llama-3.1-8B"})
    base = read_base(recipe.model)
    assert layer_count(base.config) == 32
    assert "memory://nowhere/Llama-3.1-8B is out of reach" in base.note


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "holds no config.json"),
        ("{", "cannot be used"),
        ('{"model_type": "unheard-of"}', "unheard-of"),
        ('{"model_type": "vit"}', "causal language model"),
    ],
)
def test_what_is_no_base_is_said(tmp_path: Path, content: str | None, said: str) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    if content is not None:
        (folder / "config.json").write_text(content)
    with pytest.raises(InputError, match=said) as error:
        planned(small_recipe("bad", folder, tmp_path))
    assert str(folder) in str(error.value)


def test_a_target_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="q_prog"):
        planned(plan_recipe(tmp_path, **{"adapter.target_modules": ["q_prog"]}))


def test_a_url_gives_its_config(tmp_path: Path) -> None:
    folder = config_folder(tmp_path / "there")
    recipe = small_recipe("url", Path("unused"), tmp_path, **{"model.path": f"file://{folder}"})
    base = read_base(recipe.model)
    assert (layer_count(base.config), base.note) == (5, "")


BY_DAY = [("ppo", "fsdp"), ("distill", "ddp"), ("dpo", "fsdp"), ("classification", "ddp")]
TASKS_AND_KINDS = [(task, kind) for task in TASKS.names() for kind in ("ddp", "fsdp")]


@pytest.mark.parametrize(("task", "kind"), few_by_day(sorted(TASKS_AND_KINDS, key=lambda cell: cell not in BY_DAY), 4))
def test_every_task_can_be_planned(tmp_path: Path, task: str, kind: str) -> None:
    shape = {**SMALL, "eos_token_id": 2, "num_hidden_layers": 3}
    source = [{"path": "data/*.jsonl", "format": formats_of(task)[0]}]
    needed: dict[str, Any] = {f"{task}.reward": {"function": "rewards.py:rate"}} if task in ("ppo", "grpo") else {}
    needed |= {"distill.teacher": "unused"} if TASKS[task].has_teacher else {}
    changes = {"task": task, "strategy.kind": kind, "data.train": source, "data.packing": task == "sft", **needed}
    plan = planned(plan_recipe(tmp_path, shape, **changes), 2)
    assert plan.largest.activation_bytes > 0
    assert plan.trainable_parameters > 0


@pytest.mark.parametrize("kind", ["zero2", "zero3"])
def test_deepspeed_keeps_a_float32_copy_of_its_part(tmp_path: Path, kind: str) -> None:
    rank = planned(plan_recipe(tmp_path, **{"strategy.kind": kind, **GPU}), 3).ranks[0]
    whole = planned(plan_recipe(tmp_path, **GPU), 3).ranks[0]
    assert rank.gradient_bytes == pytest.approx(whole.gradient_bytes / 3, rel=0.02)
    assert rank.optimizer_bytes == pytest.approx((whole.optimizer_bytes + whole.gradient_bytes) / 3, rel=0.02)
    part = 1 if kind == "zero2" else 3
    assert rank.trainable_bytes == pytest.approx(whole.trainable_bytes / part, rel=0.02)
    assert rank.unsharded_bytes > 0
    offload = {"strategy.kind": kind, "strategy.deepspeed": f"{kind}_offload", **GPU}
    assert planned(plan_recipe(tmp_path, **offload), 3).ranks[0].offloaded_bytes >= rank.optimizer_bytes


MIXTURE: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "vocab_size": 384,
    "hidden_size": 60,
    "intermediate_size": 68,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 14,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
}
"""No row is a multiple of 16 bytes in 16 bits."""


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("method", ["lora", "none"])
def test_a_mixture_of_experts_has_a_plan_in_every_type(tmp_path: Path, kind: str, method: str) -> None:
    changes = {"strategy.kind": kind, "adapter.method": method, "adapter.target_modules": ["q_proj"]}
    sizes = {}
    for dtype in ("float32", "bfloat16", "float16"):
        recipe = plan_recipe(tmp_path, MIXTURE, **{**changes, "model.dtype": dtype})
        sizes[dtype] = sum(working_set(recipe, read_base(recipe.model).config, 2))
    assert 0 < sizes["float16"] == pytest.approx(sizes["bfloat16"], rel=0.15)  # float16 is scaled and cast
    assert sizes["bfloat16"] < sizes["float32"]


def test_a_mixture_keeps_what_a_real_step_keeps(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    from tests.support.models import built, packed
    from trainer.plan.activation_memory import measure
    from trainer.tasks import make_task

    shape = {k: v for k, v in MIXTURE.items() if k not in ("architectures", "model_type")}
    MixtralForCausalLM(MixtralConfig(**shape)).save_pretrained(tmp_path / "base")
    changes = {"adapter.dropout": 0.0, "adapter.target_modules": ["q_proj"]}
    recipe = small_recipe("real", tmp_path / "base", tmp_path, **changes)
    model, _ = built(recipe)
    task = make_task(recipe)
    task.attach(model)
    real = saved_bytes(task, model, packed([[40, 24], [32, 32]], prompt=1))
    assert measure(recipe, read_base(recipe.model).config, None).held == pytest.approx(real, rel=0.1)


def test_an_operation_that_fails_on_fake_tensors_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    for error in (TypeError("no such\nthing"), ValueError("bad"), AssertionError("odd")):

        def fails(*_: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(LlamaMLP, "forward", fails)
        with pytest.raises(InputError, match=r"cannot be computed without weights: (no such thing|bad|odd)$"):
            activations(tmp_path)
    assert not caplog.records


@pytest.mark.parametrize(
    "config",
    [
        transformers.JambaConfig(num_hidden_layers=8),
        transformers.Zamba2Config(num_hidden_layers=4, layers_block_type=["mamba", "hybrid", "mamba", "hybrid"]),
        transformers.Qwen3NextConfig(num_hidden_layers=4),
    ],
    ids=lambda config: config.model_type,
)
def test_fewer_layers_of_any_architecture(config: transformers.PreTrainedConfig) -> None:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(with_layers(config, 3))
    assert len(decoder_layers(model)) == 3
