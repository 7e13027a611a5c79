"""Distillation: divergences by their formulas, losses and gradients by full logits, and the kinds of teacher."""

from __future__ import annotations

import json
import math
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

from launcher.driver.preflight import check_model
from tests.support.looping import bench
from tests.support.models import CPU, SMALL_SHAPE, packed, random_model, samples_of, stir
from tests.support.s3 import S3
from tests.support.tasks import make_encoder, make_teacher, task_recipe, write_task_data
from tests.support.training import adapter_bytes, losses, run_of, train_here
from trainer.artifacts import ArtifactRef
from trainer.artifacts import sharded as sharded_file
from trainer.artifacts import teacher as teacher_file
from trainer.artifacts.teacher import teacher_of
from trainer.data import Batch
from trainer.data.outputs import Part, StoredOutputs
from trainer.distributed.world import join_world
from trainer.errors import InputError, RecipeError
from trainer.evaluate import evaluate
from trainer.recipe import Recipe
from trainer.run import layout
from trainer.storage import open_storage
from trainer.tasks import lm_head_loss
from trainer.tasks.distill.divergences import LEAST_REST, at_tokens, divergence, with_rest
from trainer.tasks.distill.stored import StoredTeacher
from trainer.tasks.distill.task import Distill
from trainer.tasks.distill.teacher import ModelTeacher, SharedTeacher
from trainer.worker.start import stored_outputs
from trainer.worker.start.stored_outputs import OutputsMaker

