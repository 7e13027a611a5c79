"""The training loop in one process: precision, clipping, what is not finite, evaluation, and going on."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.looping import Bench, bench
from tests.support.models import CPU
from tests.support.training import losses, run_of, small_recipe, train_here, write_pairs
from trainer.checkpoint import list_commits
from trainer.checkpoint.publish import finished
from trainer.data import eval_batches
from trainer.data.loading.collate import read_batch
from trainer.errors import NonFiniteLoss, where_of
from trainer.recipe import Recipe
from trainer.run import layout
from trainer.run.jsonl import read_rows
from trainer.tasks.sft import SFT
from trainer.worker import build, checkpointer
from trainer.worker.loop import seed_micro_batch

Make = Callable[..., Recipe]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data that every run of this module reads; prepared once, since preparations are shared."""
    folder = tmp_path_factory.mktemp("loop")
    write_pairs(folder / "data" / "a.jsonl", 60)
    write_pairs(folder / "eval" / "a.jsonl", 14)
    return folder


@pytest.fixture
def make(tiny_model: Path, folder: Path, request: pytest.FixtureRequest) -> Make:
    def recipe(suffix: str = "", **changes: Any) -> Recipe:
        name = "".join(c if c.isalnum() else "-" for c in request.node.name).strip("-").lower() + suffix
        return small_recipe(name[-60:].strip("-"), tiny_model, folder, **{"training.steps": 6, **changes})

    return recipe


def trained(bench: Bench) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in bench.strategy.trainable().items()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


PRECISIONS: list[dict[str, Any]] = [
    {"model.dtype": "bfloat16"},
    {"model.dtype": "float16"},
    {"model.dtype": "float16", "strategy.kind": "fsdp"},
    {"model.dtype": "bfloat16", "model.quantization": "nf4"},
    {"model.dtype": "bfloat16", "adapter.method": "none", "optimizer.lr": 1e-3},
    {"model.dtype": "bfloat16", "adapter.method": "none", "optimizer.lr": 1e-3, "strategy.kind": "fsdp"},
    {"optimizer.name": "adamw_8bit"},
]


@pytest.mark.parametrize("changes", PRECISIONS)
def test_every_precision_learns(make: Make, changes: dict[str, Any]) -> None:
    with bench(make(**changes)) as b:
        b.run()
        assert all(math.isfinite(loss) for loss in b.losses())
        assert b.losses()[-1] < b.losses()[0] - 0.05
        assert b.strategy.scaler.is_enabled() == (changes.get("model.dtype") == "float16")
        assert {p.dtype for p in b.strategy.trainable().values()} == {torch.float32}


def test_precisions_agree_about_the_first_loss(make: Make) -> None:
    first = {}
    for dtype in ("float32", "bfloat16", "float16"):
        with bench(make(f"-{dtype}", **{"model.dtype": dtype, "training.stop_after": 1})) as b:
            b.run()
            first[dtype] = b.losses()[0]
    assert first["float16"] == pytest.approx(first["float32"], rel=2e-3)
    assert first["bfloat16"] == pytest.approx(first["float32"], rel=1e-2)


def test_a_float16_step_that_overflows_is_left_out_and_the_scale_comes_down(make: Make) -> None:
    with bench(make(**{"model.dtype": "float16", "training.stop_after": 1})) as b:
        before, scale = trained(b), 2.0**40
        b.strategy.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        b.run()
        assert not math.isfinite(b.rows[0]["grad_norm"])
        assert same(trained(b), before)
        assert b.strategy.scaler.get_scale() == scale / 2
        assert not b.strategy.optimizer.state


def test_a_float16_gradient_that_overflows_at_any_scale_ends_the_run(make: Make) -> None:
    with bench(make(**{"model.dtype": "float16"})) as b:
        b.strategy.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        poison_gradient(b)
        with pytest.raises(NonFiniteLoss, match=r"step 2: the gradient's norm is (inf|nan) while the loss is finite"):
            b.run()


def poison_gradient(b: Bench) -> None:
    parameter = next(p for n, p in b.strategy.trainable().items() if "lora_B" in n)
    parameter.register_hook(lambda gradient: gradient * float("inf"))


@pytest.mark.parametrize("clipped", [1.0, None])
@pytest.mark.parametrize("exact", [False, True])
def test_a_gradient_that_is_not_finite_changes_no_parameter(make: Make, clipped: float | None, exact: bool) -> None:
    with bench(make(**{"training.max_grad_norm": clipped, "exact": exact})) as b:
        before = trained(b)
        poison_gradient(b)
        first = b.stream.step(b.stream.start()).micro_batches[0]
        with pytest.raises(
            NonFiniteLoss, match=r"step 1: the gradient's norm is nan.*lower the learning rate"
        ) as found:
            b.run()
        assert f"(rank 0: samples {read_batch(b.stream.reader, first).sample_ids[0]}" in str(found.value)
        assert "SOURCE:FILE/PLACE" in str(found.value)
        assert same(trained(b), before)
        assert b.rows == []


