"""The settings that belong to a single task. Those of preferences are in ``preference``, those of PPO in ``ppo``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from trainer.recipe.base import Conflict, Location, Section


class SFTSection(Section):
    """Settings of `task: sft`."""

    neftune_alpha: float | None = Field(default=None, gt=0.0)
    """NEFTune: noise on the input embeddings of training, drawn evenly from (-1, 1) times
    neftune_alpha / sqrt(tokens of the sample · hidden size). The paper has 5, 10 and 15; null adds none. See
    [tasks.md](tasks.md#sft)."""

    label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of each target that is given evenly to all tokens of the vocabulary in the loss of training. Evaluations
    are without it."""


class ClassificationSection(Section):
    """Settings of `task: classification`."""

    class_weights: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Weight of a sample's loss by its label, 1 for labels that are not named: `{spam: 4}` compensates for rare spam.
    The loss is still divided by the number of samples, so larger weights also make larger steps."""

    average: Literal["macro", "micro"] = "macro"
    """How F1, precision and recall of the labels are averaged: `macro` is their unweighted mean, in which a rare label
    counts as much as a frequent one; `micro` counts over all samples, which for one label per sample is accuracy."""


class DistillSection(Section):
    """Settings of `task: distill`."""

    teacher: Location | None = Field(default=None, examples=["s3://runs/my-teacher"])
    """The model to learn from, with the student's tokenizer: a run, the folder of an adapter, or any causal language
    model (folder, URL or Hub id). A LoRA adapter whose base model is that of the run, with the same types, shares that
    base model with the student's; any other teacher is a second model, in the type of its files or of its run, which
    sharded strategies shard."""

    quantization: Literal["none", "nf4"] | None = None
    """Type of the linear weights of the teacher; null takes that of the teacher's run, and `none` for other models."""

    loss: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """The divergence between both distributions of a target token: `forward_kl` is KL(teacher, student), which covers
    everything that the teacher would write; `reverse_kl` is KL(student, teacher), which keeps to what the teacher
    prefers; `jsd` is the generalised Jensen-Shannon divergence between them (arXiv:2306.13649)."""

    beta: float = Field(default=0.5, gt=0.0, lt=1.0)
    """Weight of the teacher in the mixture of `jsd`. Near 0 its gradient is that of `forward_kl`, near 1 that of
    `reverse_kl`, times beta or 1 - beta."""

    temperature: float = Field(default=1.0, gt=0.0)
    """The logits of both models are divided by it before the divergence."""

    top_k: int | None = Field(default=None, ge=1)
    """Number of the teacher's most likely tokens that are compared one by one; all other tokens together count as one
    outcome. null compares all tokens."""

    store: bool = False
    """Compute the `top_k` most likely tokens once for all samples, before the first step, and store them with the
    prepared data: 8 · top_k + 4 bytes for each target. The teacher is then not in memory while the student learns, and
    later attempts, and other students with the same data, teacher, `top_k` and `temperature`, do not load it."""

    ce_coef: float = Field(default=0.0, ge=0.0)
    """Weight of the negative log-likelihood of the targets, which is added to the divergence."""

    def conflicts(self) -> Iterator[Conflict]:
        if self.loss != "jsd" and self.beta != type(self).model_fields["beta"].default:
            yield Conflict((("beta",), ("loss",)), f"has no effect with loss {self.loss}; leave it out, or use jsd")
        if self.store and self.top_k is None:
            yield Conflict((("store",), ("top_k",)), "stores the top_k most likely tokens; set distill.top_k")
