"""Evaluation by generated answers: the model in training answers questions of the evaluation data, and a metric scores
the answers.

Batches of questions are formed by their lengths, whatever the number of ranks; of n ranks, rank r answers batch k if
k % n == r. Rank 0 scores all answers, so that a function of the recipe is called once per evaluation.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from trainer.errors import InputError
from trainer.recipe.generative_metrics import FUNCTION_SCORES, GENERATIVE_METRICS
from trainer.recipe.sections.rollouts.reward import RewardFunctionSection
from trainer.run.events import SampleText, TextsEvent
from trainer.tasks.answers import Scores, final_number, means
from trainer.tasks.rewards.functions import RewardFunctions
from trainer.tasks.sampling import SHOWN_CHARACTERS, max_positions
from trainer.worker.build import Parts
from trainer.worker.hang_detector import SCORING
from trainer.worker.recorder import Recorder
from trainer.worker.texts.generation import Generation
from trainer.worker.texts.questions import Question, QuestionReader
from trainer.worker.texts.sample_texts import PromptSource

log = logging.getLogger(__name__)

SETTING = "generative_eval.metric"
EVALUATION = "evaluation"
AUTO, NUMBER = "auto", "number"
SHOWN = 4
"""Answers of an evaluation that are stored as texts."""
LOG_EVERY_S = 10.0
FUNCTION_S = 1500.0
"""Seconds that a function of the recipe may take: fewer than a hang takes to be found, after which the run would begin
again."""

Phase = Callable[[int, str], None]


class AnswerMetric:
    """Scores answers by a metric of the table, or by a function of the recipe."""

    def __init__(self, metric: str, setting: str = SETTING) -> None:
        """Raises InputError for a function that cannot be loaded."""
        self._by_answer, self._function = None, None
        if metric in GENERATIVE_METRICS:
            self._by_answer = GENERATIVE_METRICS.load(metric)
        else:
            row = RewardFunctionSection(function=metric, timeout_s=FUNCTION_S)
            self._function = RewardFunctions((row,), setting=setting)

    def __call__(self, questions: Sequence[Question], texts: Sequence[str]) -> list[Scores]:
        """Returns the scores of each answer. Raises RewardFailed for a function that fails."""
        if self._by_answer is not None:
            return [self._by_answer(text, q.answers) for q, text in zip(questions, texts, strict=True)]
        assert self._function is not None
        references = [question.answers[0] for question in questions]
        (values,) = self._function([question.prompt for question in questions], texts, references).values()
        return [dict.fromkeys(FUNCTION_SCORES, value) for value in values]

    def close(self) -> None:
        """Ends the process of a function."""
        if self._function is not None:
            self._function.close()


@dataclass(frozen=True)
class AnswerScores:
    """``scores``: means over the answers, by the names in an evaluation's metrics; ``count``: the answers."""

    scores: Scores
    count: int
    seconds: float


