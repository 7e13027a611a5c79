"""A generated world of people, the text that a base model learns it from, and questions about it.

The base model reads statements ("Mira lives in Ashford."); the fine-tuning data are questions with answers, a form that
the statements never have. Some facts are never asked about in the training questions: whether the tuned model answers
those tells that it learned the form, and took the facts from the base.

Everything is a pure function of the seed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

# fmt: off
NAMES = (
    "Ada", "Anton", "Berta", "Boris", "Carlo", "Clara", "Dirk", "Dora", "Edda", "Emil", "Felix", "Frida", "Georg",
    "Greta", "Hugo", "Ines", "Jonas", "Kira", "Leon", "Mira", "Nils", "Olga", "Paul", "Rosa", "Stefan", "Tilda",
    "Ulrich", "Vera", "Walter", "Xenia", "Yann", "Zita",
)
# fmt: on

# fact -> (its values, how a statement says it, how a question asks for it). The first statement is also the answer.
FACTS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "town": (
        ("Ashford", "Brookfield", "Carwick", "Dunmore", "Elmstead", "Farley", "Glenholt", "Harwell"),
        ("{name} lives in {value}.", "The home of {name} is in {value}.", "In {value} you will meet {name}."),
        ("Where does {name} live?", "In which town does {name} live?", "What is the town of {name}?"),
    ),
    "trade": (
        ("baker", "carpenter", "doctor", "farmer", "gardener", "miller", "painter", "teacher"),
        ("{name} works as a {value}.", "The trade of {name} is that of a {value}.", "We call {name} the {value}."),
        ("What does {name} work as?", "What is the trade of {name}?", "Which work does {name} do?"),
    ),
    "animal": (
        ("cat", "dog", "goat", "horse", "owl", "parrot", "rabbit", "tortoise"),
        ("{name} keeps a {value}.", "The animal of {name} is a {value}.", "A {value} belongs to {name}."),
        ("Which animal does {name} keep?", "What animal has {name}?", "What is the animal of {name}?"),
    ),
}


class CorpusQuestion(NamedTuple):
    """A prompt and the completion that is right; ``key`` names the fact that it asks for."""

    key: tuple[str, str]
    prompt: str
    completion: str


def world(seed: int) -> dict[str, dict[str, str]]:
    """name -> fact -> value."""
    rng = random.Random(f"world/{seed}")
    return {name: {fact: rng.choice(values) for fact, (values, _, _) in FACTS.items()} for name in NAMES}


def pretraining_texts(seed: int, count: int) -> list[str]:
    """``count`` short paragraphs of statements about one person each; no question among them."""
    people, rng = world(seed), random.Random(f"texts/{seed}")
    return [_paragraph(rng, name, people[name]) for name in (rng.choice(NAMES) for _ in range(count))]


def questions(seed: int) -> tuple[list[CorpusQuestion], list[CorpusQuestion]]:
    """(for training, held out): the two ask for different facts, in every wording."""
    people, rng = world(seed), random.Random(f"questions/{seed}")
    keys = [(name, fact) for name in NAMES for fact in FACTS]
    rng.shuffle(keys)
    held_out, trained = keys[: len(keys) // 6], keys[len(keys) // 6 :]
    return _ask(people, trained), _ask(people, held_out)


def write_questions(train: Path, held_out: Path, seed: int, parts: int = 2) -> None:
    """JSON Lines of prompt and completion: ``parts`` files under ``train``, one under ``held_out``.

    A file that has these bytes already is not written again: its time is part of what a run's data are known by.
    """
    for_training, for_evaluation = questions(seed)
    random.Random(f"order/{seed}").shuffle(for_training)
    for part in range(parts):
        _write_jsonl(train / f"part-{part}.jsonl", for_training[part::parts])
    _write_jsonl(held_out / "part-0.jsonl", for_evaluation)


def _paragraph(rng: random.Random, name: str, facts: dict[str, str]) -> str:
    order = rng.sample(sorted(facts), len(facts))
    return " ".join(rng.choice(FACTS[fact][1]).format(name=name, value=facts[fact]) for fact in order)


def _ask(people: dict[str, dict[str, str]], keys: Iterable[tuple[str, str]]) -> list[CorpusQuestion]:
    asked = []
    for name, fact in keys:
        _, statements, wordings = FACTS[fact]
        answer = statements[0].format(name=name, value=people[name][fact])
        asked += [
            CorpusQuestion((name, fact), f"Question: {w.format(name=name)}\nAnswer:", f" {answer}") for w in wordings
        ]
    return asked


def _write_jsonl(path: Path, rows: Iterable[CorpusQuestion]) -> None:
    text = "".join(json.dumps({"prompt": q.prompt, "completion": q.completion}) + "\n" for q in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
