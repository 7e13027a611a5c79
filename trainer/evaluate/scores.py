"""The scores of a subject on a recipe's evaluation data: those of its task, and of what it answers to questions."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.artifacts import Artifact, ArtifactRef, Generator, find, load
from trainer.artifacts.chat import first_line, one_line
from trainer.artifacts.reward_model import reward_model
from trainer.data import Batch, PreparationSpec, PreparedDataset, eval_batches, freeze, open_prepared, prepare_dataset
from trainer.data.prepare.label_set import label_set
from trainer.data.run_data import eval_spec
from trainer.errors import InputError, NonFiniteLoss, UsageError
from trainer.evaluate.questions import Question, questions_of
from trainer.model import fetch_model, load_tokenizer
from trainer.model.placement import Placement, placement_for
from trainer.recipe import Recipe
from trainer.recipe.trust import Trust
from trainer.run import layout
from trainer.storage import open_storage
from trainer.tasks import GenerationContext, Task, Totals, make_task
from trainer.worker.loop import evaluated_sums

ANSWER_TOKENS, SOLUTION_TOKENS = 32, 512
"""New tokens of an answer of a line, and of a solution in steps."""

GENERATED_AT_ONCE = 16

Line = Callable[[Mapping[str, Any]], None]
"""Takes what is to be told of one example."""
Answered = Callable[[int, int], None]
"""Takes how many questions have been answered, and of how many."""


def evaluate(
    recipe: Recipe,
    address: ArtifactRef,
    *,
    limit: int | None = None,
    line: Line | None = None,
    max_new_tokens: int | None = None,
    say: Callable[[str], None] = lambda phase: None,
    answered: Answered = lambda done, of: None,
    limits: Mapping[int | str, int] | None = None,
    trust: bool = False,
) -> dict[str, Any]:
    """The metrics by name. ``limit`` takes the first so many examples; ``line`` is told of each, ``answered`` how many
    questions have been. ``limits``: bytes by device for the weights, in the place of what is free. ``trust``: whether
    code may run that comes with what is evaluated; that of the recipe's own base is the recipe's to trust.

    Raises InputError when there is nothing to evaluate, on nothing, or when the two do not go together."""
    address.check()
    if len(address.adapters) > 1:
        raise UsageError("one adapter is evaluated at a time: name a single --adapter")
    if not recipe.data.eval:
        raise InputError("data.eval of the recipe has no source; add one with path: and format:")
    with tempfile.TemporaryDirectory(prefix="muster-evaluate-") as folder:
        say("fetching what is evaluated")
        subject = find(address, Path(folder, "subject"), recipe, trust=Trust(trust, recipe.model))
        files = fetch_model(subject.section, weights=False)
        with placement_for(subject.section, files.folder, limits) as placement:
            asked = _Asked(limit, max_new_tokens, line, say, answered)
            return _Evaluation(recipe, subject, placement, asked).run(Path(folder, "data"))


@dataclass(frozen=True)
class _Asked:
    limit: int | None
    max_new_tokens: int | None
    line: Line | None
    say: Callable[[str], None]
    answered: Answered


class _Evaluation:
    def __init__(self, recipe: Recipe, subject: Artifact, placement: Placement, asked: _Asked) -> None:
        self.recipe, self.subject, self.placement, self.asked = recipe, subject, placement, asked
        self.device, self.limit, self.line, self.say = placement.device, asked.limit, asked.line, asked.say

    def run(self, folder: Path) -> dict[str, Any]:
        recipe = self.recipe
        labels = self._labels()
        task = make_task(recipe, labels)
        if task.labels:
            self.subject.check_labels(task.labels)
        tokenizer = self._tokenizer()
        self.say("preparing the evaluation data")
        prepared = prepared_for(recipe, eval_spec(recipe, tokenizer, labels), tokenizer, folder)
        self.say("loading the model")
        model = load(self.subject, self.placement, task.labels, seed=recipe.seed)
        reward = reward_model(recipe, self.device) if task.generates else None
        task.attach(model, GenerationContext(tokenizer, reward=reward) if task.generates else None)
        questions = questions_of(prepared.spec.sources, self.limit) if recipe.task == "sft" else []
        self.say(f"evaluating on {self.device}")
        scores = self._losses(model, task, prepared, None if questions else self.line)
        if questions:
            scores |= self._answers(model, tokenizer, questions)
        return {"task": recipe.task, **scores}

    def _tokenizer(self) -> Any:
        """The one that the run was trained with; of a whole model, which a checkpoint has without, its own first."""
        section = self.recipe.model if self.subject.adapters else self.subject.section
        folder = fetch_model(section, weights=False).folder
        if not (folder / "tokenizer_config.json").is_file() and not self.subject.adapters:
            section = self.recipe.model
            folder = fetch_model(section, weights=False).folder
        return load_tokenizer(folder, trust_remote_code=section.trust_remote_code)

    def _labels(self) -> tuple[str, ...]:
        """Of a classifier: as its files name its outputs, or else those of the recipe's training data."""
        if self.recipe.task != "classification":
            return ()
        return self.subject.labels or label_set(freeze(self.recipe.data.train))

    @torch.no_grad()
    def _losses(self, model: Any, task: Task, prepared: PreparedDataset, line: Line | None) -> dict[str, Any]:
        """With a ``line``, each sample is measured by itself."""
        singly = line is not None or self.limit is not None
        size = 1 if line is not None else self.recipe.training.micro_batch
        totals, samples = Totals(), 0
        for batch in eval_batches(prepared, size, 0, 1, singly=singly, limit=self.limit):
            with self._autocast():
                sums = evaluated_sums(task, model, batch, self.device)
            totals.add(sums)
            samples += batch.samples
            if line is not None:
                line(example(task, batch, sums))
        found = task.metrics(totals.named(totals.numbers()))
        if not all(map(math.isfinite, found.values())):
            raise NonFiniteLoss(f"the evaluation gives {found}; compute in float32 or bfloat16 (model.dtype)")
        return {**found, "samples": samples}

    def _answers(self, model: Any, tokenizer: Any, questions: Sequence[Question]) -> dict[str, Any]:
        writer, done = Generator(model, tokenizer, self.device, GENERATED_AT_ONCE), 0

        def answered(more: int) -> None:
            nonlocal done
            done += more
            self.asked.answered(done, len(questions))

        said: dict[int, str] = {}
        for numeric in (False, True):
            mine = {n: q.prompt for n, q in enumerate(questions) if q.numeric is numeric}
            tokens = self.asked.max_new_tokens or (SOLUTION_TOKENS if numeric else ANSWER_TOKENS)
            with self._autocast():
                texts = writer.answers(list(mine.values()), tokens, solved if numeric else one_line, answered)
            said.update(zip(mine, map(solution if numeric else first_line, texts), strict=True))
        scored = [(question, said[n], question.scores(said[n])) for n, question in enumerate(questions)]
        if self.line is not None:
            for question, text, scores in scored:
                self.line({"prediction": text, "answers": list(question.answers), **scores})
        return means([scores for _, _, scores in scored])

    def _autocast(self) -> Any:
        dtype = getattr(torch, self.recipe.model.dtype)
        return nullcontext() if dtype == torch.float32 else torch.autocast(self.device.type, dtype)


