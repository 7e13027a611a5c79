"""Makes the quickstart's base model and data, unless they exist already."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from launcher.quickstart.corpus import pretraining_texts, write_questions
from launcher.quickstart.model import LlamaShape, make_model, pretrain
from trainer.progress.lines import ProgressLines
from trainer.recipe import Recipe

SEED = 17
TEXTS = 6000
STEPS = 300


def prepare_base(
    folder: Path,
    shape: LlamaShape = LlamaShape(),  # noqa: B008 (frozen: safe to share)
    texts: int = TEXTS,
    steps: int = STEPS,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> bool:
    """Makes and pretrains the base model in ``folder``; returns False if it exists already.

    It is made in a folder next to ``folder``, so that an unfinished model is never taken for a complete one.
    """
    if (folder / "config.json").exists():
        return False
    corpus, unfinished = pretraining_texts(SEED, texts), folder.with_name(f"{folder.name}.unfinished")
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    make_model(unfinished, shape, corpus, SEED)
    pretrain(unfinished, corpus, steps=steps, seed=SEED, on_step=on_step)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    return True


def make_inputs(recipe: Recipe, lines: ProgressLines) -> None:
    """Makes the base model and the data at the paths that the quickstart's recipe names, unless they exist already."""
    base = Path(recipe.model.path)

    def on_step(step: int, loss: float) -> None:
        lines.within_phase(f"pretraining a small Llama: step {step} of {STEPS}, loss {loss:.2f}")

    lines.phase("making a small Llama and its tokenizer")
    made = prepare_base(base, on_step=on_step)
    lines.say(f"base model: {base} ({'made and pretrained' if made else 'was there'})")
    train, held_out = (Path(sources[0].path).parent for sources in (recipe.data.train, recipe.data.eval))
    prepare_data(train, held_out)
    lines.say(f"questions to learn from: {train}; held out: {held_out}")
    lines.phase("")


def prepare_data(train: Path, held_out: Path) -> None:
    """Writes the questions. Files that already contain them are not touched, since a run notices changed inputs."""
    write_questions(train, held_out, SEED)
