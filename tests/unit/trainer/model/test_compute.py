"""The section `compute`: compiled layers, kernels of attention, liger, TF32, and what is refused."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.attention import difference, gradient_of, lone_loss, random_llama
from tests.support.looping import bench
from tests.support.models import CPU, packed
from tests.support.training import losses, run_of, small_recipe, train_here, write_pairs
from trainer.errors import InputError, RecipeError
from trainer.layers import compiling
from trainer.layers.find import decoder_layers
from trainer.model.kernels import attention
from trainer.model.kernels.liger import use_liger
from trainer.model.kernels.varlen_cpu import by_sample
from trainer.run import layout
from trainer.run.jsonl import read_rows
from trainer.tasks.inputs import segments, to_device
from trainer.tasks.lm_head_loss import TargetHead
from trainer.worker import build

TINY = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
LENGTHS = [[20, 9], [16]]
GPU = {"resources.gpus_per_worker": 1}
BF16 = {"model.dtype": "bfloat16"}


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Layers are traced as torch.compile traces them, and run as they were traced: for what a C++ compiler makes of it,
    it takes a minute. One entry for each run of a program."""
    found: list[int] = []

    def backend(graph: Any, inputs: Any) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            found.append(1)
            return graph.forward(*given)

        return run

    torch._dynamo.reset()
    monkeypatch.setattr(compiling, "BACKEND", backend)
    yield found
    torch._dynamo.reset()


def compiled(recipe: Any) -> Any:
    return recipe.model_copy(update={"compute": recipe.compute.model_copy(update={"compile": True})})


