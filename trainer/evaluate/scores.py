"""Scores of an artifact on a recipe's evaluation data: the metrics of its task, and the scores of its answers to
questions."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from trainer.artifacts import Artifact, ArtifactRef, Generator, find, load
from trainer.artifacts.locate import DEFAULT
from trainer.artifacts.reward_model import reward_model
from trainer.artifacts.start import fetch_start
from trainer.artifacts.teacher import teacher_of
from trainer.data import Batch, PreparationSpec, PreparedDataset, eval_batches, freeze, open_prepared, prepare_dataset
from trainer.data.formats.dialogue import dialogue_of
from trainer.data.outputs import folder_of, open_outputs
from trainer.data.prepare.label_set import label_set
from trainer.data.run_data import eval_spec
from trainer.errors import InputError, NonFiniteLoss, UsageError
from trainer.model import fetch_model, load_tokenizer
from trainer.model.placement import Placement, placement_for
from trainer.recipe import Recipe
from trainer.recipe.tasks import TASKS
from trainer.recipe.trust import Trust
from trainer.run import layout
from trainer.storage import open_storage
from trainer.tasks import GenerationContext, Task, Totals, make_task
from trainer.tasks.answers import means
from trainer.worker.loop import evaluated_sums
from trainer.worker.start.stored_outputs import OutputsMaker, Ranks, settings_of
from trainer.worker.start.stored_teacher import find_stored
from trainer.worker.texts.generative_eval import AUTO, AnswerMetric
from trainer.worker.texts.questions import Question, QuestionReader

ANSWER_TOKENS, SOLUTION_TOKENS = 32, 512
"""Limits of new tokens for an answer in one line (format ``qa``), and for others."""

GENERATED_AT_ONCE = 16

Line = Callable[[Mapping[str, Any]], None]
"""Takes the result for one example."""
Answered = Callable[[int, int], None]
"""Takes the number of questions answered so far, and the number of all questions."""


def evaluate(
    recipe: Recipe,
    address: ArtifactRef,
    *,
    limit: int | None = None,
    line: Line | None = None,
    metric: str | None = None,
    max_new_tokens: int | None = None,
    say: Callable[[str], None] = lambda phase: None,
    answered: Answered = lambda done, of: None,
    limits: Mapping[int | str, int] | None = None,
    trust: bool = False,
) -> dict[str, Any]:
    """Returns the metrics by name. ``limit``: use only so many examples, from the first. ``line``: called with the
    result for each example. ``metric``: scores the answers to all prompts of the data, as ``generative_eval.metric``
    does; None scores questions of format ``qa`` and solutions of GSM8K. ``answered``: called with the number of
    answered questions. ``limits``: bytes per device for the weights, instead of the free memory. ``trust``: allows code
    that comes with the evaluated artifact; for code of the recipe's own base model, the recipe's setting counts.

    Raises InputError when there is no artifact or no evaluation data, or when they do not fit each other."""
    address.check()
    if len(address.adapters) > 1:
        raise UsageError("one adapter is evaluated at a time: name a single --adapter")
    if metric is not None and TASKS[recipe.task].has_head:
        raise UsageError(
            f"--metric scores generated texts, and the model of task {recipe.task} writes none; leave it out"
        )
    if not recipe.data.evaluates:
        raise InputError("data.eval of the recipe has no source; add one with path: and format:, or set eval_fraction")
    with tempfile.TemporaryDirectory(prefix="muster-evaluate-") as folder:
        say("fetching what is evaluated")
        subject = find(address, Path(folder, "subject"), recipe, trust=Trust(trust, recipe.model))
        files = fetch_model(subject.section, weights=False)
        with placement_for(subject.section, files.folder, limits) as placement:
            options = _Options(limit, metric, max_new_tokens, line, say, answered)
            return _Evaluation(recipe, subject, placement, options).run(Path(folder, "data"))


@dataclass(frozen=True)
class _Options:
    limit: int | None
    metric: str | None
    max_new_tokens: int | None
    line: Line | None
    say: Callable[[str], None]
    answered: Answered


class _Evaluation:
    def __init__(self, recipe: Recipe, subject: Artifact, placement: Placement, options: _Options) -> None:
        self.recipe, self.subject, self.placement, self.options = recipe, subject, placement, options
        self.device, self.limit, self.line, self.say = placement.device, options.limit, options.line, options.say
        self._metric = AnswerMetric(options.metric or AUTO, "--metric")

    def run(self, folder: Path) -> dict[str, Any]:
        recipe = self.recipe
        labels: tuple[str, ...] = ()
        if recipe.task == "classification":
            labels = self.subject.labels or label_set(freeze(recipe.data.train))
        task = make_task(recipe, labels)
        if task.labels:
            self.subject.check_labels(task.labels)
        tokenizer = self._tokenizer()
        self.say("preparing the evaluation data")
        prepared = prepared_for(recipe, eval_spec(recipe, tokenizer, labels), tokenizer, folder)
        stored = find_stored(recipe, [prepared], self.subject.section)
        if stored is not None:
            prepared = replace(prepared, outputs=open_outputs(folder_of(prepared.storage, stored.settings)))
        prepared = self._with_reference(prepared, folder)
        self.say("loading the model")
        model = load(self.subject, self.placement, task.labels, seed=recipe.seed)
        task.teacher = stored.teacher if stored else teacher_of(recipe, self.device)
        reward = reward_model(recipe, self.device) if task.generates else None
        dialogue = dialogue_of(recipe, tokenizer, None)
        task.attach(model, GenerationContext(tokenizer, reward=reward, dialogue=dialogue) if task.generates else None)
        questions = self._questions(prepared, tokenizer)
        self.say(f"evaluating on {self.device}")
        scores = self._losses(model, task, prepared, None if questions else self.line)
        if questions:
            scores |= self._answers(model, tokenizer, questions)
        return {"task": recipe.task, **scores}

    def _with_reference(self, prepared: PreparedDataset, folder: Path) -> PreparedDataset:
        """Returns the data with the outputs that the task needs of the model as it was before training: those that the
        run has stored, or computed here. Nothing is written to the storage."""
        if not (self.recipe.stores_outputs and TASKS[self.recipe.task].has_reference):
            return prepared
        recipe, task, adapters, begun = self.recipe, make_task(self.recipe), {}, None
        if recipe.adapter.begins_from:
            adapters = {DEFAULT: folder / "start"}
            begun = fetch_start(recipe.adapter.begins_from, adapters[DEFAULT], recipe.model)
        settings = settings_of(recipe, task, begun.sha256 if begun else None)
        assert settings is not None, "the task stores what it needs of its reference"
        stored = open_outputs(folder_of(prepared.storage, settings))
        if stored is not None:
            return replace(prepared, outputs=stored)
        self.say("computing the reference")
        model = load(Artifact(recipe.model, recipe.task, recipe.adapter.kind, adapters), self.placement, None)
        task.attach(model)
        size, ranks = self.recipe.training.micro_batch, Ranks()
        maker = OutputsMaker(task, model, self.device, size, ranks, self._autocast, lambda: None)
        return maker.with_outputs(prepared, settings, "evaluation data", open_storage(str(folder)))

    def _tokenizer(self) -> Any:
        """Returns the tokenizer of the recipe's base model; for a full model, the model's own if it has one."""
        section = self.recipe.model if self.subject.adapters else self.subject.section
        folder = fetch_model(section, weights=False).folder
        # A checkpoint of a fully tuned model has no tokenizer.
        if not (folder / "tokenizer_config.json").is_file() and not self.subject.adapters:
            section = self.recipe.model
            folder = fetch_model(section, weights=False).folder
        return load_tokenizer(folder, trust_remote_code=section.trust_remote_code)

    @torch.no_grad()
    def _losses(self, model: Any, task: Task, prepared: PreparedDataset, line: Line | None) -> dict[str, Any]:
        """Returns the task's metrics and the number of samples. With a ``line``, each sample is a batch of its own."""
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

    def _questions(self, prepared: PreparedDataset, tokenizer: Any) -> list[Question]:
        metric = self.options.metric
        if metric is None and self.recipe.task != "sft":
            return []
        found = QuestionReader(prepared, tokenizer).first(
            self.limit, None, lambda question: metric is not None or question.line or question.numeric
        )
        if metric is not None and not found:
            raise InputError("--metric scores answers, and no sample of the evaluation data has a prompt and an answer")
        return found

    def _answers(self, model: Any, tokenizer: Any, questions: Sequence[Question]) -> dict[str, Any]:
        writer, done = Generator(model, tokenizer, self.device, GENERATED_AT_ONCE), 0

        def answered(more: int) -> None:
            nonlocal done
            done += more
            self.options.answered(done, len(questions))

        answers: dict[int, str] = {}
        kinds = {(q.numeric, q.line): q for q in questions}
        for kind, question in kinds.items():
            mine = {n: q.tokens for n, q in enumerate(questions) if (q.numeric, q.line) == kind}
            one_line = question.line and not question.numeric
            tokens = self.options.max_new_tokens or (ANSWER_TOKENS if one_line else SOLUTION_TOKENS)
            with self._autocast():
                texts = writer.answers(list(mine.values()), tokens, question.ended, answered)
            answers.update(zip(mine, texts, strict=True))
        found = [question.answer(answers[n]) for n, question in enumerate(questions)]
        scored = self._metric(questions, found)
        if self.line is not None:
            for question, text, scores in zip(questions, found, scored, strict=True):
                self.line({"prediction": text, "answers": list(question.answers), **scores})
        return means(scored)

    def _autocast(self) -> Any:
        dtype = getattr(torch, self.recipe.model.dtype)
        return nullcontext() if dtype == torch.float32 else torch.autocast(self.device.type, dtype)


def prepared_for(recipe: Recipe, spec: PreparationSpec, tokenizer: Any, folder: Path) -> PreparedDataset:
    """Returns the evaluation data that a run has prepared, or prepares them in ``folder``. Nothing is written to the
    storage."""
    there = open_prepared(open_storage(recipe.storage).child(layout.PREPARED), spec.fingerprint)
    return there or prepare_dataset(spec, tokenizer, open_storage(str(folder)))


def example(task: Task, batch: Batch, sums: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Returns the result for a batch of one sample."""
    sample = {"sample": batch.sample_ids[0]}
    on_host = {name: value.detach().double().cpu() for name, value in sums.items()}
    if "predicted" in sums:
        labels = task.labels or ()
        actual, predicted = (labels[int(on_host[name].argmax())] for name in ("actual", "predicted"))
        return {**sample, "label": actual, "predicted": predicted, "loss": float(on_host["loss"])}
    return {**sample, **task.metrics(on_host)}
