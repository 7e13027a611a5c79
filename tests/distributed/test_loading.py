"""Loading by shard gives, to the last bit, what loading the base whole and cutting it gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.support.experts import experts_model
from tests.support.models import packed
from tests.support.nights import few_by_day
from tests.support.quantised import in_fp8, in_mxfp4
from tests.support.ranks import run_ranks
from tests.support.s3 import S3
from tests.support.tasks import make_encoder, task_recipe, write_task_data
from tests.support.training import small_recipe
from trainer.recipe import Recipe
from trainer.storage import Storage, open_storage

VOCABULARY = 67
"""Not a multiple of any number of ranks, so that shards are uneven."""
SHAPE = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
CASES: dict[str, dict[str, Any]] = {
    "lora": {"model.dtype": "bfloat16"},
    "lora-float32": {},
    "dora": {"adapter.method": "dora", "model.dtype": "bfloat16"},
    "dora-float16": {"adapter.method": "dora", "model.dtype": "float16"},
    "qlora": {"model.quantization": "nf4"},
    "qlora-bfloat16": {"model.quantization": "nf4", "model.dtype": "bfloat16"},
    "qdora": {"model.quantization": "nf4", "adapter.method": "dora", "model.dtype": "bfloat16"},
    "full": {"adapter.method": "none", "model.dtype": "bfloat16"},
    "bias": {"adapter.bias": "all", "model.dtype": "bfloat16"},
    "checkpointing": {"training.gradient_checkpointing": True},
    "head-too": {"adapter.modules_to_save": ["lm_head"], "model.dtype": "bfloat16"},
    "norm-and-head-too": {"adapter.method": "dora", "adapter.modules_to_save": ["norm", "lm_head"]},
    **{method: {"adapter": {"method": method}} for method in ("ia3", "loha", "prefix", "p_tuning")},
    "vera": {"adapter": {"method": "vera", "rank": 8, "modules_to_save": ["lm_head"]}},
    "qia3": {"adapter": {"method": "ia3"}, "model.quantization": "nf4"},
    **{
        f"q{method}": {"adapter": {"method": method, "block_size": 4}, "model.quantization": "nf4"}
        for method in ("oft", "boft")
    },
    "lokr": {"adapter": {"method": "lokr", "rank": 2}, "model.dtype": "bfloat16"},
}
KINDS = ["fsdp", "zero3"]

WHOLE = {("full", "zero3"), ("dora-float16", "zero3")}
"""Loaded whole by design, or refused by the recipe."""


@dataclass(frozen=True)
class Seen:
    """One way of loading, as rank 0 saw it: whole parameters, the first loss, the load report, the quantised state."""

    parameters: dict[str, torch.Tensor]
    states: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]
    loss: float
    load: list[dict[str, int]]


def make_model(folder: Path, *, dtype: torch.dtype = torch.bfloat16, shards: str = "5GB", **changes: Any) -> Path:
    """A Llama with random weights, biases and norms that are not all one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=VOCABULARY, num_key_value_heads=2, max_position_embeddings=128, attention_bias=True,
        mlp_bias=True, **{**SHAPE, **changes},
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    model.to(dtype).save_pretrained(folder, max_shard_size=shards)
    return folder


def load_in_processes(cases: list[tuple[Recipe, bool]], ranks: int, folder: Path) -> list[Seen]:
    """What each (recipe, by shard or whole) gives on ``ranks`` gloo processes."""
    run_ranks(_rank, ranks, cases, folder)
    return [torch.load(folder / f"{i}.pt", weights_only=False) for i in range(len(cases))]


def _rank(rank: int, cases: list[tuple[Recipe, bool]], folder: Path) -> None:
    from trainer.distributed.world import join_world

    with join_world(gpu=False) as world:
        for i, (recipe, by_shard) in enumerate(cases):
            seen = _load(recipe, world, by_shard=by_shard)
            if rank == 0:
                torch.save(seen, folder / f"{i}.pt")


def _load(recipe: Recipe, world: Any, *, by_shard: bool) -> Seen:
    from trainer.worker import build

    def whole(recipe: Recipe, world: Any, storage: Storage, *parts: Any) -> Any:
        return build.WholeLoader(recipe, world, *parts)

    loader = build.loader_of if by_shard else whole
    with mock.patch.object(build, "loader_of", loader):
        built = build.build(recipe, world, open_storage(recipe.storage))
    strategy = built.strategy
    parameters = {n: strategy.full_parameter(n).clone() for n, _ in strategy.model.named_parameters()}
    states = {}
    for name, module in strategy.model.named_modules():
        if getattr(module, "quant_state", None) is not None:
            state = module.quant_state
            states |= {f"{name}.absmax": state.absmax, f"{name}.code": state.code, f"{name}.offset": state.offset}
            states |= {f"{name}.nested": state.state2.absmax, f"{name}.nested_code": state.state2.code}
    loss = _step(built, world) if recipe.task == "sft" else torch.zeros(())
    buffers = dict(strategy.model.named_buffers())
    plain = {n: p.as_subclass(torch.Tensor) for n, p in parameters.items()}
    return Seen(plain, states, buffers, loss.item(), built.load)