LOSSES = ("forward_kl", "reverse_kl", "jsd")
PLAIN = {"distill.beta": 0.5, "distill.temperature": 1.0, "distill.ce_coef": 0.0}
FEW = {"training.steps": 3, "checkpoint.every_steps": 3, "training.eval_every": None}
BATCH = [[9, 14, 5], [20], [6, 6, 7, 4]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distill")
    for task in ("distill", "sft", "reward"):
        write_task_data(folder, task)
    return folder


@pytest.fixture(scope="module")
def shared_run(tiny_model: Path, folder: Path) -> str:
    """A run of LoRA, with dropout, on the base model of the students."""
    return trained(task_recipe("sft", "teacher", tiny_model, folder, **FEW, **{"optimizer.lr": 3e-2}))


def trained(recipe: Recipe) -> str:
    assert train_here(recipe) == "succeeded"
    return run_of(recipe).url


def learning(place: str | Path, name: str, model: Path, folder: Path, **changes: Any) -> Recipe:
    given = {**FEW, "adapter.dropout": 0.0, "distill.loss": "forward_kl", **PLAIN, "distill.teacher": str(place)}
    return task_recipe("distill", name, model, folder, **{**given, **changes})


def by_hand(loss: str, beta: float, p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """From probabilities [n, K], in float64."""
    m = beta * p + (1 - beta) * q
    forward, reverse = (p * np.log(p / q)).sum(-1), (q * np.log(q / p)).sum(-1)
    mixed = beta * (p * np.log(p / m)).sum(-1) + (1 - beta) * (q * np.log(q / m)).sum(-1)
    found: np.ndarray = {"forward_kl": forward, "reverse_kl": reverse, "jsd": mixed}[loss]
    return found


def drawn(rows: int = 6, vocabulary: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    teacher, student = (3.0 * torch.randn(rows, vocabulary, generator=draw, dtype=torch.float64) for _ in range(2))
    return teacher, student


def softmax(logits: torch.Tensor) -> np.ndarray:
    z = logits.double().numpy()
    e = np.exp(z - z.max(-1, keepdims=True))
    found: np.ndarray = e / e.sum(-1, keepdims=True)
    return found


def coarse(p: np.ndarray, ids: np.ndarray) -> np.ndarray:
    kept = np.take_along_axis(p, ids, -1)
    return np.concatenate([kept, 1.0 - kept.sum(-1, keepdims=True)], -1)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("loss", LOSSES)
def test_divergences_are_those_of_their_formulas(loss: str, beta: float) -> None:
    teacher, student = drawn()
    of = divergence(loss, beta)
    got = of(teacher.log_softmax(-1), student.log_softmax(-1))
    np.testing.assert_allclose(got, by_hand(loss, beta, softmax(teacher), softmax(student)), rtol=1e-6)
    assert (got > 0).all()
    assert of(teacher.log_softmax(-1), teacher.log_softmax(-1)).abs().max() < 1e-12


def test_jsd_has_the_gradients_of_both_divergences_at_its_ends() -> None:
    teacher, student = (0.3 * logits for logits in drawn())
    student.requires_grad_()

    def slope(loss: str, beta: float) -> torch.Tensor:
        made = divergence(loss, beta)(teacher.log_softmax(-1), student.log_softmax(-1)).sum()
        (found,) = torch.autograd.grad(made, student)
        return found

    near = 1e-4
    torch.testing.assert_close(slope("jsd", near) / near, slope("forward_kl", 0.5), rtol=2e-3, atol=1e-4)
    torch.testing.assert_close(slope("jsd", 1 - near) / near, slope("reverse_kl", 0.5), rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("k", [1, 5, 29])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_other_tokens_count_as_one_outcome(loss: str, k: int) -> None:
    teacher, student = drawn()
    logps, ids = teacher.log_softmax(-1).topk(k, -1)
    got = divergence(loss, 0.3)(with_rest(logps), at_tokens(student, ids))
    want = by_hand(loss, 0.3, coarse(softmax(teacher), ids.numpy()), coarse(softmax(student), ids.numpy()))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert (got <= divergence(loss, 0.3)(teacher.log_softmax(-1), student.log_softmax(-1)) + 1e-9).all()


def test_a_teacher_that_is_sure_leaves_a_finite_rest() -> None:
    logps = torch.tensor([[0.0, -40.0], [1e-7, -30.0]])
    assert with_rest(logps)[:, -1].tolist() == pytest.approx([math.log(LEAST_REST)] * 2)
    student = torch.tensor([[90.0, 0.0, 0.0, 0.0]], requires_grad=True)
    found = at_tokens(student, torch.tensor([[0, 1]]))
    torch.testing.assert_close(found, torch.tensor([[0.0, -90.0, math.log(2) - 90.0]]))
    divergence("reverse_kl", 0.5)(with_rest(logps[:1]), found).sum().backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    assert student.grad.isfinite().all()


def full_loss(recipe: Recipe, student: Any, teacher: Any, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
    """From the full logits of every sample alone: the sum of the losses, and the sums for the metrics."""
    section, total = recipe.distill, torch.zeros((), dtype=torch.float64)
    sums = {"nll": 0.0, "teacher_nll": 0.0, "agreement": 0.0}
    for row, columns in samples_of(batch):
        ids = torch.from_numpy(batch.input_ids[row, columns])[None]
        at = torch.from_numpy(batch.targets[row, columns])
        labels = ids[0][at]
        with torch.no_grad():
            z_teacher = teacher(input_ids=ids, use_cache=False).logits[0, :-1][at[1:]].double()
        z = student(input_ids=ids, use_cache=False).logits[0, :-1][at[1:]].double()
        tokens = min(z.shape[1], z_teacher.shape[1])
        p = (z_teacher[:, :tokens] / section.temperature).softmax(-1)
        q = (z[:, :tokens] / section.temperature).softmax(-1)
        if section.top_k is not None and section.top_k < tokens:
            top = p.topk(section.top_k, -1).indices
            p, q = (torch.cat([d.gather(-1, top), 1 - d.gather(-1, top).sum(-1, keepdim=True)], -1) for d in (p, q))
        m = section.beta * p + (1 - section.beta) * q
        forward, reverse = (p * (p / q).log()).sum(), (q * (q / p).log()).sum()
        mixed = section.beta * (p * (p / m).log()).sum() + (1 - section.beta) * (q * (q / m).log()).sum()
        nll, nll_teacher = (-d.log_softmax(-1).gather(-1, labels[:, None]).sum() for d in (z, z_teacher))
        total = total + {"forward_kl": forward, "reverse_kl": reverse, "jsd": mixed}[section.loss]
        total = total + section.ce_coef * nll
        sums["nll"] += float(nll)
        sums["teacher_nll"] += float(nll_teacher)
        sums["agreement"] += float((z[:, :tokens].argmax(-1) == z_teacher[:, :tokens].argmax(-1)).sum())
    return total, sums


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}


VARIANTS: list[dict[str, Any]] = [
    {},
    {"distill.loss": "reverse_kl", "distill.temperature": 2.0},
    {"distill.loss": "jsd", "distill.beta": 0.2, "distill.ce_coef": 0.7, "training.gradient_checkpointing": True},
    {"distill.top_k": 7, "distill.temperature": 0.5},
    {"distill.loss": "reverse_kl", "distill.top_k": 7},
    {"distill.top_k": 5000},
    {"distill.loss": "jsd", "distill.top_k": 3, "adapter": {"method": "none"}},
    {"distill.ce_coef": 0.5, "adapter": {"method": "none"}},
]


@pytest.mark.parametrize("rows", [7, 10_000])
@pytest.mark.parametrize("changes", VARIANTS, ids=lambda changes: "-".join(map(str, changes.values())) or "plain")
def test_losses_and_gradients_are_those_of_full_logits(
    tiny_model: Path, folder: Path, rows: int, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``rows``: of a chunk; the head is frozen, and trained with method none."""
    monkeypatch.setattr(lm_head_loss, "CHUNK_LOGITS", 384 * rows)
    name = f"loss-{VARIANTS.index(changes)}-{rows}"
    place = make_teacher(folder / "teacher", tiny_model)
    with bench(learning(place, name, tiny_model, folder, **changes)) as b:
        stir(b.model)
        teacher: Any = b.task.teacher
        batch = packed(BATCH)
        assert batch.target_tokens > 3 * 7
        output = b.task.loss(b.model, batch, CPU)
        got = gradients(b.model, output.loss_sum)
        loss, sums = full_loss(b.recipe, b.model, teacher.model, batch)
        want = gradients(b.model, loss)
    assert output.loss_sum.item() == pytest.approx(loss.item(), rel=1e-5)
    assert {n: v.item() for n, v in output.sums.items()} == pytest.approx(sums, rel=1e-5)
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5, msg=name)
        assert want[name].any(), name


@pytest.mark.parametrize("top_k", [None, 5])
def test_models_that_change_their_logits_teach_and_learn(tiny_model: Path, folder: Path, top_k: int | None) -> None:
    import transformers

    config = transformers.Gemma2Config(**SMALL_SHAPE, final_logit_softcapping=4.0, max_position_embeddings=256)
    model = folder / "gemma"
    if not model.is_dir():
        random_model(config, model, tiny_model)
    with bench(learning(model, f"capped-{top_k}", model, folder, **{"distill.top_k": top_k})) as b:
        stir(b.model)
        assert not b.task.head.plain
        teacher: Any = b.task.teacher
        batch = packed(BATCH)
        output = b.task.loss(b.model, batch, CPU)
        loss, sums = full_loss(b.recipe, b.model, teacher.model, batch)
    assert output.loss_sum.item() == pytest.approx(loss.item(), rel=1e-4)
    assert {n: v.item() for n, v in output.sums.items()} == pytest.approx(sums, rel=1e-4)


@pytest.mark.parametrize(("top_k", "kept"), [(None, 384), (6, 6)])
def test_what_is_kept_of_both_models(
    tiny_model: Path, folder: Path, top_k: int | None, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All logits of a teacher or its k, and of a student one chunk at a time."""
    monkeypatch.setattr(lm_head_loss, "CHUNK_LOGITS", 384 * 10)
    place = make_teacher(folder / "teacher", tiny_model)
    with bench(learning(place, f"kept-{kept}", tiny_model, folder, **{"distill.top_k": top_k})) as b:
        batch = packed([[60, 60]])
        outputs = b.task.teacher.outputs(batch, b.model, CPU)
        values = outputs.logits if top_k is None else outputs.logps
        assert values.shape == (batch.target_tokens, kept)
        assert (outputs.logits is None) == (top_k is not None)
        saved: list[int] = []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            saved.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            b.task.loss(b.model, batch, CPU)
        assert 384 * 10 in saved, "a chunk's logits, inside the head"
        assert max(saved) < batch.target_tokens * 384


def test_a_run_on_the_same_base_needs_no_second_model(
    tiny_model: Path, folder: Path, shared_run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = learning(shared_run, "shared", tiny_model, folder, **{"adapter.dropout": 0.1})
    monkeypatch.setattr(teacher_file, "_shared", lambda *given: None)
    own = teacher_of(recipe, CPU)
    monkeypatch.undo()
    assert isinstance(own, ModelTeacher)
    with bench(recipe) as b:
        shared = b.task.teacher
        assert isinstance(shared, SharedTeacher)
        assert shared.identity == own.identity
        frozen = {n: p.detach().clone() for n, p in b.model.named_parameters() if not p.requires_grad}
        assert any("lora_A.teacher" in name for name in frozen)
        b.run()
        assert all(torch.equal(p, frozen[n]) for n, p in b.model.named_parameters() if n in frozen)
        assert b.model.active_adapter == "default"
        batch = packed(BATCH)
        b.model.train()
        before = torch.get_rng_state()
        got, want = (teacher.outputs(batch, b.model, CPU) for teacher in (shared, own))
        assert torch.equal(torch.get_rng_state(), before), "a teacher has no dropout"
        assert b.model.training
        torch.testing.assert_close(got.logits, want.logits, rtol=0, atol=1e-5)
        assert torch.equal(got.likely, want.likely)


def test_a_run_with_a_shared_teacher_resumes_and_is_evaluated(tiny_model: Path, folder: Path, shared_run: str) -> None:
    from safetensors.torch import load

    changes = {"training.steps": 6, "checkpoint.every_steps": 2, "adapter.dropout": 0.1, "distill.top_k": 12}
    whole, halved = (learning(shared_run, name, tiny_model, folder, **changes) for name in ("whole", "halved"))
    assert train_here(whole) == "succeeded"
    stop = halved.model_copy(update={"training": halved.training.model_copy(update={"stop_after": 4})})
    assert train_here(stop) == "interrupted"
    assert train_here(halved) == "succeeded"
    assert losses(halved) == losses(whole)
    assert adapter_bytes(halved) == adapter_bytes(whole)
    assert not [name for name in load(adapter_bytes(whole)) if "teacher" in name]
    found = evaluate(whole, ArtifactRef(run=run_of(whole).url))
    assert set(found) >= {"loss", "perplexity", "teacher_perplexity", "agreement"}
    assert 0 < found["agreement"] <= 1


@pytest.mark.parametrize(
    "change",
    [
        {"adapter": {"method": "vera"}},
        {"adapter": {"method": "lora", "modules_to_save": ["lm_head"]}},
        {"model.quantization": "nf4"},
        {"distill.quantization": "nf4"},
    ],
)
def test_where_it_cannot_share_the_base_it_has_its_own(
    tiny_model: Path, folder: Path, shared_run: str, change: dict[str, Any]
) -> None:
    assert isinstance(teacher_of(learning(shared_run, "apart", tiny_model, folder, **change), CPU), ModelTeacher)


KINDS: dict[str, dict[str, Any]] = {
    "lora": {"adapter": {"method": "lora", "rank": 2, "modules_to_save": ["lm_head"]}},
    "prompt": {"adapter": {"method": "prompt", "virtual_tokens": 3}},
    "prefix": {"adapter": {"method": "prefix", "virtual_tokens": 3}},
    "qpissa": {"adapter": {"method": "pissa", "rank": 2}, "model.quantization": "nf4"},
    "none": {"adapter": {"method": "none"}},
}
"""Runs of teachers, by name."""
BY_SHARD = ("lora", "none")


@pytest.mark.parametrize("kind", KINDS)
def test_a_sharded_teacher_gives_what_a_complete_one_gives(
    tiny_model: Path, folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = trained(task_recipe("sft", f"teaches-{kind}", tiny_model, folder, **{**FEW, **KINDS[kind]}))
    sharding = {"strategy.kind": "fsdp", "strategy.offload": kind == "none"}
    recipe = learning(place, f"sharded-{kind}", tiny_model, folder, **sharding)
    batch, loaded = packed(BATCH), []
    plain = sharded_file.load
    monkeypatch.setattr(sharded_file, "load", lambda *given, **more: (loaded.append(kind), plain(*given, **more))[1])
    with join_world(gpu=False) as world:
        whole, sharded = teacher_of(recipe, CPU), teacher_of(recipe, CPU, world)
        assert loaded == ([] if kind in BY_SHARD else [kind])
        assert isinstance(whole, ModelTeacher)
        assert isinstance(sharded, ModelTeacher)
        assert all(isinstance(p, DTensor) for p in sharded.model.parameters())
        want, got = (teacher.outputs(batch, torch.nn.Identity(), CPU) for teacher in (whole, sharded))
        assert not any(p.requires_grad for p in (*whole.model.parameters(), *sharded.model.parameters()))
    torch.testing.assert_close(got.logits, want.logits, rtol=0, atol=1e-5)


@pytest.mark.night
def test_a_run_goes_on_with_the_teacher_that_it_began_with(tiny_model: Path, folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "teacher"
    shutil.copytree(make_teacher(folder / "teacher", tiny_model), place)
    recipe = learning(place, "replaced", tiny_model, folder, **{"checkpoint.every_steps": 1})
    stop = recipe.model_copy(update={"training": recipe.training.model_copy(update={"stop_after": 1})})
    assert train_here(stop) == "interrupted"
    other = make_other(tmp_path / "other", tiny_model)
    shutil.copyfile(other / "model.safetensors", place / "model.safetensors")
    shutil.copyfile(other / "config.json", place / "config.json")
    with pytest.raises(InputError, match="is not the model that this run has learnt from"):
        train_here(recipe)


def make_other(folder: Path, tokenizer_of: Path) -> Path:
    import transformers

    return random_model(transformers.LlamaConfig(**SMALL_SHAPE, max_position_embeddings=32), folder, tokenizer_of)


def swap_tokens(folder: Path) -> None:
    """Exchanges the numbers of two letters."""
    file = folder / "tokenizer.json"
    found = json.loads(file.read_text())
    numbers = found["model"]["vocab"]
    numbers["e"], numbers["t"] = numbers["t"], numbers["e"]
    file.write_text(json.dumps(found))


def test_what_cannot_teach_is_said_before_workers_start(tiny_model: Path, folder: Path, tmp_path: Path) -> None:
    odd: list[str] = []

    def check(place: str | Path, name: str = "looked", **changes: Any) -> None:
        check_model(learning(place, name, tiny_model, folder, **changes), odd.append)

    check(make_teacher(folder / "teacher", tiny_model))
    few = make_other(tmp_path / "few", tiny_model)
    with pytest.raises(InputError, match=r"distill\.teacher .*data\.sequence_length 64 is more than the 32 positions"):
        check(few, **{"data.packing": False})
    other = tmp_path / "tokens"
    shutil.copytree(make_teacher(folder / "teacher", tiny_model), other)
    swap_tokens(other)
    for refused in (check, lambda place: teacher_of(learning(place, "looked", tiny_model, folder), CPU)):
        refuse: Callable[..., Any] = refused
        with pytest.raises(InputError, match=r"another vocabulary than model\.path .*: the token 'e' is number \d+ of"):
            refuse(other)
    (few / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"distill\.teacher"):
        check(few, **{"data.sequence_length": 32})
    with pytest.raises(InputError, match="is neither a folder here nor a model"):
        check("no/where")
    with pytest.raises(InputError, match="is for task classification"):
        check(make_encoder(tmp_path / "classifier"))
    rater = task_recipe("reward", "rater", tiny_model, folder, **FEW)
    with pytest.raises(InputError, match="is for task reward, and gives no distributions of tokens"):
        check(trained(rater))


def test_other_tasks_have_no_teacher(tiny_model: Path, folder: Path) -> None:
    assert teacher_of(task_recipe("sft", "none", tiny_model, folder), CPU) is None


def test_training_sees_the_teacher_once_for_each_micro_batch(tiny_model: Path, folder: Path) -> None:
    place = make_teacher(folder / "teacher", tiny_model)
    with bench(learning(place, "counted", tiny_model, folder, **{"data.eval": []})) as b:
        assert isinstance(b.task, Distill)
        teacher: Any = b.task.teacher
        calls: list[bool] = []
        teacher.model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
        b.run()
        assert not any(p.grad is not None for p in teacher.model.parameters())
        assert calls == [False] * sum(len(batches) for _, batches in b.fed)


STORED = {"distill.store": True, "distill.top_k": 12, "distill.temperature": 2.0}


def outputs_of(recipe: Recipe) -> dict[str, dict[str, np.ndarray]]:
    """Returns the arrays of all blocks of stored outputs beside the prepared data, by their keys."""
    from safetensors.numpy import load

    prepared = open_storage(recipe.storage).child(layout.PREPARED)
    keys = [item.key for item in prepared.list() if "/outputs-" in item.key and item.key.endswith(".safetensors")]
    return {key: load(prepared.read(key)) for key in keys}


@pytest.fixture
def no_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a teacher is loaded."""
    for name in ("_second_model", "_shared"):
        monkeypatch.setattr(teacher_file, name, lambda *given: pytest.fail("a teacher is loaded"))


@pytest.mark.parametrize(
    ("kind", "packing"),
    [
        ("model", True),
        ("shared", False),
        pytest.param("model", False, marks=pytest.mark.night),
        pytest.param("shared", True, marks=pytest.mark.night),
    ],
)
def test_stored_outputs_teach_as_the_teacher_does(
    tiny_model: Path,
    folder: Path,
    tmp_path: Path,
    shared_run: str,
    kind: str,
    packing: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Outputs are in parts of a few samples."""
    monkeypatch.setattr(stored_outputs, "PART_BYTES", 200 * (8 * 12 + 4))
    place = make_teacher(folder / "teacher", tiny_model) if kind == "model" else shared_run
    changes = {**STORED, "data.packing": packing, "storage": str(tmp_path), "training.eval_every": 3}
    found: list[tuple[list[float], dict[str, Any]]] = []
    for store in (False, True):
        recipe = learning(place, f"store-{store}", tiny_model, folder, **{**changes, "distill.store": store})
        with bench(recipe) as b:
            assert isinstance(b.task.teacher, StoredTeacher) == store
            b.run()
            found.append((b.losses(), b.evaluations[0]))
    assert len(outputs_of(recipe)) > 4, "several parts of a block"
    (online, scores), (stored, stored_scores) = found
    assert stored == pytest.approx(online, rel=1e-5)
    names = ("eval_loss", "eval_perplexity", "eval_teacher_perplexity", "eval_agreement")
    assert [stored_scores[n] for n in names] == pytest.approx([scores[n] for n in names], rel=1e-5)


def test_the_memory_of_the_teacher_is_freed_and_bytes_of_each_target_are_stored(
    tiny_model: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, loaded, load = make_teacher(folder / "teacher", tiny_model), [], teacher_file._second_model

    def watched(*given: Any) -> ModelTeacher:
        teacher = load(*given)
        loaded.append(weakref.ref(teacher.model))
        return teacher

    monkeypatch.setattr(teacher_file, "_second_model", watched)
    with bench(learning(place, "sizes", tiny_model, folder, **STORED, storage=str(tmp_path))) as b:
        assert [model() for model in loaded] == [None]
        totals = [part.totals for part in (b.data.train, b.data.eval) if part]
    of_targets = [sum(arrays[n].nbytes for n in ("ids", "logps", "nll")) for arrays in outputs_of(b.recipe).values()]
    assert sorted(of_targets) == sorted(total.target_tokens * (8 * 12 + 4) for total in totals)


@pytest.mark.parametrize("kind", ["model", pytest.param("shared", marks=pytest.mark.night)])
def test_a_run_resumes_and_another_student_learns_without_the_teacher(
    tiny_model: Path, folder: Path, tmp_path: Path, shared_run: str, kind: str, request: pytest.FixtureRequest
) -> None:
    """The teacher's folder is deleted after the first attempt. A student that never had the teacher in memory learns
    the same bytes."""
    place = tmp_path / "teacher"
    shutil.copytree(shared_run if kind == "shared" else make_teacher(folder / "teacher", tiny_model), place)
    changes = {**STORED, "storage": str(tmp_path), "training.steps": 4, "checkpoint.every_steps": 1}
    first, other = (
        learning(place, name, tiny_model, folder, **changes, **{"adapter.dropout": 0.1}) for name in ("first", "other")
    )
    stop = first.model_copy(update={"training": first.training.model_copy(update={"stop_after": 2})})
    assert train_here(stop) == "interrupted"
    shutil.rmtree(place)
    before = outputs_of(first)
    request.getfixturevalue("no_teacher")
    check_model(first, pytest.fail)
    check_model(other, pytest.fail)
    assert train_here(first) == train_here(other) == "succeeded"
    assert losses(first) == losses(other)
    assert adapter_bytes(first) == adapter_bytes(other)
    assert outputs_of(first).keys() == before.keys()
    scores = evaluate(other, ArtifactRef(run=run_of(other).url))
    assert scores["teacher_perplexity"] > 1
    for change in ({"distill.top_k": 11}, {"distill.temperature": 1.0}, {"distill.quantization": "nf4"}):
        unknown = learning(place, "unknown", tiny_model, folder, **{**changes, **change})
        for start in (lambda recipe: check_model(recipe, pytest.fail), train_here):
            refuse: Callable[..., Any] = start
            with pytest.raises(InputError, match="teacher"):
                refuse(unknown)


@pytest.mark.night
def test_other_settings_lead_to_other_outputs(tiny_model: Path, folder: Path, tmp_path: Path) -> None:
    place = make_teacher(folder / "teacher", tiny_model)
    counts = []
    for change in ({}, {"distill.ce_coef": 0.5}, {"distill.top_k": 11}, {"distill.temperature": 1.0}):
        recipe = learning(place, "other", tiny_model, folder, **{**STORED, "storage": str(tmp_path), **change})
        with bench(recipe):
            counts.append(len(outputs_of(recipe)))
    assert counts == [2, 2, 4, 6]


def test_a_start_that_was_killed_computes_what_is_missing(
    tiny_model: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = make_teacher(folder / "teacher", tiny_model)
    recipe, other = (
        learning(place, name, tiny_model, folder, **STORED, storage=str(tmp_path / name))
        for name in ("killed", "plain")
    )
    plain = OutputsMaker._store
    monkeypatch.setattr(OutputsMaker, "_store", lambda *given: (plain(*given), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        train_here(recipe)
    monkeypatch.undo()
    (done,) = outputs_of(recipe)
    computed: list[Any] = []
    monkeypatch.setattr(OutputsMaker, "_store", lambda *given: (computed.append(given[3]), plain(*given)))
    assert train_here(recipe) == train_here(other) == "succeeded"
    assert len(computed) == 1 + 2, "the block of the evaluation data, and both of the other run"
    got, want = outputs_of(recipe), outputs_of(other)
    assert done in got
    assert got.keys() == want.keys()
    for key in want:
        for name in want[key]:
            np.testing.assert_array_equal(got[key][name], want[key][name])
    assert adapter_bytes(recipe) == adapter_bytes(other)


def test_a_run_with_a_checkpoint_learns_from_one_teacher(tiny_model: Path, folder: Path, tmp_path: Path) -> None:
    """It keeps to the stored outputs of the teacher that it began with, and is refused if they are gone."""
    place = tmp_path / "teacher"
    shutil.copytree(make_teacher(folder / "teacher", tiny_model), place)
    changes = {**STORED, "storage": str(tmp_path), "checkpoint.every_steps": 1}
    recipe = learning(place, "kept", tiny_model, folder, **changes)

    def until(step: int) -> Recipe:
        return recipe.model_copy(update={"training": recipe.training.model_copy(update={"stop_after": step})})

    assert train_here(until(1)) == "interrupted"
    other = make_other(tmp_path / "other", tiny_model)
    for name in ("model.safetensors", "config.json"):
        shutil.copyfile(other / name, place / name)
    assert train_here(until(2)) == "interrupted"
    assert len(outputs_of(recipe)) == 2, "nothing is computed by the other model"
    second = learning(place, "second", tiny_model, folder, **changes)
    assert train_here(second) == "succeeded"
    shutil.rmtree(place)
    with pytest.raises(InputError, match="outputs of 2 teachers that were there"):
        train_here(learning(place, "third", tiny_model, folder, **changes))
    shutil.copytree(other, place)
    prepared = open_storage(recipe.storage).child(layout.PREPARED)
    prepared.delete([item.key for item in prepared.list() if item.key.endswith("outputs.json")])
    with pytest.raises(InputError, match="is not the model that this run has learnt from"):
        train_here(recipe)


def test_the_stored_tokens_are_a_part_of_the_vocabulary(tiny_model: Path, folder: Path, tmp_path: Path) -> None:
    place = make_teacher(folder / "teacher", tiny_model)
    changes = {**STORED, "storage": str(tmp_path), "distill.top_k": 384}
    with pytest.raises(InputError, match="384 are all 384 tokens of the vocabulary"):
        train_here(learning(place, "all", tiny_model, folder, **changes))
    with pytest.raises(RecipeError, match=r"distill\.store: .*set distill\.top_k"):
        learning(place, "none", tiny_model, folder, **{**changes, "distill.top_k": None})


@pytest.mark.night
def test_in_object_storage_outputs_are_read_once_for_each_host(
    tiny_model: Path, folder: Path, tmp_path: Path, moto: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MUSTER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(stored_outputs, "PART_BYTES", 200 * (8 * 12 + 4))
    place, read = make_teacher(folder / "teacher", tiny_model), StoredOutputs.bytes_of
    fetched: list[tuple[str, Part]] = []

    def counted(stored: StoredOutputs, part: Part) -> bytes:
        fetched.append((stored.folder.url, part))
        return read(stored, part)

    monkeypatch.setattr(StoredOutputs, "bytes_of", counted)
    changes = {**STORED, "training.steps": None, "training.epochs": 2}
    remote, again, local = (
        learning(place, name, tiny_model, folder, **changes, storage=storage)
        for name, storage in (("remote", "s3://runs"), ("again", "s3://runs"), ("local", str(tmp_path)))
    )
    assert train_here(remote) == "succeeded"
    assert len(fetched) == len(set(fetched)) > 1
    assert train_here(again) == "succeeded"
    assert len(fetched) == len(set(fetched)), "the second run has them from the host's disk"
    assert train_here(local) == "succeeded"
    assert adapter_bytes(remote) == adapter_bytes(again) == adapter_bytes(local)
