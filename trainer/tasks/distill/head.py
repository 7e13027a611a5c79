"""The output head of a teacher or a student: distributions at targets, compared chunk by chunk.

The logits of a teacher are kept at the targets only, or their k most likely tokens. Those of a student exist for one
chunk at a time: its divergence from the teacher is computed inside the head's forward, as the negative log-likelihood
is (`trainer.tasks.lm_head_loss`).

Legend: T targets, n of them in a chunk, D hidden size, V tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.functional import cross_entropy

from trainer.tasks.distill.divergences import at_tokens, divergence, with_rest
from trainer.tasks.distill.teacher import TeacherOutputs
from trainer.tasks.frozen_lm_head_loss import frozen_losses
from trainer.tasks.inputs import to_device
from trainer.tasks.lm_head_loss import TargetHead, in_chunks, rows_of_chunk, targets_of

if TYPE_CHECKING:
    from trainer.data import Batch
    from trainer.recipe.sections.tasks import DistillSection

LogitsOf = Callable[[slice], torch.Tensor]
"""Returns the logits [n, V] of a chunk of the targets."""


class Compared(NamedTuple):
    """For each target [T]: ``losses``, with a gradient; ``nll``, the negative log-likelihood under the student;
    ``agrees``, 1 where the most likely token is the teacher's, else 0."""

    losses: torch.Tensor
    nll: torch.Tensor
    agrees: torch.Tensor


