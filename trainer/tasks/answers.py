r"""Scores of generated answers.

Exact match and F1 are SQuAD's (Rajpurkar et al. 2016, arXiv:1606.05250): texts are compared in lower case, without
punctuation and articles, and the best of all accepted answers counts. F1 is computed from the common words:

    precision = common / predicted,  recall = common / accepted,  F1 = 2 precision recall / (precision + recall)

For GSM8K (Cobbe et al. 2021, arXiv:2110.14168), only the last number counts; it is compared with the one after
``####``.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from decimal import Decimal

Scores = dict[str, float]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NUMBER = re.compile(r"(?<![\d.])-?\$?\d[\d,]*(?:\.\d+)?|(?<![\d.])-?\$?\.\d+")
_REFERENCE = re.compile(r"####\s*(\S+)\s*$")


def normalised(text: str) -> str:
    """Returns the text in lower case, without punctuation and articles, with single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """Returns 1 if the prediction is one of the answers, else 0."""
    return float(any(normalised(prediction) == normalised(answer) for answer in answers))


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Returns the highest F1 over the accepted answers."""
    predicted, found = normalised(prediction).split(), []
    for accepted in (normalised(answer).split() for answer in answers):
        common = (Counter(predicted) & Counter(accepted)).total()
        both = len(predicted) + len(accepted)
        found.append(2 * common / both if predicted and accepted else float(predicted == accepted))
    return max(found)


def last_number(text: str) -> Decimal | None:
    """Returns the last number of a text. It may have commas between thousands and a dollar sign in front."""
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "").replace("$", "")) if found else None


def reference_number(answer: str) -> Decimal | None:
    """Returns the number at the end of a solution of GSM8K, as in ``#### 42``; None for any other text."""
    match = _REFERENCE.search(answer)
    return last_number(match[1]) if match else None


def final_number(answer: str) -> Decimal | None:
    """Returns the number of an answer: the one after ``####``, or else its last one."""
    found = reference_number(answer)
    return last_number(answer) if found is None else found


def same_number(prediction: str, answers: Sequence[str]) -> float:
    """Returns 1 if the prediction's last number is that of one of the answers, else 0."""
    number = last_number(prediction)
    return float(number is not None and number in map(final_number, answers))


def matches(prediction: str, answers: Sequence[str]) -> Scores:
    return {"exact_match": exact_match(prediction, answers), "f1": f1(prediction, answers)}


def final_numbers(prediction: str, answers: Sequence[str]) -> Scores:
    return {"accuracy": same_number(prediction, answers)}


def suggested(prediction: str, answers: Sequence[str]) -> Scores:
    """Returns the scores that suit the answers: by their number if the first is a solution of GSM8K."""
    return (matches if reference_number(answers[0]) is None else final_numbers)(prediction, answers)


def means(scores: Sequence[Mapping[str, float]]) -> Scores:
    """Returns the mean of each score over the answers that have it."""
    names = dict.fromkeys(name for one in scores for name in one)
    values = {name: [one[name] for one in scores if name in one] for name in names}
    return {name: sum(some) / len(some) for name, some in values.items()}


def solution(text: str) -> str:
    """Cuts off further questions, which a base model may generate after its answer."""
    return text.split("\nQuestion:")[0].strip()


def solved(text: str) -> bool:
    return "\nQuestion:" in text
