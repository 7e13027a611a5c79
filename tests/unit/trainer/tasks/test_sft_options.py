"""Noise on the embeddings and label smoothing of supervised fine-tuning: by hand, and as torch and transformers do."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.support.models import CPU, built, packed, samples_of, stir
from tests.support.training import small_recipe
from tests.unit.trainer.tasks.test_sft_loss import CAPPED, causal_lm, gradients
from trainer.data import Batch
from trainer.errors import InputError, RecipeError
from trainer.model.kernels.context import Context
from trainer.recipe import Recipe
from trainer.tasks import lm_head_loss
from trainer.tasks.embedding_noise import sample_lengths
from trainer.tasks.sft import SFT

BATCH = [[9, 14, 5], [20], [6, 6, 7, 4]]
ALPHA = 5.0


def recipe_of(folder: Path, model: Path, **changes: Any) -> Recipe:
    return small_recipe("loss", model, folder, **{"adapter.dropout": 0.0, **changes})


def attached(recipe: Recipe) -> tuple[Any, SFT]:
    model, _ = built(recipe)
    stir(model)
    task = SFT(recipe)
    task.attach(model)
    return model, task


def smoothed_loss(model: Any, batch: Batch, smoothing: float) -> torch.Tensor:
    """Full logits of every sample alone, and torch's own cross entropy over its targets."""
    total = torch.zeros(())
    for row, columns in samples_of(batch):
        ids = torch.from_numpy(batch.input_ids[row, columns])[None]
        target = torch.from_numpy(batch.targets[row, columns])
        logits = model(input_ids=ids, use_cache=False).logits[0][:-1][target[1:]].float()
        total = total + cross_entropy(logits, ids[0][target], reduction="sum", label_smoothing=smoothing)
    return total


@pytest.mark.parametrize("rows", [1 << 20, 7])
@pytest.mark.parametrize("method", ["lora", "none"])  # under none, the head is trained
def test_label_smoothing_is_torchs(
    method: str, rows: int, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_head_loss, "CHUNK_LOGITS", 384 * rows)
    changes = {"sft.label_smoothing": 0.1, "adapter": {"method": method}}
    model, task = attached(small_recipe("loss", tiny_model, tmp_path, **changes))
    batch = packed(BATCH)
    with torch.no_grad():  # an untrained model's distribution is nearly even
        model.get_output_embeddings().weight.mul_(20)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ours, wanted = task.loss(model, batch, CPU).loss_sum, smoothed_loss(model, batch, 0.1)
    assert ours.item() == pytest.approx(wanted.item(), rel=1e-5)
    got, want = gradients(model, ours), gradients(model, smoothed_loss(model, batch, 0.1))
    for name in want:
        assert float((got[name] - want[name]).norm() / want[name].norm()) <= 1e-5, name
    model.eval()
    plain = task.eval_loss(model, batch, CPU).loss_sum
    assert plain.item() == pytest.approx(smoothed_loss(model, batch, 0.0).item(), rel=1e-5)
    assert abs(plain.item() - ours.item()) > 1e-4 * ours.item()


@pytest.mark.parametrize(("kind", "settings"), CAPPED)
def test_label_smoothing_is_of_the_logits_that_a_model_returns(
    kind: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    model = causal_lm(kind, **settings)
    batch = packed([[9, 12], [16]], vocabulary=64)
    wanted = smoothed_loss(model, batch, 0.2).item()
    task = SFT(small_recipe("r", tmp_path, tmp_path, **{"sft.label_smoothing": 0.2}))
    task.attach(model)
    assert task.loss(model, batch, CPU).loss_sum.item() == pytest.approx(wanted, rel=1e-5)


def noise_of(model: Any, loss: Any, batch: Batch) -> torch.Tensor:
    """What the embeddings of one forward differ by from the table's, [B, L, D]."""
    seen: list[torch.Tensor] = []
    embeddings = model.get_input_embeddings()
    handle = embeddings.register_forward_hook(lambda _, __, output: seen.append(output.detach()))
    with torch.no_grad():
        loss()
    handle.remove()
    (embedded,) = seen
    return embedded - embeddings.weight[torch.from_numpy(batch.input_ids)]


def test_the_noise_is_transformers_own_on_a_single_sample(tiny_model: Path, tmp_path: Path) -> None:
    from transformers.integrations.neftune import activate_neftune, deactivate_neftune

    model, task = attached(recipe_of(tmp_path, tiny_model, **{"sft.neftune_alpha": ALPHA}))
    plain_model, plain = attached(recipe_of(tmp_path, tiny_model))
    batch = packed([[20]])
    handle = activate_neftune(plain_model, ALPHA)
    losses, noises = [], []
    for one, its in ((model, task), (plain_model, plain)):
        torch.manual_seed(3)
        noises.append(noise_of(one, lambda one=one, its=its: its.loss(one, batch, CPU), batch))
        torch.manual_seed(3)
        losses.append(its.loss(one, batch, CPU).loss_sum.item())
    deactivate_neftune(plain_model, handle)
    torch.testing.assert_close(noises[0], noises[1], rtol=0, atol=1e-6)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] != pytest.approx(plain.loss(plain_model, batch, CPU).loss_sum.item(), rel=1e-4)


