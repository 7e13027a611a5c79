"""The trials of a sweep: the values of each, and its recipe. Pure functions.

A trial is named by its number, from 1. A number always has the same values, however often the sweep is resumed and also
if it has more trials then.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from trainer.errors import Mistake, RecipeError
from trainer.recipe.document import Dumper, read_value
from trainer.recipe.loading import parse
from trainer.recipe.overrides import apply, path_of, typed
from trainer.recipe.root import Recipe
from trainer.recipe.sections.sweep import DEFAULT_TRIALS, RangeSection, SweepSection
from trainer.recipe.sweeps.searches import SEARCHES
from trainer.recipe.tasks import Better, compared_metrics
from trainer.recipe.tree import annotation_at, kinds

Values = Mapping[str, Any]
"""The settings of a trial by dotted path."""

DIGITS = 4
"""Significant digits of a random number."""


def trial_name(name: str, number: int) -> str:
    return f"{name}-{number:03d}"


def grid(section: SweepSection) -> list[Values]:
    """Returns every combination of the lists, by the names of the parameters: in which order they were given does not
    change the number of a trial."""
    lists = {key: found for key, found in sorted(section.parameters.items()) if isinstance(found, tuple)}
    return [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]


def random_values(section: SweepSection) -> list[Values]:
    """Returns random combinations, none of them twice if there are only lists."""
    count = section.trials or DEFAULT_TRIALS
    if all(isinstance(found, tuple) for found in section.parameters.values()):
        every = grid(section)
        random.Random(section.seed).shuffle(every)
        return every[:count]
    return [_drawn(section, number) for number in range(1, count + 1)]


def _drawn(section: SweepSection, number: int) -> Values:
    generator = random.Random(f"{section.seed}/{number}")
    return {
        key: _number(generator, found, whole=takes_integers(key))
        if isinstance(found, RangeSection)
        else generator.choice(found)
        for key, found in sorted(section.parameters.items())
    }


def _number(generator: random.Random, found: RangeSection, *, whole: bool) -> float | int:
    low = -math.inf if found.min is None else found.min
    high = math.inf if found.max is None else found.max
    if found.mean is not None and found.std is not None:
        value: float | int = generator.gauss(found.mean, found.std)
    elif found.step is not None:
        return low + found.step * generator.randrange(math.floor((high - low) / found.step + 1e-9) + 1)
    elif found.log:
        value = math.exp(generator.uniform(math.log(low), math.log(high)))
    else:
        value = generator.randint(math.ceil(low), math.floor(high)) if whole else generator.uniform(low, high)
    value = round(value) if whole else float(f"{value:.{DIGITS}g}")
    return min(max(value, low), high)


def takes_integers(key: str) -> bool:
    """Returns True for a setting whose numbers are integers."""
    numbers = kinds(annotation_at(path_of(key))) & {int, float}
    return numbers == {int}


def listed(section: SweepSection) -> list[Values] | None:
    """Returns the values of all trials, or None if the search chooses them one after the other."""
    search = section.chosen_search
    if SEARCHES[search].learns:
        return None
    found: list[Values] = SEARCHES.load(search)(section)
    return found


def number_of_trials(section: SweepSection) -> int:
    if section.chosen_search == "grid":
        return section.combinations
    return section.trials or DEFAULT_TRIALS


def direction(recipe: Recipe) -> Better:
    """Returns in which direction the sweep's metric is better."""
    assert recipe.sweep is not None
    return compared_metrics(recipe)[recipe.sweep.metric]


def trial_recipe(base: Mapping[str, Any], number: int, values: Values) -> Recipe:
    """Returns the recipe of a trial. ``base``: the sweep's recipe as the user gave it, without filled-in defaults,
    which depend on other settings. Raises RecipeError with all mistakes."""
    return parse(trial_data(base, number), [as_override(*item) for item in values.items()])


