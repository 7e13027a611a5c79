"""Tiles of tokens: which parts of a layer compute in them, and that nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.support.models import SMALL_SHAPE, built, packed, random_model
from tests.support.training import losses, small_recipe, train_here, train_in_processes, write_pairs
from trainer.errors import InputError, RecipeError
from trainer.layers.tiling import TiledForward, tile_layers
from trainer.tasks import make_task

NORMS = {"input_layernorm", "post_attention_layernorm"}
CONFIGS: dict[str, tuple[Any, set[str]]] = {
    "llama": (transformers.LlamaConfig(**SMALL_SHAPE), {"mlp", *NORMS}),
    "gemma3": (
        transformers.Gemma3TextConfig(**SMALL_SHAPE),
        {"mlp", *NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm"},
    ),
    "gpt2": (
        transformers.GPT2Config(
            vocab_size=384, n_embd=64, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
        ),
        {"mlp", "ln_1", "ln_2"},
    ),
    "mixtral": (transformers.MixtralConfig(**SMALL_SHAPE, num_local_experts=4), {"mlp", *NORMS}),
    "qwen2_moe": (
        transformers.Qwen2MoeConfig(
            **SMALL_SHAPE,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=64,
        ),
        {"mlp", *NORMS},
    ),
    "mamba2": (
        transformers.Mamba2Config(
            vocab_size=384, hidden_size=64, num_hidden_layers=2, state_size=8, num_heads=8, head_dim=16, n_groups=1
        ),
        {"norm"},
    ),
}


def gradients(model: Any, recipe: Any) -> dict[str, torch.Tensor]:
    task = make_task(recipe)
    task.attach(model)
    task.loss(model, packed([[64], [64]]), torch.device("cpu")).loss_sum.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("name", "checkpointing"), [*((name, False) for name in CONFIGS), ("llama", True)])
def test_parts_that_treat_each_token_by_itself(
    name: str, checkpointing: bool, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, want_parts = CONFIGS[name]
    folder = random_model(config, tmp_path / "model", tiny_model)
    changes = {"adapter.dropout": 0.0, "training.gradient_checkpointing": checkpointing}
    recipe = small_recipe("r", folder, tmp_path, **changes)
    want = gradients(built(recipe)[0], recipe)
    model = built(recipe)[0]
    names = {id(module): name.rpartition(".")[2] for name, module in model.named_modules()}
    tiled: set[str] = set()
    lengths: set[int] = set()
    inside = TiledForward._of_tile

    def seen(self: TiledForward, x: torch.Tensor) -> torch.Tensor:
        tiled.add(names[id(self.whole.__self__)])
        lengths.add(x.shape[-2])
        return inside(self, x)

    monkeypatch.setattr(TiledForward, "_of_tile", seen)
    tile_layers(model, 24)  # 64 tokens are two tiles, and a part of one
    got = gradients(model, recipe)
    assert tiled == want_parts
    assert lengths == {24, 16}
    assert got.keys() == want.keys()
    for key in want:
        assert torch.allclose(got[key], want[key], rtol=1e-4, atol=1e-5 * float(want[key].abs().max())), key


@pytest.mark.night
@pytest.mark.parametrize("kind", ["ddp", "fsdp", "zero2", "zero3"])
def test_every_strategy_learns_the_same(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path / "data" / "a.jsonl", 40)
    changes = {"adapter.dropout": 0.0, "training.steps": 3, "training.gradient_checkpointing": kind != "ddp"}
    plain = small_recipe("plain", tiny_model, tmp_path, **changes)
    recipe = small_recipe(
        "tiles", tiny_model, tmp_path, **changes, **{"strategy.kind": kind, "compute.tile_tokens": 24}
    )
    assert train_here(plain) == "succeeded"
    train_in_processes([recipe], 2)
    assert losses(recipe) == pytest.approx(losses(plain), rel=1e-5)


def test_a_part_that_mixes_tokens_is_refused(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    plain = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: plain(self, x.cumsum(-2)))
    write_pairs(tmp_path / "data" / "a.jsonl", 20)
    recipe = small_recipe("r", tiny_model, tmp_path, **{"compute.tile_tokens": 4096})
    with pytest.raises(InputError, match=r"tile_tokens does not work for LlamaForCausalLM .* move by .*; leave it out"):
        train_here(recipe)


def test_layers_without_such_parts_are_refused() -> None:
    class Recurrent(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.ModuleDict({"rnn": torch.nn.GRU(4, 4)}) for _ in range(2))

    with pytest.raises(InputError, match="tile_tokens has no effect on Recurrent"):
        tile_layers(Recurrent(), 8)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"compute.compile": True}, "torch.compile does not capture"),
        ({"training.router_aux_loss_coef": 0.1}, "balance the experts within a tile"),
    ],
)
def test_what_tiles_do_not_go_with(changes: dict[str, Any], said: str, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=said):
        small_recipe("r", tiny_model, tmp_path, **{"compute.tile_tokens": 8, **changes})