@pytest.mark.parametrize("exact", [False, True])
def test_a_loss_that_is_not_finite_is_named_before_a_parameter_changes(
    make: Make, monkeypatch: pytest.MonkeyPatch, exact: bool
) -> None:
    loss_sum = SFT.loss_sum
    with bench(make(exact=exact)) as b:
        plans = [b.stream.step(b.stream.start())]
        for _ in range(2):
            plans.append(b.stream.step(plans[-1].next))
        third = [read_batch(b.stream.reader, m).sample_ids for m in plans[2].micro_batches]
        assert len(third) == 3

        def spoilt(self: SFT, module: Any, batch: Any, device: Any) -> torch.Tensor:
            loss = loss_sum(self, module, batch, device)
            return loss * float("nan") if batch.sample_ids == third[1] else loss

        monkeypatch.setattr(SFT, "loss_sum", spoilt)
        after = list[dict[str, torch.Tensor]]()
        with pytest.raises(NonFiniteLoss) as found:
            b.run(step_done=lambda row: after.append(trained(b)))
        assert len(after) == 2
        assert same(trained(b), after[1]), "step 3 has changed nothing"
        text = str(found.value)
        assert text.startswith("step 3: the loss is not finite (rank 0: samples ")
        fed = [s for ids in third for s in ids]
        more = f" and {len(fed) - 8} more" if len(fed) > 8 else ""
        assert text.split("samples ")[1].split(")")[0] == ", ".join(fed[:8]) + more
        assert "SOURCE:FILE/PLACE" in text


def test_clipping_scales_the_whole_gradient(make: Make) -> None:
    clipped, free = {}, {}
    for limit, rows in ((1e-4, clipped), (None, free)):
        name = f"-{'free' if limit is None else 'clipped'}"
        with bench(make(name, **{"training.max_grad_norm": limit, "training.stop_after": 1})) as b:
            step = b.strategy.optimizer.step

            def spy(*given: Any, b: Bench = b, rows: dict[str, Any] = rows, step: Any = step) -> Any:
                rows.update({n: p.grad.clone() for n, p in b.strategy.trainable().items() if p.grad is not None})
                return step(*given)

            b.strategy.optimizer.step = spy  # type: ignore[method-assign]
            b.run()
            rows["norm"] = torch.tensor(b.rows[0]["grad_norm"])
    norm = free.pop("norm")
    assert clipped.pop("norm") == norm, "what is reported is the norm before clipping"
    assert float(torch.stack([g.norm() for g in free.values()]).norm()) == pytest.approx(float(norm), rel=1e-5)
    assert float(torch.stack([g.norm() for g in clipped.values()]).norm()) == pytest.approx(1e-4, rel=1e-3)
    for name, gradient in free.items():
        torch.testing.assert_close(clipped[name], gradient * (1e-4 / float(norm)), rtol=1e-3, atol=1e-9)


EVALUATED = {"training.eval_every": 4}


def with_eval(make: Make, folder: Path, suffix: str = "", **changes: Any) -> Recipe:
    source = [{"path": f"{folder}/eval/*.jsonl", "format": "completion"}]
    return make(suffix, **{"data.eval": source, **EVALUATED, **changes})


def test_an_evaluation_is_the_mean_over_all_target_tokens(make: Make, folder: Path) -> None:
    with bench(with_eval(make, folder)) as b:
        b.run()
        assert [row["step"] for row in b.evaluations] == [4, 6], "when due, and after the last step"
        assert b.data.eval is not None
        total, targets, samples = 0.0, 0, 0
        b.model.eval()
        for batch in eval_batches(b.data.eval, 1, 0, 1):
            with torch.no_grad():
                total += float(b.task.loss_sum(b.model, batch, CPU))
            targets, samples = targets + int(batch.targets.sum()), samples + len(batch.sample_ids)
        assert samples == 14
        row = b.evaluations[-1]
        assert row["eval_loss"] == pytest.approx(total / targets, rel=1e-6)
        assert row["eval_perplexity"] == pytest.approx(math.exp(total / targets), rel=1e-6)
        assert row["eval_target_tokens"] == targets
        assert row["eval_loss"] < b.evaluations[0]["eval_loss"], "it has learnt in between"


