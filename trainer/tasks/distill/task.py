"""The distillation task: the mean divergence from a teacher's distribution at each target token.

With D one of `divergences`, p_τ and q_τ the softmax of the teacher's and the student's logits divided by the
temperature τ, and y the target, the loss of a step is the mean over its T targets:

    1/T Σ D(p_τ, q_τ) - ce_coef · log q_1(y)

Gradients of the first term shrink as 1/τ² for large τ, so that Hinton et al. 2015 (arXiv:1503.02531, section 2)
multiply it by τ². Agarwal et al. 2023 (arXiv:2306.13649) and trl do not, and neither does this: ``ce_coef`` is the only
weight between both terms.

The teacher's outputs are computed for one micro-batch at a time, before the student's forward, or were stored for all
samples before the first step.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from trainer.parsing import Malformed
from trainer.tasks.base import GenerationContext, LossOutput, Task, ratio
from trainer.tasks.distill.head import DistillHead
from trainer.tasks.distill.stored import StoredTeacher, bytes_of_target, check_top_k, settings_of_outputs, to_store
from trainer.tasks.distill.teacher import Teacher, TeacherOutputs, check_same_teacher
from trainer.tasks.sft import MAX_EXPONENT
from trainer.tasks.source_weights import weighted

if TYPE_CHECKING:
    from trainer.data import Batch


class Untaught(NamedTuple):
    """A micro-batch whose loss is computed with uniform distributions in place of the teacher's."""

    micro_batch: Batch


class Distill(Task):
    outputs_from_model = False
    head: DistillHead
    teacher: Teacher | None

    def attach(self, model: torch.nn.Module, generation: GenerationContext | None = None) -> None:
        self.head = DistillHead(model, self.recipe.distill, packed=self.recipe.data.packing)
        self._vocabulary = self.head.tokens
        if self.teacher is not None:
            self.teacher.attach(model, self.head)
        check_top_k(self.recipe.distill, self.head)

    def owns_parameter(self, name: str) -> bool:
        return self.teacher is not None and self.teacher.owns_parameter(name)

    def init_parameter(self, name: str, shape: torch.Size) -> torch.Tensor:
        assert self.teacher is not None
        return self.teacher.init_parameter(name)

    def output_settings(self) -> dict[str, Any] | None:
        if not self.recipe.stores_outputs:
            return None
        assert self.teacher is not None
        return settings_of_outputs(self.recipe.distill, self._vocabulary, self.teacher.identity)

    def bytes_of_target(self) -> int:
        return bytes_of_target(self.recipe.distill)

    def outputs(self, module: torch.nn.Module, batch: Batch, device: torch.device) -> Mapping[str, Any]:
        assert self.teacher is not None
        return to_store(self.teacher.outputs(batch, module, device), batch)

    def outputs_are_stored(self) -> None:
        """A teacher on the student's base model stays in the student, switched off: its strategy has wrapped it."""
        assert self.teacher is not None
        self.teacher = StoredTeacher(self.teacher.identity)
        self.teacher.attach(None, self.head)
        gc.collect()

    def loss(self, module: torch.nn.Module, batch: Batch | Untaught, device: torch.device) -> LossOutput:
        if isinstance(batch, Untaught):
            micro_batch, dtype = batch.micro_batch, getattr(torch, self.recipe.model.dtype)
            count = int(micro_batch.targets.sum())
            teacher = TeacherOutputs.uniform(count, self.head.tokens, self.head.k, dtype, device)
        else:
            assert self.teacher is not None, "the teacher is set before the first loss"
            micro_batch, teacher = batch, self.teacher.outputs(batch, module, device)
        found = self.head.compared(module, micro_batch, teacher, device)
        sums = {"nll": found.nll, "teacher_nll": teacher.nll, "agreement": found.agrees}
        losses = weighted(found.losses, micro_batch.target_sources, self.recipe, training=module.training)
        return LossOutput(losses.sum(), {name: values.detach().sum() for name, values in sums.items()})

    def dummy_batch(self, batch: Batch) -> Untaught:
        return Untaught(batch)

    def metrics(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        def perplexity(name: str) -> float:
            return math.exp(min(ratio(sums, name), MAX_EXPONENT))

        return {
            "loss": ratio(sums, "loss"),
            "perplexity": perplexity("nll"),
            "teacher_perplexity": perplexity("teacher_nll"),
            "agreement": ratio(sums, "agreement"),
        }

    def models(self) -> dict[str, Any]:
        return {} if self.teacher is None else {"teacher": dict(self.teacher.identity)}

    def state(self) -> dict[str, Any]:
        return self.models()

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Raises InputError if the run has begun with another teacher."""
        began = state.get("teacher")
        if set(state) != {"teacher"} or not isinstance(began, dict):
            raise Malformed("the state of task distill names no teacher")
        if self.teacher is not None:
            check_same_teacher(str(self.recipe.distill.teacher), began, self.models()["teacher"])