def at_night(*given: Any) -> Any:
    """Tracing a layer takes torch ten seconds and more."""
    return pytest.param(*given, marks=pytest.mark.night)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        at_night({"training.gradient_checkpointing": True}),
        at_night({"strategy.kind": "fsdp", "training.gradient_checkpointing": True}),
        at_night({"model.dtype": "bfloat16", "model.quantization": "nf4"}),
        at_night({"strategy.kind": "fsdp", "adapter.method": "none", "model.dtype": "bfloat16"}),
        at_night({"adapter.method": "dora"}),
        at_night({"model.quantization": "int8"}),
    ],
)
def test_a_compiled_run_learns_the_same(
    changes: dict[str, Any], runs: list[int], tiny_model: Path, tmp_path: Path
) -> None:
    write_pairs(tmp_path / "data" / "a.jsonl", 40)
    changes = {
        **changes,
        "training.steps": 3,
        "data.eval": [{"path": f"{tmp_path}/data/a.jsonl", "format": "completion"}],
    }
    plain = small_recipe("plain", tiny_model, tmp_path, **changes)
    recipe = compiled(small_recipe("compiled", tiny_model, tmp_path, **changes))
    assert train_here(plain) == train_here(recipe) == "succeeded"
    assert runs
    got, want = losses(recipe), losses(plain)
    assert got == pytest.approx(want, rel=1e-2 if "model.dtype" in changes else 1e-5)
    rows = [row for row in read_rows(run_of(recipe), layout.METRICS) if "loss" in row]
    assert rows[0]["compile_s"] > 0
    (evaluated,) = [row for row in read_rows(run_of(recipe), layout.METRICS) if "eval_loss" in row]
    assert evaluated["compile_s"] > 0, "evaluations have programs of their own"
    (event, *_) = [e for e in read_rows(run_of(recipe), layout.EVENTS) if e["event"] == "compiled"]
    assert event["seconds"] == rows[0]["compile_s"]
    assert event["programs"] >= 1
    assert not any("compile_s" in row for row in read_rows(run_of(plain), layout.METRICS))


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_checkpointing_runs_each_layer_again(
    kind: str, checkpointing: bool, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FSDP2 gives a layer another class, in which transformers would look for its checkpointing."""
    ran: list[int] = []

    def counting(function: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
        return lambda *given, **named: ran.append(1) or function(*given, **named)

    monkeypatch.setattr(torch, "compile", counting)
    for check in ("check_used", "check_left_to_right"):  # they run the layers too
        monkeypatch.setattr(build, check, lambda *_: None)
    write_pairs(tmp_path / "data" / "a.jsonl", 40)
    one = {"training": {"steps": 1, "global_batch": 2, "micro_batch": 2, "gradient_checkpointing": checkpointing}}
    plain = {"strategy.kind": kind, "data.packing": False}
    recipe = compiled(small_recipe("r", tiny_model, tmp_path, **one, **plain))
    assert train_here(recipe) == "succeeded"
    with bench(recipe) as parts:
        layers = len(decoder_layers(parts.model))
    assert len(ran) == layers * (2 if checkpointing else 1)


@pytest.mark.night
@pytest.mark.parametrize("changes", [{}, {"model.dtype": "bfloat16"}, {"adapter.method": "none", "optimizer.lr": 1e-3}])
def test_what_the_compiler_makes_of_it_learns_the_same(
    changes: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    write_pairs(tmp_path / "data" / "a.jsonl", 90)
    plain = small_recipe("plain", tiny_model, tmp_path, **changes)
    recipe = compiled(small_recipe("compiled", tiny_model, tmp_path, **changes))
    assert train_here(plain) == train_here(recipe) == "succeeded"
    bound = 2e-2 if "model.dtype" in changes else 1e-4
    assert losses(recipe) == pytest.approx(losses(plain), rel=bound)


def test_without_a_compiler_it_is_said_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none() -> str:
        raise InvalidCxxCompiler()

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(InputError, match=r"needs a C\+\+ compiler on CPUs"):
        compiling.compile_layers(random_llama(CPU, torch.float32, **TINY), CPU)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"compute": {"attention": "varlen", "compile": True}}, "varlen loops over the samples on CPUs"),
        ({"compute": {"attention": "varlen"}, "adapter": {"method": "prefix"}}, "prefix may move with its own tokens"),
        ({"compute": {"attention": "flash"}}, "flash runs on GPUs only"),
        ({"compute": {"attention": "flex"}}, "flex runs on GPUs only"),
        ({"compute": {"attention": "varlen"}, **GPU}, "computes in 16 bits on GPUs, and model.dtype is float32"),
        ({"compute": {"attention": "flex"}, **GPU, "adapter": {"method": "prefix"}}, "which prefix may move with"),
        ({"compute": {"kernels": "liger"}}, "liger runs on GPUs only"),
        ({"compute": {"tf32": True}}, "has no effect on CPUs"),
        ({"compute": {"tf32": True}, **GPU, **BF16}, "has no effect on products in bfloat16"),
        ({"compute": {"compile": True}, "exact": True}, "exact promises the same bytes"),
        ({"compute": {"compile": True}, "strategy": {"kind": "zero3"}}, "that zero3 gathers parameters for"),
        ({"compute": {"peak_tflops": 0}}, "compute.peak_tflops"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=re.escape(says)):
        small_recipe("r", tmp_path, tmp_path, **changes)


def test_on_gpus_they_are_taken(tmp_path: Path) -> None:
    for section in ({"attention": "varlen", "kernels": "liger", "compile": True}, {"attention": "flash"}):
        small_recipe("r", tmp_path, tmp_path, compute=section, **GPU, **BF16)
    small_recipe("r", tmp_path, tmp_path, compute={"tf32": True, "attention": "flex"}, **GPU)


@pytest.mark.parametrize(
    ("device", "changes", "want"),
    [
        ("cuda", BF16, "varlen"),
        ("cuda", {"model.dtype": "float32"}, "sdpa"),
        ("cuda", {**BF16, "adapter": {"method": "prompt"}}, "sdpa"),
        ("cpu", BF16, "varlen"),
        ("cpu", {"model.dtype": "float32"}, "varlen"),
        ("cpu", {"compute.compile": True}, "sdpa"),
        ("cpu", {"adapter": {"method": "prompt"}}, "sdpa"),
        ("mps", BF16, "sdpa"),
    ],
)
def test_auto_takes_what_fits(device: str, changes: dict[str, Any], want: str, tmp_path: Path) -> None:
    recipe = small_recipe("r", tmp_path, tmp_path, **changes)
    assert attention.wanted(recipe, torch.device(device)) == want
    classifier = recipe.model_copy(update={"task": "classification"})
    assert attention.wanted(classifier, torch.device(device)) == "sdpa"


@pytest.fixture
def varlen() -> None:
    attention.register()


def settled(recipe: Any, model: Any) -> str:
    inputs = TargetHead(model, packed=recipe.data.packing).inputs
    return attention.settle_attention(recipe, model, model, inputs, CPU)


def loss_of(model: Any, batch: Any) -> torch.Tensor:
    return TargetHead(model).losses(model, batch, CPU).sum()


def test_told_where_samples_begin_a_pack_trains_like_its_samples(varlen: None) -> None:
    batch = packed(LENGTHS)
    model = random_llama(CPU, torch.float32, **TINY)
    alone = lone_loss(model, batch, CPU)
    want = gradient_of(model, alone)
    model.set_attn_implementation(attention.VARLEN)
    together = loss_of(model, batch)
    assert together.item() == pytest.approx(alone.item(), rel=1e-5)
    assert difference(gradient_of(model, together), want) <= 1e-4


def test_without_being_told_it_goes_by_the_positions(varlen: None) -> None:
    batch = packed(LENGTHS)
    model = random_llama(CPU, torch.float32, attention.VARLEN, **TINY)
    inputs = {"input_ids": to_device(batch.input_ids, CPU), "position_ids": to_device(batch.position_ids, CPU)}
    with torch.no_grad():
        want = model(
            **inputs, use_cache=False, **segments(batch.position_ids, CPU, attention.VARLEN, packed=True)
        ).logits
        assert torch.equal(model(**inputs, use_cache=False).logits, want)
        model.set_attn_implementation("sdpa")
        assert torch.allclose(model(**inputs, use_cache=False).logits, want, atol=1e-5)


def test_a_sliding_window_is_that_of_the_model(varlen: None) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(vocab_size=384, num_hidden_layers=2, sliding_window=5, head_dim=16, **TINY)
    torch.manual_seed(0)
    model = MistralForCausalLM(config)
    batch = packed(LENGTHS)
    inputs = {"input_ids": to_device(batch.input_ids, CPU), "position_ids": to_device(batch.position_ids, CPU)}
    with torch.no_grad():
        want = model(**inputs, use_cache=False).logits
        model.set_attn_implementation(attention.VARLEN)
        got = model(**inputs, use_cache=False).logits
    assert torch.allclose(got, want, atol=1e-5)


def test_segments_begin_at_each_position_zero() -> None:
    positions = np.array([[0, 1, 2, 0, 1], [0, 1, 2, 0, 0]])
    told = segments(positions, CPU, attention.VARLEN, packed=True)
    assert told["cu_seq_lens_q"].tolist() == [0, 3, 5, 8, 9, 10]
    assert told["max_length_q"] == told["max_length_k"] == 3
    begins, longest = segments(positions, CPU, attention.VARLEN, packed=False)["sample_bounds"]
    assert (begins.tolist(), longest) == (told["cu_seq_lens_q"].tolist(), 3)
    assert segments(positions, CPU, "flash_attention_2", packed=False) == {}  # it goes by the rows


class LinearAttention(torch.nn.Module):
    """As transformers' modules for linear attention without their library: the boundaries of samples are refused."""

    def __init__(self, attention: torch.nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, **given: Any) -> Any:
        if given.get("cu_seq_lens_q") is not None:
            raise ValueError("can't keep packed sequences apart")
        return self.attention(**given)


@pytest.mark.parametrize("packing", [False, True])
def test_layers_for_packs_are_told_of_samples_in_packs_alone(
    packing: bool, varlen: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The kernel is tried with what training asks: Qwen3-Next and its like train without packs by varlen."""
    recipe = small_recipe("r", tmp_path, tmp_path, **{"data.packing": packing})
    model = random_llama(CPU, torch.float32, **TINY)
    for layer in model.model.layers:
        layer.self_attn = LinearAttention(layer.self_attn)
    assert settled(recipe, model) == ("sdpa" if packing else "varlen")
    assert ("can't keep packed" in caplog.text) == packing
    batch = packed([[7], [12]])
    head = TargetHead(model, packed=packing)
    head.losses(model, batch, CPU).sum().backward()


def test_a_kernel_without_a_models_chunks_is_not_taken(varlen: None, tmp_path: Path) -> None:
    """They are longer than what the kernels are compared on, and shorter than the packs."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    sizes = {**TINY, "intermediate_size_mlp": 64, "num_local_experts": 2, "vocab_size": 384, "head_dim": 16}
    recipe = small_recipe("r", tmp_path, tmp_path, **{"data.packing": False})
    kernels = [
        settled(recipe, Llama4ForCausalLM(Llama4TextConfig(**sizes, num_hidden_layers=2, attention_chunk_size=chunk)))
        for chunk in (8192, 32)
    ]
    assert kernels == ["varlen", "sdpa"]


def test_the_name_is_that_of_the_kernel_that_runs(tmp_path: Path) -> None:
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]}
    model = GPTNeoForCausalLM(GPTNeoConfig(vocab_size=384, **sizes))
    for kernel in ("auto", "sdpa"):
        assert settled(small_recipe("r", tmp_path, tmp_path, **{"compute.attention": kernel}), model) == "eager"