def test_an_evaluation_does_not_depend_on_the_micro_batch(make: Make, folder: Path) -> None:
    found = []
    for size in (1, 2, 5):
        with bench(
            with_eval(make, folder, f"-{size}", **{"training.global_batch": 10, "training.micro_batch": size})
        ) as b:
            b.loop().evaluate(0)
            found.append(b.evaluations[0])
    for row in found[1:]:
        assert row["eval_loss"] == pytest.approx(found[0]["eval_loss"], rel=1e-6)
        assert row["eval_target_tokens"] == found[0]["eval_target_tokens"]
        assert row["eval_tokens"] == found[0]["eval_tokens"]


@pytest.mark.parametrize("changes", [{}, {"model.quantization": "nf4"}, {"strategy.kind": "fsdp"}])
def test_an_evaluation_leaves_the_training_as_it_was(make: Make, folder: Path, changes: dict[str, Any]) -> None:
    with bench(make("-without", **changes)) as b:
        b.run()
        without = b.losses()
    with bench(with_eval(make, folder, "-with", **{**changes, "training.eval_every": 1})) as b:
        b.run()
        assert len(b.evaluations) == 6
        assert b.losses() == without
        assert b.model.training


def test_what_the_loop_reports(make: Make) -> None:
    recipe = make(**{"schedule": {"name": "linear", "warmup_steps": 2}, "checkpoint.every_steps": 4})
    with bench(recipe) as b:
        end = b.run()
        assert end.step == 6
        assert [row["step"] for row in b.rows] == [1, 2, 3, 4, 5, 6]
        assert b.due == [(4, False), (6, True)]
        assert [row["lr"] / 5e-3 for row in b.rows] == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25])
        for row, (step, batches) in zip(b.rows, b.fed, strict=True):
            assert row["step"] == step
            assert row["tokens"] == sum(batch.tokens for batch in batches)
            assert row["target_tokens"] == sum(batch.target_tokens for batch in batches)
            assert row["total_steps"] == 6
            assert row["world_size"] == 1
        assert b.rows[-1]["samples"] == end.cursor.samples == sum(len(x.sample_ids) for _, bs in b.fed for x in bs)


def test_a_stop_is_a_checkpoint_at_the_very_step(make: Make) -> None:
    with bench(make(**{"checkpoint.every_steps": 2})) as b:
        asked = iter([False, False, True])
        assert b.run(stop_requested=lambda: next(asked)).step == 3
        assert b.due == [(2, False), (3, True)]


def test_random_numbers_depend_on_seed_step_and_micro_batch_alone() -> None:
    def drawn(*key: int) -> float:
        seed_micro_batch(*key)
        return float(torch.rand(()))

    torch.manual_seed(1)
    assert drawn(17, 3, 1) == drawn(17, 3, 1)
    assert len({drawn(17, 3, 1), drawn(18, 3, 1), drawn(17, 4, 1), drawn(17, 3, 2), drawn(17, 1, 3)}) == 5


RESUMED: list[dict[str, Any]] = [
    {},
    {"optimizer.name": "adamw_8bit"},
    {"adapter.method": "dora", "model.quantization": "nf4", "strategy.kind": "fsdp"},
    {"model.dtype": "float16"},
    {"model.dtype": "bfloat16", "adapter.method": "none", "optimizer.lr": 1e-3},
]


@pytest.mark.parametrize("changes", RESUMED)
def test_a_run_goes_on_to_the_bit(make: Make, changes: dict[str, Any]) -> None:
    straight = make("-straight", **changes)
    assert train_here(straight) == "succeeded"
    stopped = make("-stopped", **{**changes, "training.stop_after": 3})
    assert train_here(stopped) == "interrupted"
    assert train_here(make("-stopped", **changes)) == "succeeded"
    assert losses(stopped) == losses(straight)
    attempts = {row["step"]: row["attempt"] for row in read_rows(run_of(stopped), layout.METRICS) if "loss" in row}
    assert attempts == {1: 1, 2: 1, 3: 1, 4: 2, 5: 2, 6: 2}
    one, two = (list_commits(run_of(r))[0].files for r in (straight, stopped))
    assert one.keys() == two.keys()
    weights = [name for name in one if name.endswith((".safetensors", "config.json"))]
    assert len(weights) >= 3
    assert {n: one[n] for n in weights} == {n: two[n] for n in weights}
    assert ("master.safetensors" in one) == (changes.get("adapter.method") == "none")


