"""What every adapter method promises; a new entry of the registry is taken in by itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig

from launcher.testing.methods import CHECKS, STEPS, reloaded, save
from tests.support.looping import bench
from tests.support.models import base_of, built, logits_of, packed, plain_base_of, samples_of, stir
from tests.support.training import small_recipe, write_pairs
from trainer.adapters import make_adapter
from trainer.errors import CorruptObject, InputError
from trainer.plan.meta_model import skeleton
from trainer.recipe import Recipe
from trainer.recipe.methods import METHODS
from trainer.recipe.rules.matrix import Cell, refusal

Make = Callable[..., Recipe]
ADAPTERS = [m for m in METHODS.names() if m != "none"]
SMALLER: dict[str, Any] = {"rank": 4, "target_rank": 2, "prune_every": 1, "block_size": 8, "virtual_tokens": 4}
"""Settings whose defaults are larger than the tiny model."""

BY_NAME = {"peft": "MISS", "r": 4}

STARTS_ELSEWHERE = {"prefix", "prompt", "p_tuning"}
"""Methods whose first forward is not the base's."""

RATES = {"ia3": 5e-2, "vera": 5e-2, "prefix": 5e-2, "prompt": 1e-1, "p_tuning": 2e-2, "adaption_prompt": 5e-2}
"""Learning rates for an untrained model of 64 dimensions, where 5e-3 is too little."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("methods")
    write_pairs(folder / "data" / "a.jsonl", 60)
    return folder


@pytest.fixture
def make(tiny_model: Path, folder: Path, tmp_path: Path) -> Make:
    def recipe(method: str, **changes: Any) -> Recipe:
        settings = {f"adapter.{k}": v for k, v in SMALLER.items() if k in METHODS[method].settings}
        return small_recipe(
            "method",
            tiny_model,
            folder,
            **{
                "adapter": {"method": BY_NAME if method == "peft" else method},
                **settings,
                "data.ledger": False,
                "training": {"steps": STEPS, "global_batch": 4, "micro_batch": 4, "gradient_checkpointing": False},
                "optimizer.lr": RATES.get(method, 5e-3),
                "storage": str(tmp_path / "runs"),
                **changes,
            },
        )

    return recipe


def packed_bases(method: str) -> list[str]:
    """The quantisations that the method works with."""
    return [q for q in ("nf4", "int8") if refusal(Cell(method, q, "ddp", "sft")) is None]


PACKED = [(m, q) for m in ADAPTERS for q in packed_bases(m)]


@pytest.mark.parametrize(("method", "quantization"), [(m, "none") for m in ADAPTERS] + PACKED)
def test_the_base_is_frozen_and_the_first_forward_is_its_own(make: Make, method: str, quantization: str) -> None:
    recipe = make(method, **{"model.quantization": quantization})
    model, _ = built(recipe)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(p.dtype == torch.float32 for p in trained.values())
    frozen = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in trained.values())
    assert frozen >= sum(p.numel() for p in base_of(recipe).parameters())
    assert not any("lm_head" in name for name in trained)
    if method not in STARTS_ELSEWHERE:
        close = 1e-4 if method not in ("pissa", "olora") or quantization == "none" else 0.1
        torch.testing.assert_close(logits_of(model), logits_of(base_of(recipe)), rtol=0, atol=close)


@pytest.mark.parametrize("method", METHODS.names())
@pytest.mark.parametrize("check", CHECKS[:2], ids=lambda check: check.__name__)
def test_contract(check: Callable[[Make, Path], None], make: Make, method: str, tmp_path: Path) -> None:
    """The rest of the contract is below, also for quantised models."""
    check(partial(make, method), tmp_path)


@pytest.mark.parametrize("method", ADAPTERS)
def test_it_is_laid_out_without_weights_for_the_plan(make: Make, method: str) -> None:
    recipe = make(method)
    config = AutoConfig.from_pretrained(recipe.model.path)
    if method == "boft":
        with pytest.raises(InputError, match="boft cannot be laid out without the model's weights"):
            skeleton(recipe, config)
        return
    shapes = {n: p.shape for n, p in skeleton(recipe, config).named_parameters() if p.requires_grad}
    assert shapes == {n: p.shape for n, p in built(recipe)[0].named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("method", "quantization"), [(m, "none") for m in ADAPTERS] + PACKED)
def test_plain_peft_reloads_it_on_the_untouched_base(
    make: Make, method: str, quantization: str, tmp_path: Path
) -> None:
    recipe = make(method, **{"model.quantization": quantization})
    model, adapter = built(recipe)
    stir(model)
    save(model, adapter, tmp_path)
    wanted = logits_of(model)
    plain = logits_of(base_of(recipe))
    moved = (wanted[:, -plain.shape[1] :] - plain).abs().max()  # peft gives logits of virtual tokens as well
    assert moved > 1e-3, "the adapter does something"
    if method in ("pissa", "olora") and quantization != "none":
        # What was trained stands on a quantised rest, what is saved on the unquantised weights.
        gap = (logits_of(reloaded(plain_base_of(recipe), tmp_path)) - wanted).abs().max()
        assert gap < 0.2 * moved
        return
    torch.testing.assert_close(logits_of(reloaded(base_of(recipe), tmp_path)), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ADAPTERS)
def test_a_sample_in_a_pack_gets_what_it_gets_alone(make: Make, method: str) -> None:
    model, _ = built(make(method))
    stir(model)
    model.eval()
    batch = packed([[9, 1, 7], [5], [6, 6, 6]])
    ids, positions = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.position_ids)
    with torch.no_grad():
        together = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        assert together.shape[:2] == ids.shape
        for row, columns in samples_of(batch):
            alone = model(input_ids=ids[row : row + 1, columns], use_cache=False).logits[0]
            length = columns.stop - columns.start
            torch.testing.assert_close(together[row, columns], alone[-length:], rtol=0, atol=2e-5)


BESIDE = [(m, s) for m in ADAPTERS for s in ("modules_to_save", "trainable_tokens") if s in METHODS[m].settings]


@pytest.mark.parametrize(("method", "setting"), BESIDE)
def test_what_is_trained_beside_it_is_saved_and_reloaded(make: Make, method: str, setting: str, tmp_path: Path) -> None:
    value: Any = ["lm_head"] if setting == "modules_to_save" else [5, 7]
    recipe = make(method, **{f"adapter.{setting}": value})
    model, adapter = built(recipe)
    alone, _ = built(make(method))
    more = sum(p.requires_grad for p in model.parameters()) - sum(p.requires_grad for p in alone.parameters())
    assert more == 1
    stir(model)
    save(model, adapter, tmp_path)
    with safe_open(tmp_path / adapter.weights_file, framework="pt") as file:
        names = list(file.keys())
    assert any(("lm_head" if setting == "modules_to_save" else "embed_tokens") in name for name in names)
    torch.testing.assert_close(logits_of(reloaded(base_of(recipe), tmp_path)), logits_of(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ({"peft": "MISSS"}, r"peft has no 'MISSS', but .*; did you mean 'MISS'\?"),
        ({"peft": "MISS", "rr": 3}, r"MISS has no field 'rr', but r, .*; did you mean 'r'\?|MISS has no field 'rr'"),
        ({"peft": "MISS", "inference_mode": True}, "MISS has no field 'inference_mode'"),
        ({"peft": "PROMPT_TUNING"}, "not taken by name: write method: prompt"),
        ({"peft": "LORA", "init_lora_weights": "pissa"}, "changes the base"),
    ],
)
def test_a_method_by_name_that_does_not_fit_is_refused(make: Make, method: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        built(make("peft", **{"adapter.method": method}))


def test_tokens_and_modules_that_are_not_there_are_refused(make: Make) -> None:
    with pytest.raises(InputError, match=r"modules_to_save \['lm_hed'\] name no module of this model; .*lm_head"):
        built(make("lora", **{"adapter.modules_to_save": ["lm_hed"]}))
    with pytest.raises(InputError, match=r"trainable_tokens \[9999\] are beyond the model's 384"):
        built(make("lora", **{"adapter.trainable_tokens": [3, 9999]}))
    with pytest.raises(InputError, match=r"modules_to_save embed_tokens trains all rows of the embeddings"):
        built(make("lora", **{"adapter.trainable_tokens": [3], "adapter.modules_to_save": ["embed_tokens"]}))


def test_a_head_that_shares_the_embeddings_weight_is_not_trained_beside_some_of_their_rows(tmp_path: Path) -> None:
    import transformers

    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    tokens = {"adapter.trainable_tokens": [3], "adapter.modules_to_save": ["lm_head"]}
    adapter = make_adapter(small_recipe("tied", tmp_path, tmp_path, **tokens))
    for tied in (False, True):
        config = transformers.LlamaConfig(**shape, num_attention_heads=2, tie_word_embeddings=tied)
        base = transformers.LlamaForCausalLM(config).requires_grad_(False)
        if tied:
            with pytest.raises(InputError, match="modules_to_save lm_head trains all rows of the embeddings"):
                adapter.attach(base)
        else:
            adapter.attach(base)


def test_lora_plus_gives_b_its_own_rate(make: Make) -> None:
    with bench(make("loraplus", **{"adapter.lr_ratio": 4.0, "training.steps": 1})) as b:
        b.run()
        rates = {n: g["lr"] for g in b.strategy.optimizer.param_groups for n, p in named(b) if owns(g, p)}
        assert {rate for n, rate in rates.items() if "lora_A" in n} == {5e-3}
        assert {rate for n, rate in rates.items() if "lora_B" in n} == {2e-2}


def named(b: Any) -> list[tuple[str, torch.nn.Parameter]]:
    return list(b.strategy.trainable().items())


def owns(group: dict[str, Any], parameter: torch.nn.Parameter) -> bool:
    return any(parameter is member for member in group["params"])


def test_adalora_ends_at_its_budget_and_keeps_its_factors_near_orthogonal(make: Make) -> None:
    with bench(make("adalora")) as b:
        b.run()
        model: Any = b.model
        ranks = [int((p != 0).sum()) for n, p in model.named_parameters() if ".lora_E." in n]
        assert sum(ranks) == 2 * len(ranks), "target_rank per layer on average"
        config = model.peft_config["default"]
        assert (config.total_step, config.tinit, config.tfinal) == (STEPS, 0, 3)
        pulled = off_orthogonal(model)
    with bench(make("adalora", **{"adapter.orthogonality": 0.0})) as b:
        b.run()
        assert pulled < off_orthogonal(b.model)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_adalora_is_at_its_budget_after_the_shortest_runs_too(make: Make, steps: int) -> None:
    """The last share-out is made by scores, the first of which are those of the first step: one step is too few."""
    with bench(make("adalora", **{"training.steps": steps})) as b:
        b.run()
        ranks = [int((p != 0).sum()) for n, p in b.model.named_parameters() if ".lora_E." in n]
        assert sum(ranks) == 2 * len(ranks) if steps > 1 else sum(ranks) > 2 * len(ranks)


def off_orthogonal(model: torch.nn.Module) -> float:
    rows = [p for n, p in model.named_parameters() if ".lora_A." in n]
    return sum(float((a @ a.T - torch.eye(len(a))).norm()) for a in rows)


@pytest.mark.parametrize("method", ["pissa", "olora"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_rest_is_made_anew_where_a_machine_takes_weights_apart_in_another_way(
    make: Make, method: str, quantization: str, tmp_path: Path
) -> None:
    """Another machine's factors are those of another rotation: here of the weights with their last bits changed."""
    recipe = make(method, **{"model.quantization": quantization})
    model, adapter = built(recipe)
    first = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    other = {n: t * 0.5 for n, t in first.items()}
    stored = {
        adapter.saved_names(model)[n]: torch.cat([other[n], -other[n]], 1) if ".lora_B." in n else other[n].repeat(2, 1)
        for n in first
    }
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(adapter.read_parameter(model, name, stored.__getitem__))
    adapter.after_restore(model, stored.__getitem__)
    # The factors are half as large on both sides, and the rest makes up for it.
    close = 1e-4 if quantization == "none" else 0.1
    torch.testing.assert_close(logits_of(model), logits_of(plain_base_of(recipe)), rtol=0, atol=close)


def test_pissa_loses_less_to_quantisation_than_a_base_that_is_quantised_whole(make: Make) -> None:
    recipe = make("pissa", **{"model.quantization": "nf4", "adapter.rank": 16})
    model, _ = built(recipe)
    wanted = logits_of(plain_base_of(recipe))
    assert (logits_of(model) - wanted).norm() < (logits_of(base_of(recipe)) - wanted).norm()


def test_random_matrices_that_another_torch_would_draw_are_found_out(make: Make, tmp_path: Path) -> None:
    model, adapter = built(make("vera"))
    stir(model)
    save(model, adapter, tmp_path)
    with safe_open(tmp_path / adapter.weights_file, framework="pt") as file:
        adapter.after_restore(model, file.get_tensor)
        with pytest.raises(CorruptObject, match=r"vera_\w+.* draws other random numbers from the same seed"):
            adapter.after_restore(model, lambda name: file.get_tensor(name) + 1)
