"""The quickstart's base model and data: made when they are not there, left alone when they are."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from launcher.quickstart.corpus import pretraining_texts, write_questions
from launcher.quickstart.model import LlamaShape, make_model, pretrain

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
    """Make and pretrain the base in ``folder``; False when it is there already.

    The work is done in a folder beside it, so that a base that was stopped half way is never taken for a whole one.
    """
    if (folder / "config.json").exists():
        return False
    corpus, beside = pretraining_texts(SEED, texts), folder.with_name(f"{folder.name}.unfinished")
    beside.parent.mkdir(parents=True, exist_ok=True)
    make_model(beside, shape, corpus, SEED)
    pretrain(beside, corpus, steps=steps, seed=SEED, on_step=on_step)
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)
    return True


def prepare_data(train: Path, held_out: Path) -> None:
    """Write the questions; files that already hold them stay untouched, since a run notices changed inputs."""
    write_questions(train, held_out, SEED)