class DistillHead(TargetHead):
    """``tokens``: distributions are over the tokens with smaller numbers."""

    def __init__(self, model: Any, section: DistillSection, *, packed: bool) -> None:
        super().__init__(model, packed=packed)
        self.tokens = self._vocabulary
        self._section, self._divergence = section, divergence(section.loss, section.beta)
        self._teacher: TeacherOutputs | None = None
        self._teaches = False
        self._taught: TeacherOutputs | None = None

    @property
    def k(self) -> int | None:
        """The number of the teacher's tokens that are compared one by one; None for all."""
        k = self._section.top_k
        return None if k is None or k >= self.tokens else k

    def taught(self, module: torch.nn.Module, batch: Batch, device: torch.device) -> TeacherOutputs:
        """Returns the outputs of this head's model as a teacher, without a gradient."""
        self._teaches = True
        try:
            output, labels_T = self._at_targets(module, batch, device)
        finally:
            self._teaches = False
        if not self.plain:
            taught = self._outputs(lambda chunk: output[0, chunk], labels_T)
            return taught if self.k else taught._replace(logits=output[0, :, : self.tokens])
        self._compare(output)
        made, self._taught = self._taught, None
        assert made is not None, "the model's forward does not call its output head"
        return made

    def compared(
        self, module: torch.nn.Module, batch: Batch, teacher: TeacherOutputs, device: torch.device
    ) -> Compared:
        """Returns the losses of this head's model as a student."""
        self._teacher = teacher
        try:
            output, labels_T = self._at_targets(module, batch, device)
        finally:
            self._teacher = None
        if self.plain:
            self._compare(output)
            return Compared(*output[0].unbind(-1))
        of = self._comparison(labels_T, teacher, lambda logits_nV: logits_nV)
        return Compared(*in_chunks(of, output[0], _places(labels_T), self._vocabulary).unbind(-1))

    def _at_targets(
        self, module: torch.nn.Module, batch: Batch, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the model's ``logits`` at the targets, and the targets."""
        at, labels = (to_device(array, device) for array in targets_of(batch))
        with self.select(at, labels):
            return module(**self.inputs(batch.input_ids, batch.position_ids, device)).logits, labels

    def _of_targets(self, hidden_TD: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
        if self._teaches:
            self._taught = self._kept(hidden_TD, labels_T)
            return self._taught.nll[:, None]
        if self._teacher is None:
            return super()._of_targets(hidden_TD, labels_T)
        of, places_T = self._comparison(labels_T, self._teacher, self._project), _places(labels_T)
        if self._is_frozen(hidden_TD):
            rows = rows_of_chunk(self._vocabulary)
            return frozen_losses(of, hidden_TD, places_T, rows, len(Compared._fields))
        return in_chunks(of, hidden_TD, places_T, self._vocabulary)

    def _kept(self, hidden_TD: torch.Tensor, labels_T: torch.Tensor) -> TeacherOutputs:
        """Returns the outputs of a teacher. Without ``k``, one tensor keeps the logits, which are copied to it."""
        kept: list[torch.Tensor] = []

        def logits_of(chunk: slice) -> torch.Tensor:
            made_nV = self._project(hidden_TD[chunk])
            if self.k is None:
                if not kept:
                    kept.append(made_nV.new_empty(len(labels_T), self.tokens))
                kept[0][chunk] = made_nV[:, : self.tokens]
            return made_nV

        taught = self._outputs(logits_of, labels_T)
        return taught._replace(logits=kept[0]) if kept else taught

    def _outputs(self, logits_of: LogitsOf, labels_T: torch.Tensor) -> TeacherOutputs:
        """Returns the outputs of a teacher without ``logits``."""
        rows, total = rows_of_chunk(self._vocabulary), len(labels_T)
        chunks = [slice(start, start + rows) for start in range(0, max(1, total), rows)]
        parts = [self._chunk_outputs(logits_of(chunk).float(), labels_T[chunk]) for chunk in chunks]
        likely, nll, *most_likely = (torch.cat(parts_of) for parts_of in zip(*parts, strict=True))
        ids, logps = most_likely or (None, None)
        return TeacherOutputs(likely, nll, self.tokens, ids=ids, logps=logps)

    def _chunk_outputs(self, logits_nV: torch.Tensor, labels_n: torch.Tensor) -> tuple[torch.Tensor, ...]:
        nll, shared_nV = cross_entropy(logits_nV, labels_n, reduction="none"), logits_nV[:, : self.tokens]
        if self.k is None:
            return shared_nV.argmax(-1), nll
        logps, ids = (shared_nV / self._section.temperature).log_softmax(-1).topk(self.k, -1)
        return ids[:, 0], nll, ids, logps

    def _comparison(
        self, labels_T: torch.Tensor, teacher: TeacherOutputs, project: Callable[[torch.Tensor], torch.Tensor]
    ) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """Returns a function that gives the columns of `Compared` [n, 3] for inputs of ``project`` and their places
        among the targets."""

        def of(rows_nX: torch.Tensor, places_n: torch.Tensor) -> torch.Tensor:
            return self._compare_chunk(project(rows_nX).float(), labels_T[places_n], teacher.at(places_n))

        return of

    def _compare_chunk(self, logits_nV: torch.Tensor, labels_n: torch.Tensor, teacher: TeacherOutputs) -> torch.Tensor:
        section, shared_nV = self._section, logits_nV[:, : teacher.tokens]
        scaled_nV = shared_nV / section.temperature
        if teacher.logits is not None:
            log_p = (teacher.logits.float() / section.temperature).log_softmax(-1)
            log_q = scaled_nV.log_softmax(-1)
        else:
            assert teacher.ids is not None
            assert teacher.logps is not None
            log_p, log_q = with_rest(teacher.logps), at_tokens(scaled_nV, teacher.ids)
        losses = self._divergence(log_p, log_q)
        with torch.set_grad_enabled(torch.is_grad_enabled() and section.ce_coef > 0):
            nll = cross_entropy(logits_nV, labels_n, reduction="none")
        if section.ce_coef:
            losses = losses + section.ce_coef * nll
        agrees = (shared_nV.detach().argmax(-1) == teacher.likely).float()
        return torch.stack([losses, nll.detach(), agrees], -1)


def _places(labels_T: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(labels_T), device=labels_T.device)