def prepared_for(recipe: Recipe, spec: PreparationSpec, tokenizer: Any, folder: Path) -> PreparedDataset:
    """As a run has prepared them, or else prepared here, in ``folder``: nothing is written to the storage."""
    there = open_prepared(open_storage(recipe.storage).child(layout.PREPARED), spec.fingerprint)
    return there or prepare_dataset(spec, tokenizer, open_storage(str(folder)))


def example(task: Task, batch: Batch, sums: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """What is told of a batch of one sample."""
    said = {"sample": batch.sample_ids[0]}
    on_host = {name: value.detach().double().cpu() for name, value in sums.items()}
    if "predicted" in sums:
        labels = task.labels or ()
        actual, predicted = (labels[int(on_host[name].argmax())] for name in ("actual", "predicted"))
        return {**said, "label": actual, "predicted": predicted, "loss": float(on_host["loss"])}
    return {**said, **task.metrics(on_host)}


def means(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of each score, over the examples that have it."""
    names = dict.fromkeys(name for one in scores for name in one)
    values = {name: [one[name] for one in scores if name in one] for name in names}
    return {name: sum(some) / len(some) for name, some in values.items()}


def solution(text: str) -> str:
    """Without the questions that a base model goes on to ask."""
    return text.split("\nQuestion:")[0].strip()


def solved(text: str) -> bool:
    return "\nQuestion:" in text