def _step(built: Any, world: Any) -> torch.Tensor:
    strategy = built.strategy
    strategy.module.train()
    with strategy.micro_batch(True), strategy.autocast():
        batch = packed([[12, 9], [21]], vocabulary=VOCABULARY)
        loss: torch.Tensor = built.task.loss(strategy.module, batch, world.device).loss_sum
        strategy.backward(loss)
    strategy.step(1e-3)
    return loss


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Packed codes read as floating-point numbers may be nan, which is not equal to itself."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def assert_same(got: Seen, want: Seen) -> None:
    for part in ("parameters", "states", "buffers"):
        a, b = getattr(got, part), getattr(want, part)
        assert list(a) == list(b)
        for name, tensor in b.items():
            assert a[name].dtype == tensor.dtype, name
            assert torch.equal(bits(a[name]), bits(tensor)), name
    assert got.loss == want.loss


Make = Callable[..., Recipe]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base") / "sharded", shards="20KB")


@pytest.fixture
def make(base: Path, tmp_path: Path) -> Make:
    def recipe(**changes: Any) -> Recipe:
        return small_recipe("loading", base, tmp_path, **{"strategy.kind": "fsdp", "adapter.dropout": 0.0, **changes})

    return recipe


def size_of(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


CELLS = [(name, kind) for name in CASES for kind in KINDS if (name, kind) not in WHOLE]
BY_DAY = [(name, kind) for name, kind in CELLS if kind == "fsdp" or name in ("lora", "qdora")]
"""Every case once, and both kinds for a plain adapter and for one that is computed from a packed base; the rest is for
the night."""
FEW = [(name, kind) for name, kind in CELLS if name in ("lora", "dora", "qdora", "head-too", "vera")]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("ranks", "cells"),
    [
        pytest.param(1, FEW, marks=pytest.mark.night, id="1"),
        pytest.param(2, BY_DAY, id="2"),
        pytest.param(2, [cell for cell in CELLS if cell not in BY_DAY], marks=pytest.mark.night, id="2-rest"),
        pytest.param(3, FEW, marks=pytest.mark.night, id="3"),
    ],
)
def test_it_is_the_whole_load_cut_up(
    make: Make, base: Path, tmp_path: Path, ranks: int, cells: list[tuple[str, str]]
) -> None:
    recipes = [make(**{**CASES[name], "strategy.kind": kind}) for name, kind in cells]
    pairs = [(recipe, by_shard) for recipe in recipes for by_shard in (True, False)]
    seen = load_in_processes(pairs, ranks, tmp_path)
    for got, want in zip(seen[::2], seen[1::2], strict=True):
        assert_same(got, want)
        assert [row["rank"] for row in got.load] == list(range(ranks))
        # Headers and halos weigh much in a model this small, and no more than that.
        assert sum(row["bytes_read"] for row in got.load) < size_of(base) * 1.5
        assert sum(row["bytes_read"] for row in want.load) == ranks * size_of(base), "the yardstick is a whole load"


@pytest.mark.timeout(300)
def test_files_of_all_kinds(make: Make, tmp_path: Path) -> None:
    """One file or several, float32 on disk, embeddings that are tied, tensors named as in the model without a head."""
    from safetensors.torch import load_file, save_file

    single = make_model(tmp_path / "single", dtype=torch.float32)
    tied = make_model(tmp_path / "tied", tie_word_embeddings=True)
    headless = make_model(tmp_path / "headless", tie_word_embeddings=True)
    tensors = load_file(headless / "model.safetensors")
    assert "lm_head.weight" not in tensors
    renamed = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(renamed, headless / "model.safetensors", {"format": "pt"})
    recipes = [
        make(**{"model.path": str(folder), "model.dtype": "bfloat16", "model.quantization": quantization})
        for folder in (single, tied, headless)
        for quantization in ("none", "nf4")
    ]
    recipes.append(make(**{"model.path": str(tied), "adapter.method": "none"}))
    seen = load_in_processes([(recipe, by_shard) for recipe in recipes for by_shard in (True, False)], 2, tmp_path)
    for got, want in zip(seen[::2], seen[1::2], strict=True):
        assert_same(got, want)
        assert max(row["bytes_read"] for row in got.load) < max(row["bytes_read"] for row in want.load)


