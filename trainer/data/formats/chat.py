"""A conversation rendered by a chat template, as samples with targets on the assistant's turns.

For the assistant's turn i, two texts are rendered: ``opened``, the turns before i with a generation prompt, which is
what a model reads at inference time, and ``closed``, the turns up to and including i. What ``closed`` has more is what
the model is to generate. Turns share a sample as long as the text of one begins the text of the next. Where a template
rewrites earlier turns (it drops their reasoning, for example), a new sample begins, with targets on the new turn only.
So every turn is trained behind the text that stands before it at inference time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, NamedTuple

import numpy as np

from trainer.chat_templates.dialect import Dialect, dialect_of, thought_and_answer
from trainer.chat_templates.rendering import Unrendered, at_date, render
from trainer.chat_templates.template import template_of
from trainer.chat_templates.turn import Turn
from trainer.data.formats.columns import encodable
from trainer.data.formats.kept import LeftOut, left_out
from trainer.data.formats.tokens import Ends, Interval, MarkedTokens, Marks, Tokenised, tokenise
from trainer.data.sample import RowError, Sample
from trainer.data.spec import FrozenSource, PreparationSpec
from trainer.errors import InputError
from trainer.recipe.formats import CHAT_TEMPLATES

Tools = list[Any] | None

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TAG_AT_END = re.compile(r"<[^<>\s]+>\s*\Z")

NO_STOP = (
    "an assistant's turn ends without a token that stops generation (of the tokenizer or of generation_config.json): a "
    "model trained on it goes on writing; the stop string {after!r} ends its answers in muster's own commands"
)
OPENED = (
    "the generation prompt ends in {tail!r}, which the template does not write before an answer that is trained on; "
    "the targets begin where the two differ"
)
NO_TOOLS = "the chat template does not write the tools of a row"
MISSING = (
    "a conversation needs a chat template, and neither the tokenizer nor the recipe has one; set data.chat_template to "
    f"the one that the model was trained with: {', '.join(CHAT_TEMPLATES)}, a Jinja template, or the path of one"
)
UNANSWERED = "a conversation goes on after the assistant's last turn; what follows it is left out"


class Conversation(NamedTuple):
    """The turns of a row, and the tools that they may call. ``last_only``: only the last turn is trained."""

    turns: list[Turn]
    tools: Tools = None
    last_only: bool = False


@dataclass
class Rendered:
    """The text of a sample, the characters of the turns that are its targets, and the last of these turns.
    ``messages``, ``tools``: what the template was given. ``read``: where the words of the last turn end.
    ``whole``: the template has written the text in one piece."""

    text: str
    answers: list[Interval]
    turn: Turn
    messages: list[dict[str, Any]]
    tools: Tools
    read: int
    whole: bool
    warnings: set[str]


class Chat:
    """Encodes conversations. ``template`` replaces the tokenizer's own; None keeps that. ``stops``: the tokens that
    stop generation, besides the tokenizer's eos. ``date``: that which the template writes. ``literal``: what looks like
    a special token in a turn is tokenised as any other text."""

    def __init__(
        self,
        tokenizer: Any,
        template: str | None,
        stops: Iterable[int] = (),
        date: datetime | None = None,
        literal: bool = False,
    ) -> None:
        self.tokenizer, self.template = tokenizer, template or template_of(tokenizer)
        self._marks = Marks(tokenizer) if literal else None
        self.stops = frozenset(stops) | {n for n in (tokenizer.eos_token_id,) if n is not None}
        self._rendered_as = self.template if date is None else at_date(self.template or "", date)
        self._blocks = bool(self.template and _GENERATION.search(self.template)) and tokenizer.is_fast and not literal
        self.dialect = dialect_of(self.template, self._render) if self.template else Dialect()
        after = (self.dialect.between, self.dialect.after_call)
        between, after_call = (one.ids[:1] for one in tokenise(tokenizer, after, special=False))
        self._marks_after = {False: between, True: after_call}
        ends = (tokenizer.decode([stop]) for stop in self.stops)
        written = (self.dialect.after.strip(), self.dialect.between.strip())
        self._own_ends = tuple(end for end in ends if end and any(text.startswith(end) for text in written))
        bos = tokenizer.bos_token
        self._own_start = bos if bos and self.dialect.before.startswith(bos) else None
        self._for_tools = self
        own = tokenizer.chat_template
        if template is None and isinstance(own, dict) and "tool_use" in own:
            self._for_tools = Chat(tokenizer, own["tool_use"], stops, date, literal)

    def encode(self, conversations: Sequence[Conversation | RowError]) -> list[list[Sample] | RowError]:
        """Encodes the conversations as one batch. Returns a RowError unchanged, at its place."""
        chats = [self._chat_for(conversation) for conversation in conversations]
        encoded = {
            chat: iter(chat._encode([c for c, its in zip(conversations, chats, strict=True) if its is chat]))
            for chat in (self, self._for_tools)
        }
        return [next(encoded[chat]) for chat in chats]

    def _chat_for(self, conversation: Conversation | RowError) -> Chat:
        """Returns the one with the template that the tokenizer has for conversations with tools, if this is one."""
        return self._for_tools if isinstance(conversation, Conversation) and conversation.tools else self

    def _encode(self, conversations: Sequence[Conversation | RowError]) -> list[list[Sample] | RowError]:
        rendered = [c if isinstance(c, RowError) else self._split(c) for c in conversations]
        texts = [sample.text for row in rendered if not isinstance(row, RowError) for sample in row]
        encoded = iter(self._tokenise(texts))
        return [
            row if isinstance(row, RowError) else self._samples(row, [next(encoded) for _ in row]) for row in rendered
        ]

    def ask(self, conversation: Conversation) -> Sample | RowError:
        """Encodes a conversation that awaits the assistant's turn: it is the prompt, and the answer is eos alone."""
        prompt = self.prompt(conversation)
        if isinstance(prompt, RowError):
            return prompt
        tokens = [*prompt, Ends.of(self.tokenizer, "messages").eos]
        return Sample(np.array(tokens, dtype=np.int32), np.arange(len(tokens)) == len(tokens) - 1)

    def prompt(self, conversation: Conversation) -> list[int] | RowError:
        """Returns the tokens of a conversation, up to the start of the assistant's next turn."""
        return self._chat_for(conversation)._prompt(conversation)

    def _prompt(self, conversation: Conversation) -> list[int] | RowError:
        turns = self._marked(conversation.turns)
        messages = self.dialect.messages(turns)
        try:
            text = encodable(self._render(messages, tools=conversation.tools, add_generation_prompt=True))
        except Unrendered as error:
            return _refused(error)
        if isinstance(text, RowError):
            return text
        # A template may drop what the assistant has said before.
        lost = _read_words([turn for turn in turns if turn.role != "assistant"], text, 0)
        if isinstance(lost, RowError):
            return lost
        return self._tokenise([text])[0].ids

    def _render(self, messages: list[dict[str, Any]], **how: Any) -> str:
        return render(self.tokenizer, messages, self._rendered_as, **how)

    def _split(self, conversation: Conversation) -> list[Rendered] | RowError:
        """Returns the texts that the conversation is trained as."""
        turns = self._marked(conversation.turns)
        answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
        if not answers:
            return RowError(f"there is no turn of the assistant, only of: {', '.join({t.role: 0 for t in turns})}")
        rendered: list[Rendered] = []
        messages = self.dialect.messages(turns)
        try:
            for i in answers[-1:] if conversation.last_only else answers:
                if turns[i].trained:
                    fault = self._add(rendered, turns[: i + 1], messages[: i + 1], conversation.tools)
                    if fault is not None:
                        return fault
        except Unrendered as error:
            return _refused(error)
        for sample in rendered:
            if conversation.tools and not self.dialect.tools:
                sample.warnings.add(NO_TOOLS)
            if answers[-1] < len(turns) - 1:
                sample.warnings.add(UNANSWERED)
        return rendered

    def _add(
        self, rendered: list[Rendered], turns: list[Turn], messages: list[dict[str, Any]], tools: Tools
    ) -> RowError | None:
        """Adds the last of the turns to the last text, or a text of its own. Returns why it cannot be trained on."""
        turn = turns[-1]
        placed = self._place(turns, messages, tools)
        if isinstance(placed, RowError):
            return placed
        closed, start, whole, warnings = placed
        if isinstance(fault := encodable(closed), RowError):
            return fault
        last = rendered[-1] if rendered else None
        shared = last is not None and len(last.text) <= start and closed.startswith(last.text)
        read = last.read if shared and last else 0
        before = turns[turns.index(last.turn) + 1 : -1] if shared and last else turns[:-1]
        lost = _read_words(before, closed[:start], read)
        # Some templates write a system text behind the mark of the turn that follows it.
        for later in (self._first_start(closed, turn), closed.rfind(_first_words(turn))):
            if isinstance(lost, RowError) and later > start:
                start, lost = later, _read_words(before, closed[:later], read)
        if isinstance(lost, RowError):
            return lost
        end = left_out(turn, closed, start, reasoning=True)
        if isinstance(end, LeftOut):
            return _lost(end)
        if shared and last:
            last.text, last.turn, last.messages, last.read = closed, turn, messages, end
            last.whole = last.whole and whole
            last.answers.append((start, len(closed)))
            last.warnings |= warnings
        else:
            answers = [(start, len(closed))]
            rendered.append(Rendered(closed, answers, turn, messages, tools, end, whole, warnings))
        return None

    def _place(
        self, turns: list[Turn], messages: list[dict[str, Any]], tools: Tools
    ) -> tuple[str, int, bool, set[str]] | RowError:
        """Returns the text up to and including the last turn, where the words begin that the model is to write, whether
        the template has written the text as a whole, and warnings."""
        turn, opening = turns[-1], self.dialect.opening
        closed = self._render(messages, tools=tools)
        if len(turns) == 1:
            return closed, self._first_start(closed, turn), True, set()
        opened = self._render(messages[:-1], tools=tools, add_generation_prompt=True)
        start = self._start(closed, opened, turn, messages, tools)
        if start is None:
            # The template writes the turns before otherwise once this one follows: the model reads ``opened``.
            at = self._first_start(closed, turn)
            if isinstance(_read_words(turns[:-1], closed[:at], 0), RowError) and turns[-2].role == "assistant":
                return _rewritten(turn)
            if at == 0:
                return _rewritten(turn)
            return opened + closed[at:], len(opened), False, set()
        if opening and closed.startswith(opening, start) and not opened.endswith(opening):
            start += len(opening)
        return closed, start, True, {OPENED.format(tail=opening[-20:])} if start < len(opened) else set()

    def _first_start(self, closed: str, turn: Turn) -> int:
        """Returns where the assistant's words begin: behind the last generation prompt, or else the words themselves
        with the spaces before them. 0: nowhere."""
        at = closed.rfind(_first_words(turn))
        opening = closed.rfind(self.dialect.opening, 0, at) if self.dialect.opening else -1
        if opening >= 0:
            return opening + len(self.dialect.opening)
        return len(closed[: max(at, 0)].rstrip(" "))

    def _start(self, closed: str, opened: str, turn: Turn, messages: list[dict[str, Any]], tools: Tools) -> int | None:
        """Returns where what the model is to write begins in ``closed``: behind the generation prompt, or where the two
        part. None: the template writes the turns before otherwise once this one follows."""
        if closed.startswith(opened):
            return len(opened)
        opening = self.dialect.opening
        if opening and opened.endswith(opening):
            before = len(opened) - len(opening)
        else:
            before = len(self._render(messages[:-1], tools=tools))
        start = next(i for i, (a, b) in enumerate(zip(opened, closed + "\0", strict=False)) if a != b)
        if start < before:
            return None
        # Neither a mark nor the assistant's words are divided.
        tag = _TAG_AT_END.search(opened, before)
        if tag and tag.start() < start < len(tag[0].rstrip()) + tag.start():
            start = tag.start()
        words = _first_words(turn)
        at = closed.find(words, max(before, start - len(words) + 1), start + len(words))
        return at if 0 <= at < start else start

    def _marked(self, turns: list[Turn]) -> list[Turn]:
        """Returns the turns without the special tokens that the template writes itself; or with all their special
        tokens marked, if these are to stay text."""
        marks = self._marks
        if marks is None:
            return [self._without_ends(turn, first=number == 0) for number, turn in enumerate(turns)]
        return [marks.mark_turn(self._apart(turn)) for turn in turns]

    def _without_ends(self, turn: Turn, *, first: bool) -> Turn:
        content = turn.content
        if first and self._own_start and content.startswith(self._own_start):
            content = content.removeprefix(self._own_start)
        for end in self._own_ends if turn.role == "assistant" else ():
            if content.rstrip().endswith(end):
                content = content.rstrip().removesuffix(end)
        return turn if content == turn.content else replace(turn, content=content)

    def _apart(self, turn: Turn) -> Turn:
        """Returns the turn with its reasoning in its field: the template is not to look for tags that are marked."""
        if turn.role != "assistant" or not self.dialect.field:
            return turn
        thought, answer = thought_and_answer(turn)
        return replace(turn, reasoning=thought, content=answer)

    def _tokenise(self, texts: list[str]) -> Sequence[Tokenised | MarkedTokens]:
        if self._marks is not None:
            return [self._marks.tokenise(text) for text in texts]
        return tokenise(self.tokenizer, texts, special=False)

    def _samples(self, rendered: list[Rendered], tokens: Sequence[Tokenised | MarkedTokens]) -> list[Sample] | RowError:
        samples = []
        for one, encoded in zip(rendered, tokens, strict=True):
            sample = self._sample(one, encoded)
            if isinstance(sample, RowError):
                return sample
            samples.append(sample)
        return samples

    def _sample(self, rendered: Rendered, tokens: Tokenised | MarkedTokens) -> Sample | RowError:
        """Returns the sample with targets on each answer up to the token that stops generation."""
        ids = tokens.ids
        written = self._in_blocks(rendered) if self._blocks and rendered.whole else None
        target = np.zeros(len(ids), dtype=np.bool_)
        for number, (low, high) in enumerate(rendered.answers, 1):
            span = tokens.span((low, high))
            start, stop = span.start, self._stop(ids, span)
            mark = self._marks_after[bool(rendered.turn.calls)]
            ends = ids[stop - 1] in self.stops
            if number == len(rendered.answers) and not ends and mark and mark[0] in self.stops:
                ids, target, stop = [*ids, *mark], np.append(target, False), stop + 1
            target[start:stop] = True if written is None else written[start:stop]
            trained = np.flatnonzero(target[start:stop])
            if not len(trained):
                return RowError("the chat template's {% generation %} blocks leave out an assistant's turn")
            if ids[start + int(trained[-1])] not in self.stops:
                rendered.warnings.add(NO_STOP.format(after=self.dialect.turn_end.strip()))
        turn = rendered.turn.number
        return Sample(np.array(ids, dtype=np.int32), target, turn=turn, warnings=tuple(sorted(rendered.warnings)))

    def _stop(self, ids: list[int], span: slice) -> int:
        """Returns where the targets of a turn end: behind the token that stops generation, if there is one."""
        stops = [i for i in range(span.start, span.stop) if ids[i] in self.stops]
        if stops and not self.tokenizer.decode(ids[stops[-1] + 1 : span.stop]).strip():
            return stops[-1] + 1
        # Some templates end a turn with the mark of the next one.
        marked = span.stop < len(ids) and ids[span.stop] in self.stops
        return int(span.stop) + marked

    def _in_blocks(self, rendered: Rendered) -> Any:
        """Returns bool [T], True for the tokens in a ``{% generation %}`` block of the template."""
        out = self.tokenizer.apply_chat_template(
            rendered.messages, tools=rendered.tools, chat_template=self._rendered_as,
            return_dict=True, return_assistant_tokens_mask=True,
        )  # fmt: skip
        written = np.array(out["assistant_masks"], dtype=np.bool_)
        for token in range(1, len(written)):
            # A block may end in a character of several tokens, of which only the first is counted.
            if written[token - 1] and out.token_to_chars(token) == out.token_to_chars(token - 1):
                written[token] = True
        return np.append(written, True)


