"""A teacher in the plan: its weights, what its forward gathers, and its logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.plan.estimate import make
from tests.support.planning import EIGHT_LAYERS, SMALL, config_folder, plan_recipe
from tests.support.training import small_recipe
from trainer.model.meta import meta_model
from trainer.plan.config import read_base
from trainer.plan.memory import LOAD_BUDGET, Planner
from trainer.plan.result import Limits, Plan
from trainer.plan.teacher_memory import TeacherModel
from trainer.recipe import ModelSection, Recipe
from trainer.recipe.strategies import Mesh
from trainer.strategies.fsdp import FSDP
from trainer.tasks import lm_head_loss

GPU = {"resources.gpus_per_worker": 1}


def distilling(folder: Path, **changes: Any) -> Recipe:
    teacher = config_folder(folder / "teacher", EIGHT_LAYERS, dtype="bfloat16")
    given = {"task": "distill", "distill.teacher": str(teacher), "model.dtype": "bfloat16", **GPU}
    return plan_recipe(folder, {**SMALL, "num_hidden_layers": 3}, **{**given, **changes})


def plan(recipe: Recipe, ranks: int = 1) -> Plan:
    section = ModelSection(path=str(recipe.distill.teacher), quantization=recipe.distill.quantization or "none")
    teacher = TeacherModel.of(section, read_base(section).config)
    return Planner(read_base(recipe.model).config, Limits(), teacher).plan(recipe, ranks)


def weights(recipe: Recipe) -> int:
    import torch

    section = ModelSection(path=str(recipe.distill.teacher))
    model = meta_model(section, Path(section.path), torch.device("cpu"), full=False, checkpointing=False)
    return sum(p.numel() * p.element_size() for p in model.parameters())


def test_ddp_keeps_all_of_a_teacher_and_other_strategies_a_shard(tmp_path: Path) -> None:
    recipe = distilling(tmp_path)
    size = weights(recipe)
    whole = plan(recipe, 2).ranks[1]
    assert whole.teacher_bytes == size
    for kind in ("fsdp", "zero2"):
        shared = plan(distilling(tmp_path, **{"strategy.kind": kind}), 2)
        assert sum(rank.teacher_bytes for rank in shared.ranks) == pytest.approx(size, rel=0.01)
        assert shared.ranks[0].peak_host_load_bytes >= shared.ranks[0].teacher_bytes + LOAD_BUDGET
    without = Planner(read_base(recipe.model).config, Limits()).plan(recipe, 2)
    assert whole.peak_device_bytes - without.ranks[1].peak_device_bytes == size


@pytest.mark.night
def test_a_quantised_teacher_is_counted_as_a_quantised_student(tmp_path: Path) -> None:
    recipe = distilling(tmp_path, **{"distill.quantization": "nf4"})
    student = small_recipe("nf4", tmp_path / "teacher", tmp_path, **{"model.quantization": "nf4", **GPU})
    section = student.model.model_copy(update={"dtype": "bfloat16"})
    student = student.model_copy(update={"model": section})
    alone = Planner(read_base(section).config, Limits()).plan(student, 1).largest
    assert plan(recipe).largest.teacher_bytes == alone.frozen_bytes + alone.quant_state_bytes < weights(recipe)


@pytest.mark.night
def test_logits_of_the_teacher_are_kept_for_all_targets_or_its_most_likely_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_head_loss, "CHUNK_LOGITS", 16 * SMALL["vocab_size"])
    tokens = {"data.sequence_length": 512, "training.micro_batch": 6}
    full, few = (plan(distilling(tmp_path, **tokens, **{"distill.top_k": k})).largest for k in (None, 4))
    difference = full.activation_bytes - few.activation_bytes
    logits = 6 * 512 * SMALL["vocab_size"] * 2
    assert difference == pytest.approx(logits, rel=0.1)


def test_a_sharded_teacher_is_gathered_and_sent_for_each_micro_batch(tmp_path: Path) -> None:
    recipe = distilling(tmp_path, **{"strategy.kind": "fsdp", "data.sequence_length": 8, "training.micro_batch": 1})
    both = plan(recipe, 2)
    without = Planner(read_base(recipe.model).config, Limits()).plan(recipe, 2)
    assert both.largest.peak_device_bytes > without.largest.peak_device_bytes + both.largest.teacher_bytes
    frozen = TeacherModel.of(section := ModelSection(path=str(recipe.distill.teacher)), read_base(section).config)
    once = recipe.model_copy(
        update={"strategy": recipe.strategy.model_copy(update={"reshard_after_forward": False})}
    )  # a layer is gathered once in each micro-batch, as by a forward alone
    want = sum(FSDP.sent(w, Mesh.of(once, 2), once, 3).inside * n for w, n in frozen.weights.items())
    assert both.traffic.inside - without.traffic.inside == want


def test_the_command_finds_the_teacher(tmp_path: Path) -> None:
    report = make(distilling(tmp_path), None, None, None, None)
    assert report.plan.largest.teacher_bytes == weights(report.recipe)
    assert any("is a second model of" in note for note in report.plan.notes)


def test_a_teacher_whose_outputs_are_stored_is_not_in_memory_while_the_student_learns(tmp_path: Path) -> None:
    recipe = distilling(tmp_path, **{"distill.top_k": 4, "distill.store": True, "resources.workers": 2})
    report = make(recipe, None, None, None, None)
    without = Planner(read_base(recipe.model).config, Limits()).plan(recipe, 2)
    assert report.plan.ranks == without.ranks
    (note,) = (note for note in report.plan.notes if "is a second model of" in note)
    assert f"{weights(recipe) / 2**30:.2f} GiB more on each rank" in note
