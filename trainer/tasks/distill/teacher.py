"""Teachers: the distributions that a student learns, for the targets of a micro-batch.

Legend: T targets of the micro-batch, V tokens that teacher and student have in common, k of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from trainer.errors import InputError
from trainer.tasks.reference import adapter_of
from trainer.tasks.shared_adapter import SharedAdapter

if TYPE_CHECKING:
    from trainer.data import Batch
    from trainer.tasks.distill.head import DistillHead

ADAPTER = "teacher"


class TeacherOutputs(NamedTuple):
    """The teacher's distributions of the targets, in the order of `trainer.tasks.lm_head_loss.targets_of`.

    ``likely`` [T]: the most likely token. ``nll`` [T]: the negative log-likelihood of the target, at temperature 1.
    ``tokens``: the distributions are over the tokens with smaller numbers. Either ``logits`` [T, V], or ``ids`` [T, k],
    the most likely tokens, with their log-probabilities ``logps`` [T, k] at ``distill.temperature``."""

    likely: torch.Tensor
    nll: torch.Tensor
    tokens: int
    logits: torch.Tensor | None = None
    ids: torch.Tensor | None = None
    logps: torch.Tensor | None = None

    def at(self, rows_n: torch.Tensor) -> TeacherOutputs:
        """Returns the outputs of some of the targets."""
        logits, ids, logps = (None if t is None else t[rows_n] for t in (self.logits, self.ids, self.logps))
        return TeacherOutputs(self.likely[rows_n], self.nll[rows_n], self.tokens, logits, ids, logps)

    @classmethod
    def uniform(
        cls, count: int, tokens: int, k: int | None, dtype: torch.dtype, device: torch.device
    ) -> TeacherOutputs:
        """Returns outputs of the right size without a teacher."""
        likely, nll = torch.zeros(count, dtype=torch.int64, device=device), torch.zeros(count, device=device)
        if k is None:
            return cls(likely, nll, tokens, torch.zeros(count, tokens, dtype=dtype, device=device))
        ids = torch.arange(k, device=device).repeat(count, 1)
        logps = torch.full((count, k), 1.0 / tokens, device=device).log_()
        return cls(likely, nll, tokens, ids=ids, logps=logps)


class Teacher(ABC):
    """``identity``: what identifies the teacher, as JSON; the same in every attempt of a run."""

    identity: Mapping[str, Any]

    def attach(self, model: Any, head: DistillHead) -> None:  # noqa: B027 - most teachers do not change the student
        """Prepares the (unwrapped) student, and its head, for this teacher."""

    def owns_parameter(self, name: str) -> bool:
        """Returns True for a parameter that the teacher has added to the student."""
        return False

    def init_parameter(self, name: str) -> torch.Tensor:
        raise NotImplementedError(f"{type(self).__name__} adds no parameters to the student")

    @abstractmethod
    def outputs(self, batch: Batch, module: torch.nn.Module, device: torch.device) -> TeacherOutputs:
        """Returns the outputs for the targets of ``batch``. ``module``: the student, wrapped. Every rank calls it for
        each micro-batch, also for one without targets: it may be a collective."""


class ModelTeacher(Teacher):
    """A second model, complete on this rank's device or sharded over the ranks. Its forward is then a collective."""

    def __init__(self, model: Any, head: DistillHead, identity: Mapping[str, Any]) -> None:
        """``head``: that of ``model``, which computes its outputs."""
        self.model, self._head, self.identity = model.eval(), head, identity

    def attach(self, model: Any, head: DistillHead) -> None:
        self._head.tokens = head.tokens = min(head.tokens, self._head.tokens)

    @torch.no_grad()
    def outputs(self, batch: Batch, module: torch.nn.Module, device: torch.device) -> TeacherOutputs:
        with torch.autocast(device.type, enabled=False):
            return self._head.taught(self.model, batch, device)


class SharedTeacher(Teacher):
    """An adapter on the base model of the student, next to the student's adapter."""

    def __init__(self, adapter: SharedAdapter, identity: Mapping[str, Any]) -> None:
        self.adapter, self.identity = adapter, identity

    def attach(self, model: Any, head: DistillHead) -> None:
        self._model, self._head = model, head
        self.adapter.attach(model)

    def owns_parameter(self, name: str) -> bool:
        return self.adapter.owns_parameter(name)

    def init_parameter(self, name: str) -> torch.Tensor:
        return self.adapter.init_parameter(name)

    @torch.no_grad()
    def outputs(self, batch: Batch, module: torch.nn.Module, device: torch.device) -> TeacherOutputs:
        with evaluating(self._model), adapter_of(self._model, self.adapter.name):
            return self._head.taught(module, batch, device)


def check_same_teacher(place: str, began: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises InputError if the run has ``began`` with another teacher."""
    if began != now:
        raise InputError(
            f"distill.teacher {place} is not the model that this run has learnt from: its files have changed; put them "
            "back, or start a run of another name"
        )


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Switches the unwrapped model to evaluation inside the context."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
