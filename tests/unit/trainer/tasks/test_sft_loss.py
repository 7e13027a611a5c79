"""The loss of supervised fine-tuning: packs are exact, and logits exist only where there is a target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.support.models import CPU, built, packed, samples_of, stir
from tests.support.training import small_recipe
from trainer.data import Batch
from trainer.errors import InputError
from trainer.tasks import lm_head_loss, make_task
from trainer.tasks.sft import SFT

BATCH = [[9, 14, 5], [20], [6, 6, 7, 4]]


def attached(recipe: Any) -> tuple[Any, SFT]:
    model, _ = built(recipe)
    stir(model)
    task = make_task(recipe)
    assert isinstance(task, SFT)
    task.attach(model)
    return model, task


@pytest.fixture
def recipe(tiny_model: Path, tmp_path: Path) -> Any:
    return small_recipe("loss", tiny_model, tmp_path, **{"adapter.dropout": 0.0})


def tensors(batch: Batch) -> dict[str, Any]:
    ids, positions = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.position_ids)
    return {"input_ids": ids, "position_ids": positions, "use_cache": False}


def plain_loss(model: Any, batch: Batch) -> torch.Tensor:
    """Full logits of every sample alone, and cross entropy over its targets."""
    total = torch.zeros(())
    for row, columns in samples_of(batch):
        ids = torch.from_numpy(batch.input_ids[row, columns])[None]
        target = torch.from_numpy(batch.targets[row, columns])
        logits = model(input_ids=ids, use_cache=False).logits[0]
        total = total + cross_entropy(logits[:-1][target[1:]].float(), ids[0][target], reduction="sum")
    return total


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def test_packed_logits_equal_unpacked_ones(recipe: Any) -> None:
    model, _ = attached(recipe)
    batch = packed(BATCH)
    assert batch.input_ids.shape == (3, 28)
    assert (batch.position_ids[1] == 0).sum() == 9, "a sample's start and eight pads"
    with torch.no_grad():
        together = model(**tensors(batch)).logits
        found = samples_of(batch)
        assert len(found) == 8
        for row, columns in found:
            ids = torch.from_numpy(batch.input_ids[row, columns])[None]
            alone = model(input_ids=ids, use_cache=False).logits[0]
            torch.testing.assert_close(together[row, columns], alone, rtol=0, atol=1e-5)


def test_what_a_pack_holds_besides_does_not_change_a_samples_loss(recipe: Any) -> None:
    model, task = attached(recipe)
    batch, other = packed(BATCH), packed(BATCH)
    (row, columns), *rest = samples_of(other)
    for r, c in rest:
        other.input_ids[r, c] = 7
        other.targets[r, c] = False
    for r, c in rest:
        batch.targets[r, c] = False
    assert batch.targets[row, columns].sum() == batch.targets.sum() == 6
    with torch.no_grad():
        one, two = (float(task.loss_sum(model, b, CPU)) for b in (batch, other))
    assert one == pytest.approx(two, rel=1e-6)


@pytest.mark.parametrize(
    "change",
    [{}, {"model.quantization": "nf4"}, {"adapter.method": "dora"}, {"training.gradient_checkpointing": True}],
)
def test_loss_and_every_gradient_equal_those_of_full_logits(recipe: Any, change: Any) -> None:
    recipe = small_recipe("loss", recipe.model.path, Path(recipe.storage).parent, **{"adapter.dropout": 0.0, **change})
    model, task = attached(recipe)
    batch = packed(BATCH)
    ours, wanted = task.loss_sum(model, batch, CPU), plain_loss(model, batch)
    assert ours.item() == pytest.approx(wanted.item(), rel=1e-6)
    got, want = gradients(model, ours), gradients(model, plain_loss(model, batch))
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5, msg=name)
        assert want[name].any(), name


def test_chunks_equal_the_whole(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, task = attached(recipe)
    batch = packed(BATCH)
    whole = task.loss_sum(model, batch, CPU)
    want = gradients(model, whole)
    monkeypatch.setattr(lm_head_loss, "CHUNK_LOGITS", 384 * 7)
    assert batch.target_tokens > 3 * 7
    chunked = task.loss_sum(model, batch, CPU)
    assert chunked.item() == pytest.approx(whole.item(), rel=1e-6)
    for name, gradient in gradients(model, chunked).items():
        torch.testing.assert_close(gradient, want[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.fixture
def logits_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows of logits each call of the output head has made."""
    rows: list[int] = []
    project = torch.nn.Linear.forward

    def counted(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        out = project(self, x)
        if self.out_features == 384:
            rows.append(out.numel() // 384)
        return out

    monkeypatch.setattr(torch.nn.Linear, "forward", counted)
    return rows


def test_as_many_rows_of_logits_as_targets_are_computed(
    recipe: Any, logits_rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, task = attached(recipe)
    batch = packed(BATCH)
    assert batch.target_tokens < batch.tokens < batch.input_ids.size
    task.loss_sum(model, batch, CPU)
    assert logits_rows == [batch.target_tokens]
    logits_rows.clear()
    monkeypatch.setattr(lm_head_loss, "CHUNK_LOGITS", 384 * 10)
    loss = task.loss_sum(model, batch, CPU)
    loss.backward()  # type: ignore[no-untyped-call]
    assert sum(logits_rows) == batch.target_tokens, "the backward needs no logits"
    assert max(logits_rows) == 10


@pytest.mark.parametrize("method", ["lora", "dora", "none"])
def test_a_micro_batch_without_targets_is_zero_and_reaches_every_parameter(recipe: Any, method: str) -> None:
    recipe = small_recipe("loss", recipe.model.path, Path(recipe.storage).parent, **{"adapter.method": method})
    model, task = attached(recipe)
    loss = task.loss_sum(model, Batch.empty(), CPU)
    assert loss.item() == 0.0
    model.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    for name, gradient in trained.items():
        assert gradient is not None, name
        assert not gradient.any(), name


def test_the_model_is_itself_again_outside_a_loss(recipe: Any) -> None:
    model, task = attached(recipe)
    before = model(**tensors(packed(BATCH))).logits.detach()
    task.loss_sum(model, packed(BATCH), CPU)
    after = model(**tensors(packed(BATCH))).logits.detach()
    assert before.shape == (3, 28, 384)
    assert torch.equal(before, after)


SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def causal_lm(kind: str, **settings: Any) -> Any:
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(2)
        config = getattr(transformers, f"{kind}Config")(**SMALL, **settings)
        return getattr(transformers, f"{kind}ForCausalLM")(config).train()


class Task(SFT):
    def __init__(self) -> None:
        super().__init__(small_recipe("r", Path("m"), Path("d")))


CAPPED = [
    ("Gemma2", {"final_logit_softcapping": 0.5, "head_dim": 16, "sliding_window": 32, "tie_word_embeddings": True}),
    ("Granite", {"logits_scaling": 8.0, "tie_word_embeddings": True}),
    ("Cohere", {"logit_scale": 0.25}),
]


@pytest.mark.parametrize(("kind", "settings"), CAPPED)
def test_logits_that_are_scaled_or_capped_after_the_head_stay_so(kind: str, settings: dict[str, Any]) -> None:
    model, task = causal_lm(kind, **settings), Task()
    batch = packed([[9, 12], [16]], vocabulary=64)
    wanted = plain_loss(model, batch)
    want = gradients(model, wanted)
    task.attach(model)
    assert not task.head.plain
    ours = task.loss_sum(model, batch, CPU)
    assert ours.item() == pytest.approx(wanted.item(), rel=1e-5)
    for name, gradient in gradients(model, ours).items():
        torch.testing.assert_close(gradient, want[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(("kind", "settings"), [c for c in CAPPED if c[0] != "Gemma2"])
def test_a_setting_after_the_head_that_is_not_known_is_found_out(
    kind: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_head_loss, "POST_HEAD", ())
    model, task = causal_lm(kind, **settings), Task()
    task.attach(model)
    with pytest.raises(InputError, match="changes its logits after the output head"):
        task.loss_sum(model, packed([[9, 12]], vocabulary=64), CPU)


def test_tied_embeddings_get_the_gradient_of_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    model, task = causal_lm("Llama", tie_word_embeddings=True), Task()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    batch = packed([[9, 12], [16]], vocabulary=64)
    want = gradients(model, plain_loss(model, batch))
    monkeypatch.setattr(lm_head_loss, "CHUNK_LOGITS", 64 * 5)
    task.attach(model)
    got = gradients(model, task.loss_sum(model, batch, CPU))
    assert "model.embed_tokens.weight" in got
    assert "lm_head.weight" not in got
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_model_without_an_output_head_is_refused() -> None:
    import transformers

    with pytest.raises(ValueError, match="LlamaModel has no output embeddings"):
        lm_head_loss.TargetHead(transformers.LlamaModel(transformers.LlamaConfig(**SMALL)))


def test_evaluation_reports_the_mean_and_its_perplexity() -> None:
    def said(loss: float, units: int) -> dict[str, float]:
        return Task().metrics({"loss": torch.tensor(loss), "units": torch.tensor(units)})

    assert said(30.0, 10) == pytest.approx({"loss": 3.0, "perplexity": 20.0855}, rel=1e-4)
    assert said(0.0, 0) == {"loss": 0.0, "perplexity": 1.0}
    assert said(1e6, 1)["perplexity"] > 1e300, "a large loss is a number, not an error"
