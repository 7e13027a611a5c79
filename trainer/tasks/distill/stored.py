"""A teacher's outputs that were computed before the first step, and come with the micro-batches
(`trainer.data.outputs`).

For each target the k most likely tokens (int32), their log-probabilities and the negative log-likelihood (float32) are
stored: 8 k + 4 bytes. Log-probabilities in 16 bits would be off by 1e-3 and more, and change the losses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from trainer.errors import InputError
from trainer.tasks.distill.teacher import Teacher, TeacherOutputs
from trainer.tasks.inputs import to_device

if TYPE_CHECKING:
    from trainer.data import Batch
    from trainer.recipe.sections.tasks import DistillSection
    from trainer.tasks.distill.head import DistillHead

IDS, LOGPS, NLL, TOKENS = "ids", "logps", "nll", "tokens"


def settings_of_outputs(section: DistillSection, vocabulary: int, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Returns everything besides the data that decides the outputs. ``vocabulary``: the number of rows of the student's
    output head, which bounds the tokens that both models have."""
    return {
        "top_k": section.top_k,
        "temperature": section.temperature,
        "vocabulary": vocabulary,
        "teacher": dict(identity),
    }


def bytes_of_target(section: DistillSection) -> int:
    return 8 * section.top_k + 4 if section.store and section.top_k else 0


def to_store(taught: TeacherOutputs, batch: Batch) -> dict[str, list[npt.NDArray[Any]]]:
    """Returns the outputs of each sample. Each row of ``batch`` is one sample."""
    assert taught.ids is not None
    assert taught.logps is not None
    ends = np.cumsum(batch.targets.sum(1))[:-1]
    of_targets = {IDS: taught.ids.int(), LOGPS: taught.logps.float(), NLL: taught.nll.float()}
    found = {name: np.split(values.cpu().numpy(), ends) for name, values in of_targets.items()}
    return {**found, TOKENS: [np.array([taught.tokens], np.int32)] * len(batch.targets)}


class StoredTeacher(Teacher):
    """A teacher whose outputs are stored for all samples. It is not in memory."""

    def __init__(self, identity: Mapping[str, Any]) -> None:
        self.identity = identity

    def attach(self, model: Any, head: DistillHead) -> None:
        self._head = head

    def outputs(self, batch: Batch, module: torch.nn.Module, device: torch.device) -> TeacherOutputs:
        head, stored = self._head, batch.outputs
        if not batch.samples:
            return TeacherOutputs.uniform(0, head.tokens, head.k, torch.float32, device)
        ids, logps, nll = (to_device(stored[name], device) for name in (IDS, LOGPS, NLL))
        return TeacherOutputs(ids[:, 0].long(), nll, int(stored[TOKENS][0]), ids=ids.long(), logps=logps)


def check_top_k(section: DistillSection, head: DistillHead) -> None:
    """Raises InputError if outputs that are stored would be all tokens."""
    if section.store and head.k is None:
        raise InputError(
            f"distill.store keeps the distill.top_k most likely tokens, and {section.top_k} are all {head.tokens} "
            "tokens of the vocabulary; lower top_k, or set distill.store to false"
        )
