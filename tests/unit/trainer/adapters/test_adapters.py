"""LoRA, DoRA and full fine-tuning: where adapters go, how they begin, and that what is saved loads without muster."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.models import base_of, built, logits_of, stir
from tests.support.training import small_recipe
from trainer.adapters import make_adapter, verify_saved
from trainer.adapters.base import Adapter
from trainer.errors import CorruptObject, InputError
from trainer.recipe import Recipe

Make = Callable[..., Recipe]
LEAVES = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


@pytest.fixture
def make(tiny_model: Path, tmp_path: Path) -> Make:
    return lambda **changes: small_recipe("adapter", tiny_model, tmp_path, **changes)


def adapted(model: Any) -> set[str]:
    return {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if hasattr(m, "lora_A")}


def test_all_linear_is_every_linear_layer_but_the_output_head(make: Make) -> None:
    model, _ = built(make())
    assert adapted(model) == set(LEAVES)
    assert sum(hasattr(m, "lora_A") for m in model.modules()) == 14


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], r".*\.(q|v)_proj", [r"self_attn.q_proj", "v_proj"]])
def test_targets_by_list_and_by_pattern(make: Make, targets: Any) -> None:
    model, _ = built(make(**{"adapter.target_modules": targets}))
    assert adapted(model) == {"q_proj", "v_proj"}
    assert sum(hasattr(m, "lora_A") for m in model.modules()) == 4


def test_the_head_may_be_named(make: Make) -> None:
    model, _ = built(make(**{"adapter.target_modules": ["lm_head"]}))
    assert adapted(model) == {"lm_head"}


@pytest.mark.parametrize("targets", [["q_proj", "w_proj"], "w_proj", ["embed_tokens"], ["self_attn"]])
def test_a_target_that_matches_nothing_is_refused_with_what_there_is(make: Make, targets: Any) -> None:
    with pytest.raises(InputError, match="match no linear layer") as refused:
        built(make(**{"adapter.target_modules": targets}))
    wrong = targets if isinstance(targets, str) else targets[-1]
    assert wrong in str(refused.value)
    assert "'q_proj'" not in str(refused.value).split("]")[0], "only what matches nothing is blamed"
    for name in (*LEAVES, "lm_head", "all-linear"):
        assert name in str(refused.value)


def test_a_pattern_that_also_matches_what_has_no_adapter_is_refused(make: Make) -> None:
    with pytest.raises(InputError, match=r"'\.\*' do not fit this model"):
        built(make(**{"adapter.target_modules": ".*"}))


def initial(recipe: Recipe, global_seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(global_seed)
    model, _ = built(recipe)
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".lora_A." in n}


def test_an_adapter_begins_by_the_recipes_seed_alone(make: Make) -> None:
    one, other_torch = initial(make(), 1), initial(make(), 2)
    other_seed = initial(make(seed=18), 1)
    assert len(one) == 14
    for name in one:
        assert torch.equal(one[name], other_torch[name])
        assert not torch.equal(one[name], other_seed[name])
    layers = [one[n] for n in one if "q_proj" in n]
    assert not torch.equal(layers[0], layers[1]), "each parameter draws its own"
    assert 0.5 < one[next(iter(one))].abs().max() * 64**0.5 <= 1.0, "Kaiming-uniform over the inputs, a = sqrt(5)"


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_an_adapter_begins_as_its_base(make: Make, method: str, quantization: str) -> None:
    recipe = make(**{"adapter.method": method, "model.quantization": quantization})
    model, _ = built(recipe)
    torch.testing.assert_close(logits_of(model), logits_of(base_of(recipe)), rtol=0, atol=1e-5)


def test_what_is_trained_is_float32_and_the_base_is_what_the_recipe_says(make: Make) -> None:
    model, _ = built(make(**{"model.dtype": "bfloat16"}))
    kinds = {(p.requires_grad, p.dtype) for p in model.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    assert all("lora_" in n for n, p in model.named_parameters() if p.requires_grad)


def saved(model: Any, adapter: Adapter, folder: Path) -> dict[str, tuple[int, ...]]:
    """Saves what is trained; the names and shapes that are expected of the file."""
    folder.mkdir(exist_ok=True)
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    adapter.save(model, weights, folder)
    names = adapter.saved_names(model)
    return {names[n]: tuple(w.shape) for n, w in weights.items()}


def reloaded(recipe: Recipe, folder: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(base_of(recipe), str(folder))


RELOADS: list[dict[str, Any]] = [
    {},
    {"adapter.method": "dora"},
    {"adapter.target_modules": ["q_proj", "lm_head"]},
    {"model.quantization": "nf4"},
    {"model.quantization": "nf4", "adapter.method": "dora"},
]


@pytest.mark.parametrize("changes", RELOADS)
def test_plain_peft_loads_what_was_saved(make: Make, tmp_path: Path, changes: dict[str, Any]) -> None:
    recipe = make(**changes)
    model, adapter = built(recipe)
    stir(model)
    shapes = saved(model, adapter, tmp_path / "out")
    verify_saved(adapter, shapes, tmp_path / "out")
    wanted = logits_of(model)
    assert (wanted - logits_of(base_of(recipe))).abs().max() > 0.01, "the adapter does something"
    torch.testing.assert_close(logits_of(reloaded(recipe, tmp_path / "out")), wanted, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def biased_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2, which has biases."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=384, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("biased")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("bias", "trained"), [("all", 3), ("lora_only", 1), ("none", 0)])
def test_trained_biases_are_saved_and_loaded(biased_model: Path, tmp_path: Path, bias: str, trained: int) -> None:
    changes = {"adapter.bias": bias, "adapter.target_modules": ["q_proj", "o_proj"]}
    recipe = small_recipe("biases", biased_model, tmp_path, **changes)
    model, adapter = built(recipe)
    stir(model)
    shapes = saved(model, adapter, tmp_path / "out")
    assert sum(name.endswith("bias") for name in shapes) == trained
    verify_saved(adapter, shapes, tmp_path / "out")
    torch.testing.assert_close(logits_of(reloaded(recipe, tmp_path / "out")), logits_of(model), rtol=0, atol=1e-5)


def test_the_saved_configuration_names_the_recipes_base_and_is_the_same_in_every_process(
    make: Make, tmp_path: Path
) -> None:
    recipe = make()
    adapter = make_adapter(recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": "org/base"})}))
    model = adapter.attach(base_of(recipe))
    saved(model, adapter, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/base", "not the folder that it was loaded from"
    assert config["inference_mode"] is True
    assert len(config["target_modules"]) == 14
    assert config["target_modules"] == sorted(config["target_modules"]), "a set has another order in each process"
    assert model.peft_config["default"].inference_mode is False, "the one in training stays as it is"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_full_fine_tuning_leaves_a_plain_model(
    make: Make, biased_model: Path, tmp_path: Path, dtype: str, tied: bool
) -> None:
    from transformers import AutoModelForCausalLM

    path = {"model.path": str(biased_model)} if tied else {}
    model, adapter = built(make(**{"adapter.method": "none", "model.dtype": dtype, **path}))
    assert {p.dtype for p in model.parameters()} == {torch.float32}, "the optimizer works on float32"
    stir(model, 0.02)
    shapes = saved(model, adapter, tmp_path / "out")
    verify_saved(adapter, shapes, tmp_path / "out")
    assert ("lm_head.weight" in shapes) is not tied
    plain, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert {p.dtype for p in plain.parameters()} == {getattr(torch, dtype)}
    for parameter in model.parameters():  # not model.to(): buffers such as the rotary frequencies stay in float32
        parameter.data = parameter.data.to(getattr(torch, dtype))
    assert torch.equal(logits_of(plain), logits_of(model))


@pytest.fixture
def whole(make: Make, tmp_path: Path) -> tuple[Adapter, dict[str, tuple[int, ...]], Path]:
    model, adapter = built(make(**{"adapter.target_modules": ["q_proj"]}))
    stir(model)
    return adapter, saved(model, adapter, tmp_path / "out"), tmp_path / "out"


def _missing(tensors: dict[str, torch.Tensor], name: str) -> None:
    del tensors[name]


def _foreign(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors["stranger"] = torch.ones(2)


def _shape(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name][:1].contiguous()


def _nan(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name].view(-1)[3] = float("nan")


def _integers(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name].to(torch.int32)


def _zero(tensors: dict[str, torch.Tensor], name: str) -> None:
    for key, tensor in tensors.items():
        if "lora_B" in key:
            tensor.zero_()


DAMAGE = [
    (_missing, "1 tensors are missing"),
    (_foreign, r"1 are foreign \['stranger'\]"),
    (_shape, r"has shape \(1, \d+\), expected \(\d+, \d+\)"),
    (_nan, "not finite"),
    (_integers, "dtype torch.int32"),
    (_zero, "all 2 tensors that training moves away from zero are zero"),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGE)
def test_a_saved_adapter_that_is_not_what_it_should_be_is_refused(whole: Any, damage: Any, words: str) -> None:
    adapter, shapes, folder = whole
    file = folder / adapter.weights_file
    tensors = load_file(file)
    damage(tensors, sorted(tensors)[0])
    save_file(tensors, file)
    with pytest.raises(CorruptObject, match=words):
        verify_saved(adapter, shapes, folder)


def test_one_matrix_that_learnt_is_enough_and_none_before_the_first_update(whole: Any) -> None:
    adapter, shapes, folder = whole
    tensors = load_file(folder / adapter.weights_file)
    names = sorted(n for n in tensors if "lora_B" in n)
    tensors[names[0]].zero_()
    save_file(tensors, folder / adapter.weights_file)
    verify_saved(adapter, shapes, folder)
    tensors[names[1]].zero_()
    save_file(tensors, folder / adapter.weights_file)
    verify_saved(adapter, shapes, folder, updated=False)
    with pytest.raises(CorruptObject, match="zero"):
        verify_saved(adapter, shapes, folder)
