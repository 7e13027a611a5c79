"""Experts: found by their shapes, adapted as plain peft does, and computed from 4 bits one at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional

from tests.families.shrink import small_config
from tests.support.experts import ARCHITECTURES, experts_model
from tests.support.models import base_of
from tests.support.training import small_recipe
from trainer.adapters import Adapter, make_adapter
from trainer.adapters.targets import resolve, targeted_experts
from trainer.errors import InputError
from trainer.experts import PackedExperts, expert_weights, pack_experts, packed_experts, routers
from trainer.model.quantization import check_packed
from trainer.recipe import Recipe

TOKENS = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(3))
BY_KERNEL = [kind for kind in ARCHITECTURES if kind not in ("llama4_text", "jetmoe")]


def recipe_of(folder: Path, **changes: Any) -> Recipe:
    return small_recipe("experts", folder, folder, **{"adapter.dropout": 0.0, **changes})


def adapted(kind: str, folder: Path, *, base: Any = None, **changes: Any) -> tuple[Any, Adapter]:
    """The model with its adapter, whose B are not zero any more."""
    adapter = make_adapter(recipe_of(folder, **changes))
    model = adapter.attach(base or experts_model(kind))
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=draw))
    return model, adapter


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def loss_of(model: Any) -> torch.Tensor:
    loss: torch.Tensor = model(input_ids=TOKENS, labels=TOKENS).loss
    return loss


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_each_expert_is_found_and_no_router_is(kind: str) -> None:
    model = experts_model(kind)
    found = expert_weights(model)
    assert {weight.shape[0] for weight in found.values()} == {4}
    targets = resolve(model, "all-linear")
    covered = {f"{name}.weight" for name in targets} | set(found)
    left = {n for n, p in model.named_parameters() if p.dim() > 1} - covered
    others = ("embed", "lm_head", "gate", "router", "bias", "conv")
    assert not [name for name in left if not any(part in name for part in others)]
    assert not any(name.endswith((".router", ".gate")) for name in targets)


def test_a_router_is_a_layer_beside_experts_with_one_output_for_each() -> None:
    assert routers(experts_model("phimoe")) == {f"model.layers.{n}.mlp.router" for n in range(2)}
    assert routers(experts_model("llama4_text")) == {"model.layers.1.feed_forward.router"}
    assert {name.rsplit(".", 2)[-2] for name in routers(experts_model("jetmoe"))} == {"router"}


def test_experts_in_matrices_of_two_dimensions_are_left_as_they_are(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, DbrxConfig

    sizes = {"d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 128, "attn_config": {"rope_theta": 1e4}}
    config = DbrxConfig(**sizes, ffn_config={"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2})
    model = AutoModelForCausalLM.from_config(config)
    assert {name.partition("blocks.0.")[2] for name in routers(model)} == {"ffn.router.layer", ""}
    assert not [name for name in resolve(model, "all-linear") if "router" in name]
    with pytest.raises(InputError, match=r"leaves .* elements of linear layers and experts"):
        check_packed(model, recipe_of(tmp_path, **{"model.quantization": "nf4"}).model)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_plain_peft_computes_the_same_from_the_saved_adapter(kind: str, tmp_path: Path) -> None:
    from peft import PeftModel

    model, adapter = adapted(kind, tmp_path)
    loss = loss_of(model)
    loss.backward()
    gradients = {adapter.saved_names(model)[n]: p.grad for n, p in trained(model).items()}
    assert all(gradient is not None for gradient in gradients.values())
    assert any(".experts." in name or "_linear." in name for name in gradients)
    adapter.save(model, {n: p.detach().clone() for n, p in trained(model).items()}, tmp_path)
    plain: Any = PeftModel.from_pretrained(experts_model(kind), str(tmp_path), is_trainable=True)
    want = loss_of(plain)
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)
    for name, parameter in trained(plain).items():
        got = gradients[name.replace(".default", "")]
        torch.testing.assert_close(got, parameter.grad, rtol=1e-4, atol=1e-6)
    merged = plain.merge_and_unload()
    assert loss_of(merged).item() == pytest.approx(loss.item(), rel=1e-5)


def test_what_plain_peft_does_not_load_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_config(small_config("laguna")).requires_grad_(False)
    adapted("laguna", tmp_path, base=base)
    assert "of the adapter's 36 tensors when it loads them into LagunaForCausalLM" in caplog.text
    caplog.clear()
    adapted("deepseek_v3", tmp_path)
    assert caplog.text == ""


def test_layers_beside_the_experts_keep_their_own_adapters(tmp_path: Path) -> None:
    model, _ = adapted("deepseek_v3", tmp_path)
    names = {n.removeprefix("base_model.model.model.layers.") for n in trained(model) if ".lora_A." in n}
    of_mlp = {name.partition(".lora_A")[0] for name in names if ".mlp." in name}
    assert of_mlp == {
        *(f"0.mlp.{part}" for part in ("gate_proj", "up_proj", "down_proj")),
        *(f"1.mlp.shared_experts.{part}" for part in ("gate_proj", "up_proj", "down_proj")),
        "1.mlp.experts", "1.mlp.experts.base_layer",
    }  # fmt: skip


@pytest.mark.parametrize("targets", ["all-linear", ["q_a_proj", "gate_proj", "up_proj", "down_proj"]])
def test_a_mixture_whose_layers_are_all_dense_keeps_its_adapters(targets: Any, tmp_path: Path) -> None:
    from peft import PeftModel

    dense = {"first_k_dense_replace": 2}
    base, changes = experts_model("deepseek_v3", **dense), {"adapter.target_modules": targets}
    model, adapter = adapted("deepseek_v3", tmp_path, base=base, **changes)
    parts = {n.partition(".lora_A")[0].rpartition(".")[2] for n in trained(model) if ".mlp." in n and ".lora_A." in n}
    assert parts == {"gate_proj", "up_proj", "down_proj"}
    adapter.save(model, {n: p.detach().clone() for n, p in trained(model).items()}, tmp_path)
    plain: Any = PeftModel.from_pretrained(experts_model("deepseek_v3", **dense), str(tmp_path))
    assert loss_of(plain).item() == pytest.approx(loss_of(model).item(), rel=1e-6)


def test_rank_r_is_rank_r_on_each_experts_matrix(tmp_path: Path) -> None:
    model, _ = adapted("mixtral", tmp_path, **{"adapter.rank": 3})
    shapes = {n.rpartition("mlp.experts")[2]: tuple(p.shape) for n, p in trained(model).items() if "layers.0.mlp" in n}
    assert shapes == {
        ".base_layer.lora_A.default.weight": (4 * 3, 64),
        ".base_layer.lora_B.default.weight": (2 * 64, 4 * 3),
        ".lora_A.default.weight": (4 * 3, 64),
        ".lora_B.default.weight": (64, 4 * 3),
    }


@pytest.mark.parametrize(
    ("targets", "attributes"),
    [
        ("all-linear", {"gate_up_proj", "down_proj"}),
        (["q_proj"], set()),
        (["q_proj", "gate_proj", "up_proj"], {"gate_up_proj"}),
        (["down_proj"], {"down_proj"}),
        (["experts.gate_up_proj"], {"gate_up_proj"}),
        (r".*\.layers\.1\..*\.experts\.down_proj", {"down_proj"}),
    ],
)
def test_targets_name_experts_as_files_and_models_do(targets: Any, attributes: set[str]) -> None:
    found = targeted_experts(experts_model("qwen3_moe"), targets)
    assert {name.rpartition(".")[2] for name in found} == attributes
    if isinstance(targets, str) and targets != "all-linear":
        assert len(found) == 1


def test_experts_can_be_left_out(tmp_path: Path) -> None:
    model, _ = adapted("mixtral", tmp_path, **{"adapter.experts": False})
    assert not any("experts" in name for name in trained(model))
    dora, _ = adapted("mixtral", tmp_path, **{"adapter": {"method": "dora"}})
    assert not any("experts" in name for name in trained(dora)), "peft has no DoRA for parameters"
    with pytest.raises(InputError, match="match no linear layer"):
        adapted("qwen3_moe", tmp_path, **{"adapter": {"method": "dora", "target_modules": ["gate_proj"]}})


@pytest.mark.parametrize("kind", BY_KERNEL)
def test_dropout_drops_inputs_of_experts_in_training_only(kind: str, tmp_path: Path) -> None:
    model, adapter = adapted(kind, tmp_path, **{"adapter.dropout": 0.5})
    model.eval()
    plain, _ = adapted(kind, tmp_path)
    assert loss_of(model).item() == loss_of(plain).item()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name and ".experts." not in name:
                parameter.zero_()
    model.train()
    torch.manual_seed(0)
    assert len({loss_of(model).item() for _ in range(3)}) == 3
    assert adapter.saved_config(model).lora_dropout == 0.0, "plain peft refuses to load any other"  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_packed_experts_are_bitsandbytes_nf4(kind: str, tmp_path: Path) -> None:
    model = experts_model(kind)
    model.save_pretrained(tmp_path)
    recipe = recipe_of(tmp_path, **{"model.quantization": "nf4"})
    packed = base_of(recipe)
    with torch.no_grad():
        for weight in expert_weights(model).values():
            parameter = weight.owner.get_parameter(weight.attribute)
            parameter.copy_(_as_nf4(parameter.view(-1)).view(parameter.shape))
        for name, layer in model.named_modules():
            if isinstance(layer, torch.nn.Linear) and type(packed.get_submodule(name)).__name__ == "Linear4bit":
                layer.weight.copy_(_as_nf4(layer.weight))
    assert loss_of(packed).item() == pytest.approx(loss_of(model).item(), rel=1e-6)
    number = sum(weight.shape.numel() for weight in expert_weights(packed).values())
    assert sum(p.numel() * p.element_size() for p, _ in packed_experts(packed)) == number // 2
    ours, plain = make_adapter(recipe).attach(packed), make_adapter(recipe_of(tmp_path)).attach(model)
    for one in (ours, plain):
        with torch.no_grad():
            for parameter in trained(one).values():
                parameter.fill_(0.01)
        loss_of(one).backward()
    for got, want in zip(trained(ours).values(), trained(plain).values(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-4, atol=1e-6)


def _as_nf4(weight: torch.Tensor) -> torch.Tensor:
    packed, state = functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    dequantised: torch.Tensor = functional.dequantize_4bit(packed, state)
    return dequantised


@pytest.mark.parametrize("shape", [(4, 64, 32), (4, 6, 10), (3, 96, 64)])
def test_an_expert_alone_is_its_part_of_the_whole(shape: tuple[int, int, int]) -> None:
    owner = torch.nn.Module()
    owner.stack = torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    original = owner.stack.detach().clone()
    pack_experts(owner, "stack", torch.float32)
    ((parameter, packing),) = packed_experts(owner)
    assert isinstance(packing, PackedExperts)
    whole = owner.stack
    assert float((whole - original).abs().mean()) < 0.1
    for number, expert in zip([2, 0], packing.experts(parameter, [2, 0]), strict=True):
        assert torch.equal(expert, whole[number])


def test_int8_does_not_leave_experts_out_without_a_word(tmp_path: Path) -> None:
    experts_model("mixtral").save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"int8 leaves .*experts.*: use nf4"):
        base_of(recipe_of(tmp_path, **{"model.quantization": "int8"}))


def test_a_subclass_of_linear_layers_is_packed_too(tmp_path: Path) -> None:
    from transformers import FalconConfig, FalconForCausalLM

    config = FalconConfig(vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    FalconForCausalLM(config).save_pretrained(tmp_path)
    packed = base_of(recipe_of(tmp_path, **{"model.quantization": "nf4"}))
    assert sum(type(module).__name__ == "Linear4bit" for module in packed.modules()) == 8
    with pytest.raises(InputError, match=r"int8 leaves .* of linear layers .*: use nf4"):
        base_of(recipe_of(tmp_path, **{"model.quantization": "int8"}))


def test_a_subclass_of_linear_layers_is_adapted_without_weights_too(tmp_path: Path) -> None:
    from transformers import FalconConfig, FalconForCausalLM

    config = FalconConfig(vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    with torch.device("meta"):
        model = FalconForCausalLM(config).requires_grad_(False)
        assert len(resolve(model, "all-linear")) == 8