@pytest.mark.night
@pytest.mark.timeout(300)
def test_a_base_in_fp8_or_mxfp4_is_dequantised_by_shard(make: Make, base: Path, tmp_path: Path) -> None:
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=3, num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    GptOssForCausalLM(config).save_pretrained(tmp_path / "gpt-oss")
    single = make_model(tmp_path / "single", dtype=torch.float32)
    none: dict[str, Any] = {}
    nf4, zero3 = {"model.quantization": "nf4"}, {"strategy.kind": "zero3"}  # DeepSpeed cannot trace gpt-oss
    stored = [
        (in_fp8(single, tmp_path / "a"), (none, nf4, zero3)),
        (in_mxfp4(tmp_path / "gpt-oss", tmp_path / "b"), (none, nf4)),
    ]
    common = {"model.dtype": "bfloat16", "data.packing": False, "adapter.target_modules": ["q_proj", "o_proj"]}
    pairs = []
    for (folder, plain), cases in stored:
        for changes in cases:
            got, want = (make(**{**common, **changes, "model.path": str(f)}) for f in (folder, plain))
            pairs += [(got, True), (got, False), (want, False)]
    seen = load_in_processes(pairs, 2, tmp_path)
    for by_shard, whole, want in zip(seen[::3], seen[1::3], seen[2::3], strict=True):
        assert_same(whole, want)
        assert_same(by_shard, want)
        rows = (max(row["bytes_read"] for row in found.load) for found in (by_shard, whole))
        assert next(rows) < 0.8 * next(rows)


@pytest.mark.night
@pytest.mark.timeout(300)
def test_a_head_is_drawn_or_read_alike(base: Path, tmp_path: Path) -> None:
    """On a decoder without one, on an encoder whose head has another size, and on a whole reward model."""
    from transformers import LlamaForSequenceClassification

    write_task_data(tmp_path, "reward")
    encoder, whole = make_encoder(tmp_path / "encoder", num_labels=3), tmp_path / "whole"
    LlamaForSequenceClassification.from_pretrained(base, num_labels=1).save_pretrained(whole)
    changes: list[tuple[Path, dict[str, Any]]] = [
        (base, {"adapter.method": "lora", "model.dtype": "bfloat16"}),
        (base, {"adapter.method": "dora", "model.quantization": "nf4", "strategy.kind": "zero3"}),
        (base, {"adapter": {"method": "none"}}),
        (encoder, {"adapter": {"method": "ia3"}}),
        (encoder, {"adapter": {"method": "prefix"}, "strategy.kind": "zero3"}),
        (whole, {"adapter.method": "lora"}),
    ]
    recipes = [
        task_recipe("reward", f"head-{i}", folder, tmp_path, **{"strategy.kind": "fsdp", **more})
        for i, (folder, more) in enumerate(changes)
    ]
    seen = load_in_processes([(recipe, by_shard) for recipe in recipes for by_shard in (True, False)], 2, tmp_path)
    for (folder, _), got, want in zip(changes, seen[::2], seen[1::2], strict=True):
        assert_same(got, want)
        assert sum(row["bytes_read"] for row in got.load) < size_of(folder) * 1.7, "a whole load reads all of it twice"