class GenerativeEval:
    """Answers the questions in the evaluations that are due. `of` and `evaluate` are collectives.

    ``on_phase(step, phase)`` is called for each token, the same number of times on every rank."""

    def __init__(
        self, parts: Parts, recorder: Recorder, source: PromptSource, questions: Sequence[Question], on_phase: Phase
    ) -> None:
        section = parts.recipe.generative_eval
        self.parts, self.recorder, self.source, self.questions = parts, recorder, source, questions
        self.on_phase, self._step, self._done, self._logged_at = on_phase, 0, 0, 0.0
        self.generation = Generation(parts, section.max_new_tokens, self._on_token)
        self._metric: AnswerMetric | None = None
        parts.world.decide_on_rank0(self._load_metric)
        room = parts.recipe.training.micro_batch * parts.recipe.data.sequence_length
        self._batches = batches([len(q.tokens) for q in questions], section.max_new_tokens, room)

    @classmethod
    def of(cls, parts: Parts, recorder: Recorder, source: PromptSource, on_phase: Phase) -> GenerativeEval | None:
        """Returns None if the recipe asks for no answers. Raises InputError if the evaluation data have no question, or
        the metric cannot score one."""
        if not parts.recipe.generative_eval.count or source.data is None or parts.task.head is None:
            return None
        return cls(parts, recorder, source, parts.world.decide_on_rank0(lambda: _questions(parts, source)), on_phase)

    def _load_metric(self) -> None:
        # Rank 0 keeps it: a function of the recipe may not be sent to other ranks.
        self._metric = AnswerMetric(self.parts.recipe.generative_eval.metric)

    def due(self, step: int, total_steps: int) -> bool:
        """Returns True if the evaluation after ``step`` has answers."""
        every = self.parts.recipe.generative_eval.every
        return self.generation.failure is None and (step == total_steps or every is None or step % every == 0)

    def evaluate(self, step: int) -> AnswerScores | None:
        """Returns the scores; None if the model cannot generate, which is a warning and ends the answers, not the run.

        Raises RewardFailed, on all ranks, for a function of the recipe that fails."""
        began, world = time.monotonic(), self.parts.world
        self._step, self._done, self._logged_at = step, 0, began
        log.info("step %d: answering %d questions", step, len(self.questions))
        mine = self.generation.attempt(self._answers)
        if self.generation.failure is not None:
            if world.is_rank0:
                log.warning("no more answers are generated: %s", self.generation.failure)
            return None
        found = {n: text for part in world.all_gather(mine) for n, text in part.items()}
        texts = [question.answer(found[n]) for n, question in enumerate(self.questions)]
        self.on_phase(step, SCORING)
        scores = world.decide_on_rank0(lambda: self._scored(texts))
        self.on_phase(step, "evaluation")
        made = AnswerScores(means(scores), len(texts), time.monotonic() - began)
        log.info("step %d: %d answers in %.1f s: %s", step, made.count, made.seconds, made.scores)
        shown = zip(self.questions[:SHOWN], texts, scores, strict=False)
        event = TextsEvent(step=step, when=EVALUATION, seconds=made.seconds, texts=tuple(_shown(*one) for one in shown))
        self.recorder.event(event, wait=False)
        return made

    def _scored(self, texts: Sequence[str]) -> list[Scores]:
        assert self._metric is not None
        return self._metric(self.questions, texts)

    def _answers(self) -> dict[int, str]:
        """Returns this rank's texts by the numbers of their questions."""
        world, module = self.parts.world, self.parts.strategy.module
        sampler, found = self.generation.sampler(self._tokenizer), dict[int, str]()
        with self.generation.mode():
            for start in range(0, len(self._batches), world.size):
                at_once = self._batches[start : start + world.size]
                mine = at_once[world.rank] if world.rank < len(at_once) else []
                asked = [self.questions[n] for n in mine]
                tokens, keys = [list(q.tokens) for q in asked], [q.sample_id for q in asked]
                written = sampler.write(module, tokens, keys, world.device)
                found.update(zip(mine, (text.words for text in written), strict=True))
                self._done += sum(map(len, at_once))
        return found

    @cached_property
    def _tokenizer(self) -> Any:
        return self.source.tokenizer()

    def _on_token(self) -> None:
        done, of = self._done, len(self.questions)
        self.on_phase(self._step, f"answering questions, {done} of {of} answered")
        if (now := time.monotonic()) - self._logged_at >= LOG_EVERY_S:
            self._logged_at = now
            log.info("step %d: %d of %d questions answered", self._step, done, of)


def _questions(parts: Parts, source: PromptSource) -> list[Question]:
    recipe, tokenizer = parts.recipe, source.tokenizer()
    section, positions = recipe.generative_eval, max_positions(parts.strategy.model)
    longest = None if positions is None else positions - section.max_new_tokens
    assert source.data is not None
    reader = QuestionReader(source.data, tokenizer, source.cache)
    found = reader.first(section.count, longest, lambda question: True)
    if not found:
        raise InputError(
            f"generative_eval.count is {section.count}, and no sample of the evaluation data has a prompt and a "
            f"complete answer, with room for generative_eval.max_new_tokens {section.max_new_tokens}; raise "
            "data.sequence_length, lower max_new_tokens, or set count to 0"
        )
    if section.metric == NUMBER:
        without = next((q for q in found if final_number(q.answers[0]) is None), None)
        if without is not None:
            raise InputError(
                f"generative_eval.metric is {NUMBER}, and the answer of sample {without.sample_id} has no number: "
                f"{without.answers[0][:SHOWN_CHARACTERS]!r:.100}; use exact_match, or other evaluation data"
            )
    return found


def _shown(question: Question, text: str, scores: Scores) -> SampleText:
    return SampleText(
        sample=question.sample_id,
        prompt=question.prompt[-SHOWN_CHARACTERS:],
        text=text[:SHOWN_CHARACTERS],
        reference=question.answers[0][:SHOWN_CHARACTERS],
        score=next(iter(scores.values())),
    )


def batches(lengths: Sequence[int], more: int, room: int) -> list[list[int]]:
    """Returns the numbers of prompts with these ``lengths``, in batches that fit into ``room`` tokens, padded, with
    ``more`` tokens for each answer; the longest first. A prompt that does not fit is a batch of its own."""
    found: list[list[int]] = []
    for n in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        if found and (lengths[found[-1][0]] + more) * (len(found[-1]) + 1) <= room:
            found[-1].append(n)
        else:
            found.append([n])
    return found
