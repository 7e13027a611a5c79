"""What the user brings along: conversations in ShareGPT's form, and a small base model."""

from __future__ import annotations

import json
import random
from pathlib import Path

from launcher.quickstart.corpus import FACTS, NAMES, pretraining_texts, world
from launcher.quickstart.model import LlamaShape, make_model, pretrain
from launcher.terminal.console import hush_libraries

SEED = 29
ROWS = 200
SYSTEM = "Réponds en une phrase, comme à l'école."


def write_chats(path: Path) -> None:
    """Writes conversations about people: every third has a system turn, and every second one a second question."""
    people, draw = world(SEED), random.Random(SEED)
    with path.open("w", encoding="utf-8") as file:
        for row in range(ROWS):
            name = draw.choice(NAMES)
            turns = [{"from": "system", "value": SYSTEM}] if row % 3 == 0 else []
            for fact in draw.sample(sorted(FACTS), 1 + row % 2):
                _, statements, questions = FACTS[fact]
                turns.append({"from": "human", "value": draw.choice(questions).format(name=name)})
                turns.append({"from": "gpt", "value": statements[0].format(name=name, value=people[name][fact])})
            file.write(json.dumps({"conversations": turns}, ensure_ascii=False) + "\n")


def make_base(folder: Path) -> None:
    """Makes a Llama whose tokenizer has a chat template, and teaches it about the same people."""
    hush_libraries()
    texts = pretraining_texts(SEED, 2000)
    make_model(folder, LlamaShape(), texts, SEED)
    pretrain(folder, texts, steps=60, seed=SEED)
