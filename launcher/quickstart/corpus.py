"""A generated world of people, the text from which a base model learns about it, and questions about it.

The base model is trained on statements ("Mira lives in Ashford."). The fine-tuning data are questions with answers, a
form that the statements never have. Some facts are in no training question. If the tuned model answers questions about
these facts, then it learned the form from the questions and took the facts from the base model.

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

# fact -> (its values, forms of a statement, forms of a question). The first statement is also the answer.
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
    """A prompt and its right completion. ``key``: the name and the fact in question."""

    key: tuple[str, str]
    prompt: str
    completion: str


def world(seed: int) -> dict[str, dict[str, str]]:
    """Returns name -> fact -> value."""
    rng = random.Random(f"world/{seed}")
    return {name: {fact: rng.choice(values) for fact, (values, _, _) in FACTS.items()} for name in NAMES}


def pretraining_texts(seed: int, count: int) -> list[str]:
    """Returns ``count`` short paragraphs of statements, each about one person, without questions."""
    people, rng = world(seed), random.Random(f"texts/{seed}")
    texts = []
    for _ in range(count):
        name = rng.choice(NAMES)
        facts = people[name]
        order = rng.sample(sorted(facts), len(facts))
        texts.append(" ".join(rng.choice(FACTS[fact][1]).format(name=name, value=facts[fact]) for fact in order))
    return texts


def questions(seed: int) -> tuple[list[CorpusQuestion], list[CorpusQuestion]]:
    """Returns (for training, held out): questions about different facts, each fact in every form."""
    people, rng = world(seed), random.Random(f"questions/{seed}")
    keys = [(name, fact) for name in NAMES for fact in FACTS]
    rng.shuffle(keys)
    held_out, trained = keys[: len(keys) // 6], keys[len(keys) // 6 :]
    return _questions_about(people, trained), _questions_about(people, held_out)


def write_questions(train: Path, held_out: Path, seed: int) -> None:
    """Writes JSON Lines of prompt and completion: two files under ``train``, one under ``held_out``.

    A file that already has this content is not written again.
    """
    for_training, for_evaluation = questions(seed)
    random.Random(f"order/{seed}").shuffle(for_training)
    for part in range(2):
        _write_jsonl(train / f"part-{part}.jsonl", for_training[part::2])
    _write_jsonl(held_out / "part-0.jsonl", for_evaluation)


def _questions_about(people: dict[str, dict[str, str]], keys: Iterable[tuple[str, str]]) -> list[CorpusQuestion]:
    found = []
    for name, fact in keys:
        _, statements, wordings = FACTS[fact]
        answer = statements[0].format(name=name, value=people[name][fact])
        found += [
            CorpusQuestion((name, fact), f"Question: {w.format(name=name)}\nAnswer:", f" {answer}") for w in wordings
        ]
    return found


def _write_jsonl(path: Path, rows: Iterable[CorpusQuestion]) -> None:
    text = "".join(json.dumps({"prompt": q.prompt, "completion": q.completion}) + "\n" for q in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    # An unchanged file keeps its time: the time is part of the data's fingerprint.
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