def test_each_sample_of_a_pack_has_noise_by_its_own_length(tiny_model: Path, tmp_path: Path) -> None:
    model, task = attached(recipe_of(tmp_path, tiny_model, **{"sft.neftune_alpha": ALPHA}))
    batch = packed(BATCH)
    torch.manual_seed(1)
    noise = noise_of(model, lambda: task.loss(model, batch, CPU), batch)
    padded = torch.ones(noise.shape[:2], dtype=torch.bool)
    for row, columns in samples_of(batch):
        padded[row, columns] = False
        length = columns.stop - columns.start
        bound = ALPHA / math.sqrt(length * noise.shape[-1])
        largest = float(noise[row, columns].abs().max())
        assert 0.95 * bound < largest <= bound * (1 + 1e-4)
        assert float(noise[row, columns].std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert padded.sum() == 13
    assert not noise[padded].any()


def test_noise_is_in_training_only_and_repeats_with_the_seed(tiny_model: Path, tmp_path: Path) -> None:
    model, task = attached(recipe_of(tmp_path, tiny_model, **{"sft.neftune_alpha": ALPHA, "sft.label_smoothing": 0.1}))
    _, quiet = plain = attached(recipe_of(tmp_path, tiny_model))
    batch = packed(BATCH)

    def trained(seed: int) -> float:
        torch.manual_seed(seed)
        return task.loss(model.train(), batch, CPU).loss_sum.item()

    assert trained(1) == trained(1) != trained(2)
    want = quiet.eval_loss(plain[0].eval(), batch, CPU).loss_sum.item()
    assert task.eval_loss(model.eval(), batch, CPU).loss_sum.item() == want
    # The checks before the first step call the model itself, in training mode as well.
    ids = torch.from_numpy(batch.input_ids[:1])
    logits = [one.train()(input_ids=ids, use_cache=False).logits for one in (model, plain[0])]
    assert torch.equal(*logits)


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter.method": "dora", "model.quantization": "nf4"},
        {"adapter.method": "none"},
        {"adapter.modules_to_save": ["embed_tokens"]},
        {"adapter.trainable_tokens": [5, 9]},
        {"adapter": {"method": "prompt", "virtual_tokens": 4}, "data.packing": False},
        {"adapter": {"method": "prefix", "virtual_tokens": 4}, "data.packing": False},
        {"training.gradient_checkpointing": True},
    ],
    ids=lambda changes: " ".join(map(str, changes.values())),
)
def test_every_method_trains_with_noise(changes: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    model, task = attached(small_recipe("n", tiny_model, tmp_path, **{"sft.neftune_alpha": ALPHA, **changes}))
    batch = packed([[20], [9]])
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(task.loss(model, batch, CPU).loss_sum)
    assert losses[0].item() == losses[1].item() != losses[2].item()
    for name, gradient in gradients(model, losses[2]).items():
        assert gradient.any() or "lora_A" in name, name
    empty = task.loss(model, Batch.empty(), CPU).loss_sum
    assert empty.item() == 0.0
    assert not any(gradient.any() for gradient in gradients(model, empty).values())


def test_parts_of_a_text_get_the_noise_of_its_length() -> None:
    lengths = sample_lengths(packed(BATCH).position_ids)
    assert lengths[0].tolist() == [9] * 9 + [14] * 14 + [5] * 5
    assert lengths[1].tolist() == [20] * 20 + [1] * 8

    class Group:
        def __init__(self, rank: int) -> None:
            self.rank, self.size = (lambda: rank), (lambda: 3)

    parts = [Context(Group(rank)).part(lengths) for rank in range(3)]  # type: ignore[arg-type]
    assert {part.shape for part in parts} == {(3, 10)}
    joined = np.concatenate(parts, 1)
    assert (joined[:, :28] == lengths).all()
    assert not joined[:, 28:].any()


def test_a_model_that_reads_no_embeddings_is_refused(tmp_path: Path) -> None:
    model = causal_lm("Llama")
    unused = torch.nn.Embedding(64, 32)
    model.get_input_embeddings = lambda: unused
    task = SFT(small_recipe("r", tmp_path, tmp_path, **{"sft.neftune_alpha": ALPHA}))
    task.attach(model)
    with pytest.raises(InputError, match=r"neftune_alpha 5 does not work for LlamaForCausalLM, which does not read"):
        task.loss(model, packed([[9]], vocabulary=64), CPU)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sft.neftune_alpha": 0.0}, "sft.neftune_alpha"),
        ({"sft.label_smoothing": 1.0}, "sft.label_smoothing"),
        (
            {"task": "dpo", "data.packing": False, "sft.neftune_alpha": 5.0},
            "sft.neftune_alpha: has no effect with task dpo",
        ),
    ],
)
def test_settings_that_do_nothing_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        small_recipe("r", tmp_path, tmp_path, **changes)