def chat_of(source: FrozenSource, tokenizer: Any, spec: PreparationSpec) -> Chat:
    """Raises InputError if neither the tokenizer nor the recipe has a chat template."""
    chat = chat_or_none(tokenizer, spec)
    if not chat.template:
        raise InputError(f"data source {source.path}: {MISSING}")
    return chat


def chat_or_none(tokenizer: Any, spec: PreparationSpec) -> Chat:
    """Returns a Chat, whose ``template`` is None if there is none."""
    literal, date = spec.special_tokens == "text", None if spec.date is None else datetime.fromisoformat(spec.date)
    return Chat(tokenizer, spec.chat_template, spec.stops, date, literal)


def _read_words(turns: Sequence[Turn], text: str, start: int) -> RowError | int:
    """Returns where the words of the turns end in a text, from ``start`` on; a RowError for words that it lacks."""
    for turn in turns:
        anywhere = turn.role in ("system", "developer")  # some templates write it before another turn
        end = left_out(turn, text, 0 if anywhere else start, reasoning=False)
        if isinstance(end, LeftOut):
            return _lost(end)
        start = start if anywhere else end
    return start


def _lost(what: LeftOut) -> RowError:
    return RowError(f"{what}; use a template that writes it (data.chat_template), or take it out of the data")


def _first_words(turn: Turn) -> str:
    thought, answer = thought_and_answer(turn)
    return (thought or answer).strip() or (turn.calls[0].name if turn.calls else "")


def _refused(error: Exception) -> RowError:
    return RowError(f"the chat template refuses the conversation: {error}")


def _rewritten(turn: Turn) -> RowError:
    return RowError(
        f"the chat template renders the turns before message {turn.number} differently when that message follows, so "
        "that the assistant's words cannot be identified; set data.chat_template to another template"
    )