def trials_of(base: Mapping[str, Any], section: SweepSection) -> list[Recipe]:
    """Returns the recipes of all trials, for a search that lists them."""
    return [trial_recipe(base, number, values) for number, values in enumerate(listed(section) or [], 1)]


def trial_data(base: Mapping[str, Any], number: int) -> dict[str, Any]:
    data = {key: value for key, value in copy.deepcopy(dict(base)).items() if key != "sweep"}
    return {**data, "name": trial_name(str(base.get("name")), number)}


def as_override(key: str, value: Any) -> str:
    return f"{key}={json.dumps(value, ensure_ascii=False)}"


def check_trials(base: Mapping[str, Any], section: SweepSection) -> None:
    """Builds the recipe of each trial. Raises RecipeError with every mistake once, and a trial that has it. Of a search
    that learns, the values of the lists and the ends of the ranges are checked."""
    found: dict[tuple[str, str], Mistake] = {}
    trials = listed(section) or list(_corners(section))
    for number, values in enumerate(trials, 1):
        try:
            trial_recipe(base, number, values)
        except RecipeError as error:
            for mistake in error.mistakes:
                message = f"{mistake.message} (in the trial with {described(values)})"
                found.setdefault((mistake.path, mistake.message), Mistake("sweep.parameters", mistake.path, message))
    if found:
        raise RecipeError(tuple(found.values()))


def first_values(section: SweepSection) -> Values:
    """Returns the values of one trial, with which inputs can be checked."""
    return next(iter(listed(section) or _corners(section)))


def as_text(data: Mapping[str, Any]) -> str:
    """Returns a recipe in plain data as YAML."""
    text: str = yaml.dump(dict(data), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)
    return text


def best_recipe(base: Mapping[str, Any], name: str, values: Values) -> dict[str, Any]:
    """Returns the recipe with the values of the best trial, as plain data."""
    data = trial_data(base, 1)
    apply(data, [as_override(*item) for item in values.items()])
    return {**data, "name": name}


def _corners(section: SweepSection) -> Iterator[Values]:
    """Yields combinations that together have each value of a list and both ends of each range."""
    ends: dict[str, Sequence[Any]] = {
        key: found if isinstance(found, tuple) else [found.min, found.max] for key, found in section.parameters.items()
    }
    first = {key: values[0] for key, values in ends.items()}
    yield first
    for key, values in ends.items():
        yield from ({**first, key: value} for value in values[1:])


def shown(value: Any) -> str:
    """Returns a value as it is written in a recipe, on one line."""
    text: str = yaml.dump(value, Dumper=Dumper, default_flow_style=True, allow_unicode=True, width=10**6)
    return text.removesuffix("...\n").strip()


def described(values: Values) -> str:
    """Returns the settings of a trial in one line."""
    return ", ".join(f"{key} {shown(value)}" for key, value in values.items())


def split_words(words: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Returns the words ``KEY=VALUE`` that change every trial, and the parameters that the others give: a list for
    ``KEY=V1,V2``, a mapping for ``KEY={min: …, max: …}``."""
    overrides: list[str] = []
    parameters: dict[str, Any] = {}
    for word in words:
        key, separator, text = word.partition("=")
        key, annotation = key.strip(), annotation_at(path_of(key))
        values = split_values(text)
        value = read_value(text.strip())
        if separator and len(values) > 1:
            parameters[key] = [typed(one.strip(), annotation) for one in values]
        elif isinstance(value, dict) and dict not in kinds(annotation) and {"min", "mean"} & value.keys():
            parameters[key] = value
        else:
            overrides.append(word)
    return overrides, parameters


def split_values(text: str) -> list[str]:
    """Splits a text at its commas, but not inside brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"" and not parts[-1].strip():  # a quote inside a word is a letter of it
            quote = character
        depth += (character in "[{") - (character in "]}") if not quote else 0
        if character == "," and depth <= 0 and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return parts