def test_a_float16_run_keeps_its_loss_scale(make: Make) -> None:
    recipe = make(**{"model.dtype": "float16", "training.stop_after": 2})
    with bench(recipe) as b:
        b.strategy.scaler = torch.amp.GradScaler("cpu", init_scale=512.0, growth_interval=2)
        b.run()
        snapshot = b.state.snapshot(2, {"cursor": 1}, final=True)
        assert snapshot is not None
        assert snapshot.state["scaler"]["scale"] == 1024.0
        assert snapshot.state["cursor"] == 1
        before = trained(b)
        folder = Path(recipe.storage).parent / "float16-checkpoint"
        folder.mkdir()
        b.state.write(snapshot, folder)
    with bench(recipe) as b:
        assert not same(trained(b), before)
        b.state.load(folder, snapshot.state)
        assert same(trained(b), before)
        assert b.strategy.scaler.get_scale() == 1024.0
        assert b.strategy.scaler.state_dict() == snapshot.state["scaler"]


def test_a_snapshot_stays_as_it_is_while_training_goes_on(make: Make) -> None:
    with bench(make()) as b:
        taken = list[Any]()
        copies = list[Any]()

        def checkpoint(position: Any, last: bool) -> None:
            if not taken:
                snapshot = b.state.snapshot(position.step, {}, final=last)
                assert snapshot is not None
                taken.append(snapshot)
                copies.append({n: t.clone() for n, t in {**snapshot.weights, **snapshot.optimizer}.items()})

        b.run(checkpoint=checkpoint)
        assert taken[0].step == 5
        assert same({**taken[0].weights, **taken[0].optimizer}, copies[0])
        assert not same(taken[0].weights, trained(b))


def test_a_gather_that_lost_something_is_found_out(make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from trainer.errors import CorruptObject
    from trainer.strategies.ddp import DDP

    def half(self: DDP, tensor: torch.Tensor) -> torch.Tensor:
        return tensor[: max(1, len(tensor) // 2)] if tensor.ndim else tensor

    with bench(make(**{"training.stop_after": 1})) as b:
        b.run()
        monkeypatch.setattr(DDP, "full_tensor", half)
        snapshot = b.state.snapshot(1, {}, final=True)
        assert snapshot is not None
        with pytest.raises(CorruptObject, match="has shape"):
            b.state.write(snapshot, tmp_path)


def test_a_failure_does_not_lose_the_checkpoint_before_it(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    loss_sum, put, fed = SFT.loss_sum, checkpointer.put_checkpoint, [0]
    failed = threading.Event()

    def spoilt(self: SFT, module: Any, batch: Any, device: Any) -> torch.Tensor:
        fed[0] += 1
        if fed[0] > 3 * 2:
            failed.set()
            return loss_sum(self, module, batch, device) * float("nan")
        return loss_sum(self, module, batch, device)

    def slow(*given: Any, **named: Any) -> Any:
        assert failed.wait(30.0), "the upload of step 2 is under way when step 3 fails"
        return put(*given, **named)

    monkeypatch.setattr(SFT, "loss_sum", spoilt)
    monkeypatch.setattr(build, "check_used", lambda *_: None)  # it computes one more loss
    monkeypatch.setattr(checkpointer, "put_checkpoint", slow)
    recipe = make(**{"checkpoint.every_steps": 2})
    with pytest.raises(NonFiniteLoss, match="step 3") as found:
        train_here(recipe)
    assert where_of(found.value) == "step 3, exchange of the loss"
    assert [record.step for record in list_commits(run_of(recipe))] == [2]
    (told,) = [e for e in read_rows(run_of(recipe), layout.EVENTS) if e["event"] == "checkpoint"]
    assert told["step"] == 2
    assert 0 <= told["stall_s"] < 30
    assert [r["step"] for r in read_rows(run_of(recipe), layout.METRICS)] == [1, 2]


def test_a_damaged_last_checkpoint_is_trained_anew(make: Make) -> None:
    recipe = make(**{"checkpoint.every_steps": 4})
    assert train_here(recipe) == "succeeded"
    run, before = run_of(recipe), losses(recipe)
    last = finished(run)
    assert last is not None
    for key in (last.file_key("adapter_model.safetensors"), f"{layout.ADAPTER}/adapter_model.safetensors"):
        run.write(key, b"torn" + run.read(key)[4:])
    assert finished(run) is None
    assert train_here(recipe) == "succeeded"
    assert losses(recipe) == before
    again = finished(run)
    assert again is not None
    assert (again.step, again.attempt, again.files["adapter_model.safetensors"]) == (
        6, 2, last.files["adapter_model.safetensors"],
    )  # fmt: skip
    skipped = [e for e in read_rows(run, layout.EVENTS) if e["event"] == "skipped_checkpoint"]
    assert [e["step"] for e in skipped] == [6]