@pytest.mark.parametrize("asks", [{"softcap": 30.0}, {"s_aux": torch.zeros(4)}, {"dropout": 0.1}])
def test_what_the_kernel_lacks_is_refused(asks: dict[str, Any]) -> None:
    q = torch.zeros(1, 4, 8, 16, device="meta" if "dropout" in asks else "cpu")
    with pytest.raises(InputError, match=f"has no {next(iter(asks))}"):
        attention.varlen_forward(SimpleNamespace(is_causal=True), q, q, q, None, **asks)


def test_the_kernel_is_compared_with_sdpa_on_the_model(
    varlen: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = small_recipe("r", tmp_path, tmp_path, compute={"attention": "varlen"}, **BF16)
    auto = small_recipe("r", tmp_path, tmp_path, **BF16)
    model = random_llama(CPU, torch.float32, **TINY)
    assert settled(asked, model) == "varlen"
    assert model.config._attn_implementation == attention.VARLEN
    assert model.training

    def sees_all(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, begins: torch.Tensor, *rest: Any) -> torch.Tensor:
        return by_sample(q, k, v, torch.tensor([0, len(q)]), *rest)

    monkeypatch.setattr(attention, "by_sample", sees_all)
    model = random_llama(CPU, torch.float32, **TINY)
    with pytest.raises(InputError, match="varlen does not work for LlamaForCausalLM here: logits move by"):
        settled(asked, model)
    assert settled(auto, model) == "sdpa"
    assert "attention by sdpa: varlen does not work here" in caplog.text
    assert model.config._attn_implementation == "sdpa"


def test_what_a_kernel_lacks_in_training_alone_is_found_before(
    varlen: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def without_dropout(q: torch.Tensor, *rest: Any) -> torch.Tensor:
        if dropout := rest[-1]:
            raise InputError(f"no dropout of {dropout}")
        return by_sample(q, *rest)

    monkeypatch.setattr(attention, "by_sample", without_dropout)
    auto = small_recipe("r", tmp_path, tmp_path)
    model = random_llama(CPU, torch.float32, attention_dropout=0.2, **TINY).eval()
    assert settled(auto, model) == "sdpa"
    assert "no dropout of 0.2" in caplog.text
    assert not model.training
    monkeypatch.undo()
    assert settled(auto, model) == "varlen"


def test_torchs_kernel_is_told_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs on GPUs only: here the one for CPUs answers in its place."""

    def kernel(q: Any, k: Any, v: Any, begins_q: Any, begins_k: Any, most_q: int, most_k: int, **told: Any) -> Any:
        assert torch.equal(begins_q, begins_k)
        assert most_q == most_k == 5
        assert told["enable_gqa"]
        return by_sample(q, k, v, begins_q, told["window_size"], told["scale"])

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    q, k, v = torch.randn(9, 4, 8), torch.randn(9, 2, 8), torch.randn(9, 2, 8)
    begins, window = torch.tensor([0, 5, 9]), (2, 0)
    assert torch.equal(attention._varlen(q, k, v, begins, 5, window, 0.3), by_sample(q, k, v, begins, window, 0.3))


def test_flash_says_what_to_install(tmp_path: Path) -> None:
    recipe = small_recipe("r", tmp_path, tmp_path, compute={"attention": "flash"}, **GPU, **BF16)
    model = random_llama(CPU, torch.float32, **TINY)
    with pytest.raises(InputError, match=re.escape("pip install flash-attn --no-build-isolation")):
        settled(recipe, model)


def test_liger_says_what_to_install() -> None:
    with pytest.raises(InputError, match=re.escape("pip install liger-kernel")):
        use_liger(random_llama(CPU, torch.float32, **TINY))


def test_liger_changes_the_model_but_for_its_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0.8.5" if name == "liger-kernel" else version(name)
    )
    package, inner, patch = (ModuleType(name) for name in ("liger_kernel", "transformers", "monkey_patch"))
    inner._apply_liger_kernel_to_instance = lambda **given: calls.append(given)  # type: ignore[attr-defined]
    patch.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None, "qwen2": None}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", inner)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", patch)
    model = random_llama(CPU, torch.float32, **TINY)
    use_liger(model)
    assert calls == [{"model": model, "cross_entropy": False, "fused_linear_cross_entropy": False}]
    model.config.model_type = "unheard-of"
    with pytest.raises(InputError, match="has none for models of type 'unheard-of'"):
        use_liger(model)
