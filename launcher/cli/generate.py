"""``muster generate`` and ``muster chat``: a run, an adapter or a model answers prompts."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from launcher.cli.options import (
    AdapterOption,
    CombinationOption,
    DensityOption,
    FrameOption,
    ModelOption,
    QuantizationOption,
    RunOption,
    SeedOption,
    TemperatureOption,
    TokensOption,
    TopPOption,
    TrustOption,
    UseOption,
)
from launcher.terminal.console import bar, hush_libraries, stderr
from trainer.errors import UsageError
from trainer.interruption import current

if TYPE_CHECKING:
    from trainer.artifacts import Artifact, Generator
    from trainer.artifacts.chat import Conversation

LEAVE = ("exit", "quit")
HELP = "/clear starts a new conversation, exit (or the end of input) ends the program"


@dataclass(frozen=True)
class Which:
    """The options that choose the model."""

    run: str | None
    adapters: list[str] | None
    model: str | None
    use: str | None
    combination: str
    density: float | None
    quantization: str | None
    trust: bool


@dataclass(frozen=True)
class LoadedArtifact:
    subject: Artifact
    tokenizer: Any
    writer: Generator


def generate(
    run: RunOption = None,
    adapter: AdapterOption = None,
    model: ModelOption = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", metavar="TEXT", help="a prompt; stdout gets its answer alone")
    ] = None,
    file: Annotated[
        str | None,
        typer.Option(
            "--input", metavar="FILE", help="JSON Lines file with a prompt or messages in each line; - is stdin"
        ),
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", metavar="FILE", help="file for the answers to --input; - is stdout")
    ] = None,
    frame: FrameOption = None,
    use: UseOption = None,
    combination: CombinationOption = "cat",
    density: DensityOption = None,
    quantization: QuantizationOption = None,
    max_new_tokens: TokensOption = 256,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = 17,
    batch: Annotated[
        int, typer.Option("--batch", metavar="N", min=1, help="number of prompts that are answered together")
    ] = 16,
    trust_remote_code: TrustOption = False,
) -> None:
    """Answer one prompt, or the prompts of a file in their order. A prompt is put as in training."""
    from trainer.artifacts.batch import answer_file

    if (prompt is None) == (file is None):
        raise UsageError("give either --prompt TEXT or --input FILE.jsonl")
    if (file is None) != (output is None):
        raise UsageError("--input and --output need each other: a file of prompts, and a file for their answers")
    which = Which(run, adapter, model, use, combination, density, quantization, trust_remote_code)
    drawing = Drawing(temperature, top_p, seed)
    stdout = sys.stdout
    with redirect_stdout(sys.stderr), _loaded(which, drawing, batch) as loaded:
        talk = _conversation(loaded, frame, None)
        if prompt is not None:
            text = talk.shown(loaded.writer.answers([talk.ask(prompt)], max_new_tokens, talk.ended)[0])
        else:
            assert file is not None
            assert output is not None
            with bar("answering") as done:
                answer_file(loaded.writer, talk, file, output, max_new_tokens, stdout, done)
    if prompt is not None:
        print(text)


def chat(
    run: RunOption = None,
    adapter: AdapterOption = None,
    model: ModelOption = None,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="system prompt of the conversation")
    ] = None,
    frame: FrameOption = None,
    use: UseOption = None,
    combination: CombinationOption = "cat",
    density: DensityOption = None,
    quantization: QuantizationOption = None,
    max_new_tokens: TokensOption = 512,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = 17,
    trust_remote_code: TrustOption = False,
) -> None:
    """Talk to a run, an adapter or a model. If stdin is a pipe, each line of it is answered."""
    which = Which(run, adapter, model, use, combination, density, quantization, trust_remote_code)
    stdout = sys.stdout
    with redirect_stdout(sys.stderr), _loaded(which, Drawing(temperature, top_p, seed), 1) as loaded:
        talk = _conversation(loaded, frame, system)
        with redirect_stdout(stdout), current.keyboard():
            _talk(loaded.writer, talk, max_new_tokens)


def _talk(writer: Generator, talk: Conversation, max_new_tokens: int) -> None:
    """Prints answers to stdout, everything else to stderr. Ctrl-C ends an answer, and otherwise the conversation."""
    person = sys.stdin.isatty()
    if person:
        print(HELP, file=sys.stderr)
    for text in _lines(person):
        if text == "/clear":
            talk.clear()
            continue
        try:
            shown = Shown(talk)
            said = writer.stream(talk.ask(text), max_new_tokens, shown, talk.ended)
            shown.end()
        except KeyboardInterrupt:
            talk.take_back()
        else:
            talk.answered(talk.shown(said))
        print(flush=True)


class Shown:
    """Prints an answer piece by piece, up to its end: see `Conversation.shown`."""

    def __init__(self, talk: Conversation) -> None:
        self.talk, self._text, self._printed = talk, "", ""

    def __call__(self, piece: str) -> None:
        self._text += piece
        ended = self.talk.ended(self._text)
        self._show(self.talk.shown(self._text) if ended else self.talk.certain(self._text))

    def end(self) -> None:
        self._show(self.talk.shown(self._text))

    def _show(self, text: str) -> None:
        shown = text.lstrip()
        print(shown[len(self._printed) :], end="", flush=True)
        self._printed = shown


def _lines(person: bool) -> Iterator[str]:
    """Yields the prompts, until the end of input, ``exit`` or Ctrl-C."""
    if person:
        import readline  # noqa: F401 - lines can be edited and called back
    while True:
        try:
            if person:
                print("> ", end="", file=sys.stderr, flush=True)
            text = input().strip()
        except (EOFError, KeyboardInterrupt):
            return
        if text in LEAVE:
            return
        if text:
            yield text


@dataclass(frozen=True)
class Drawing:
    """The options of the sampling."""

    temperature: float
    top_p: float
    seed: int

    def check(self) -> None:
        if self.temperature == 0 and self.top_p < 1:
            raise UsageError("--top-p has no effect at --temperature 0, which takes the most likely token")


def _conversation(loaded: LoadedArtifact, frame: str | None, system: str | None) -> Conversation:
    from trainer.artifacts.chat import HOW, Conversation, frame_for

    subject, tokenizer = loaded.subject, loaded.tokenizer
    format, template = (subject.origin.format, subject.origin.template) if subject.origin else (None, None)
    chosen = frame_for(tokenizer, frame, format, template)
    if frame is None:
        known = ", as in training" if format else ""
        stderr().print(Text(f"prompts {HOW[chosen]}{known} (--frame changes it)"), soft_wrap=True)
    return Conversation(tokenizer, chosen, system, template)


@contextmanager
def _loaded(which: Which, drawing: Drawing, batch: int) -> Iterator[LoadedArtifact]:
    from launcher.monitor.progress import Progress

    say = Progress(stderr()).phase
    say("loading libraries")
    import torch

    from trainer.artifacts import ArtifactRef, Generator, Sampling, base_files, find, load, tokenizer_of
    from trainer.artifacts.combine import Mix, mixed
    from trainer.model.placement import placement_for
    from trainer.recipe.trust import Trust

    address = ArtifactRef.of(which.run, which.adapters, which.model)
    mix = Mix.chosen(which.use, which.combination, which.density)
    drawing.check()
    hush_libraries()
    with tempfile.TemporaryDirectory(prefix="muster-saved-") as folder:
        say("fetching the model")
        subject = held(find(address, Path(folder), trust=Trust(which.trust)), which.quantization)
        if subject.classes:
            raise UsageError(f"task {subject.task} trains a classifier, which generates no text: use muster evaluate")
        if mix is None and len(subject.adapters) > 1:
            raise UsageError(f"choose one of {', '.join(subject.adapters)} with --use, or give weights to combine them")
        if mix:
            mix.check(list(subject.adapters))
        with placement_for(subject.section, base_files(subject)) as placement:
            say("loading the model")
            model, tokenizer = load(subject, placement, None), tokenizer_of(subject)
            if mix:
                mixed(model, mix)
            torch.manual_seed(drawing.seed)
            sampling = Sampling(drawing.temperature, drawing.top_p)
            yield LoadedArtifact(subject, tokenizer, Generator(model, tokenizer, placement.device, batch, sampling))


def held(subject: Artifact, quantization: str | None) -> Artifact:
    """Returns the artifact with another quantisation of its base model, if the options request it."""
    if quantization is None or quantization == subject.section.quantization:
        return subject
    if quantization not in ("none", "nf4", "int8"):
        raise UsageError(f"--quantization {quantization!r} is not one of: none, nf4, int8")
    section = subject.section.model_copy(update={"quantization": quantization})
    return replace(subject, section=section, recipe=None)