@pytest.mark.timeout(300)
def test_from_object_storage_each_byte_comes_once(
    make: Make, base: Path, moto: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MUSTER_CACHE", str(tmp_path / "cache"))
    moto.filesystem().put(str(base), "models/base", recursive=True)
    changes = {"model.dtype": "bfloat16", "model.quantization": "nf4"}
    remote, local = make(**{**changes, "model.path": "s3://models/base"}), make(**changes)
    got, again, want = load_in_processes([(remote, True), (remote, True), (local, False)], 2, tmp_path)
    assert_same(got, want)
    assert_same(again, want)
    assert sum(row["bytes_fetched"] for row in got.load) == size_of(base)
    assert [row["bytes_fetched"] for row in again.load] == [0, 0]
    assert sum(row["bytes_read"] for row in again.load) == sum(row["bytes_read"] for row in got.load) > 0
    cached = [f.name for f in (tmp_path / "cache").rglob("*.safetensors")]
    assert cached == [], "no rank keeps whole files"


@pytest.mark.timeout(300)
def test_a_quantised_copy_gives_the_same_for_fewer_bytes(make: Make, tmp_path: Path) -> None:
    """The storage's copy is found by itself; named as the model, it is a repository that somebody quantised."""
    from trainer.model.prequantised import make_copy
    from trainer.run import layout

    folder = make_model(tmp_path / "wide", hidden_size=256, intermediate_size=640)
    changes = {"model.path": str(folder), "model.quantization": "nf4", "model.dtype": "bfloat16"}
    lora, dora = make(**changes), make(**changes, **{"adapter.method": "dora"})
    (want,) = load_in_processes([(lora, False)], 2, tmp_path)
    copy = make_copy(lora.model, open_storage(lora.storage).child(layout.MODELS))
    given = make(**{**changes, "model.path": copy.url})
    cases = [(lora, True), (given, True), (dora, True), (dora, False), (given, False)]
    found, named, magnitudes, magnitudes_want, named_want = load_in_processes(cases, 2, tmp_path)
    assert_same(found, want)
    assert_same(named, want)
    assert_same(magnitudes, magnitudes_want)
    assert_same(named_want, want)
    for seen in (found, named):
        assert sum(row["bytes_read"] for row in seen.load) < size_of(folder) * 0.35


@pytest.mark.timeout(300)
@pytest.mark.parametrize("quantization", few_by_day(["nf4", "none"], 1))
def test_no_rank_holds_more_than_its_part(make: Make, tmp_path: Path, quantization: str) -> None:
    # Many small matrices: a few of them are read ahead, and copied while they are quantised.
    big = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12}
    folder = make_model(tmp_path / "big", dtype=torch.float32, **big)
    small = make_model(tmp_path / "small")  # loaded first: what libraries take at their first use is not measured
    size = size_of(folder)
    assert size > 160e6
    recipes = [make(**{"model.path": str(f), "model.quantization": quantization}) for f in (small, folder)]
    _, seen = load_in_processes([(recipe, True) for recipe in recipes], 2, tmp_path)
    kept = size / 2 if quantization == "none" else size / 2 / 7
    for row in seen.load:
        assert row["peak_host_bytes"] < kept + 60e6
    if quantization == "none":
        assert all(row["peak_host_bytes"] > 0.9 * kept for row in seen.load), "it is really measured"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["fsdp", pytest.param("zero3", marks=pytest.mark.night)])
def test_experts_are_read_from_where_their_matrices_lie(make: Make, tmp_path: Path, kind: str) -> None:
    from trainer.model.prequantised import make_copy
    from trainer.run import layout

    recipes = []
    for name in ("deepseek_v3", "gpt_oss"):  # the files of the second one hold all experts in one tensor
        experts_model(name).save_pretrained(tmp_path / name, max_shard_size="40KB")
        unlike = {"model.path": str(tmp_path / name), "data.packing": name != "gpt_oss", "strategy.kind": kind}
        recipes += [make(**{**unlike, "model.quantization": quantization}) for quantization in ("none", "nf4")]
    pairs = [(recipe, by_shard) for recipe in recipes for by_shard in (True, False)]
    seen = load_in_processes(pairs, 2, tmp_path)
    for recipe, got, want in zip(recipes, seen[::2], seen[1::2], strict=True):
        assert_same(got, want)
        assert any(".experts." in name for name in got.states) == (recipe.model.quantization == "nf4")
        assert sum(row["bytes_read"] for row in got.load) < size_of(Path(recipe.model.path)) * 1.2
    make_copy(recipes[1].model, open_storage(recipes[1].storage).child(layout.MODELS))
    (copied,) = load_in_processes([(recipes[1], True)], 2, tmp_path)
    assert_same(copied, seen[3])
    assert sum(row["bytes_read"] for row in copied.load) < sum(row["bytes_read"] for row in seen[2].load) * 0.6


@pytest.mark.timeout(300)
def test_an_architecture_whose_weights_are_converted_is_loaded_whole(make: Make, tmp_path: Path) -> None:
    from transformers import OlmoHybridConfig, OlmoHybridForCausalLM

    config = OlmoHybridConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=16,
        linear_value_head_dim=16, layer_types=["linear_attention", "full_attention"], pad_token_id=0,
    )  # fmt: skip
    folder = tmp_path / "converted"
    OlmoHybridForCausalLM(config).save_pretrained(folder)
    changes = {"model.path": str(folder), "data.packing": False, "compute.attention": "sdpa"}
    (seen,) = load_in_processes([(make(**changes), True)], 2, tmp_path)
    assert [row["bytes_read"] for row in seen.load] == [size_of(folder)] * 2
