"""What lies beside a final adapter in ``muster.json``: what it was trained on, and in which form.

peft's configuration names the base, and nothing of how it was held. (The header of the weights' file would go along
with every copy too, but safetensors writes it in another order each time, and the same run gives the same bytes.)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple, Required, TypedDict

from trainer.parsing import parse_json
from trainer.recipe import ModelSection, Recipe
from trainer.recipe.sections.data import checked_template
from trainer.recipe.sections.tasks import AUTO_CLASSES
from trainer.records import read_record
from trainer.registry import FORMATS

ORIGIN_FILE = "muster.json"


class _Told(TypedDict, total=False):
    task: Required[str]
    method: Required[str]
    model: Required[Any]
    format: str | None
    template: str | None
    base: dict[str, Any] | None


class ArtifactInfo(NamedTuple):
    """``method``: the recipe's word, or peft's, for a method that was named so. ``model``: the base, as the recipe has
    it. ``format`` and ``template``: of the training data, the first source's. ``base``: by which the model that was
    trained on is known again (`trainer.model.files.identity`)."""

    task: str
    method: str
    model: ModelSection
    format: str | None = None
    template: str | None = None
    base: dict[str, Any] | None = None

    @classmethod
    def of(cls, recipe: Recipe) -> ArtifactInfo:
        source = recipe.data.train[0]
        return cls(recipe.task, recipe.adapter.label, recipe.model, source.format, source.template)

    def write(self, folder: Path) -> None:
        told = {**self._asdict(), "model": self.model.model_dump(mode="json")}
        (folder / ORIGIN_FILE).write_text(json.dumps(told, indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> ArtifactInfo | None:
        """Returns None where there is no such file, or an invalid one. Code of the base is not the file's to
        trust (`trainer.recipe.trust`), and a template is held to what a recipe's may be."""
        try:
            told = read_record(_Told, parse_json((folder / ORIGIN_FILE).read_bytes()))
            model = ModelSection.model_validate(told["model"]).model_copy(update={"trust_remote_code": False})
            if told["task"] not in AUTO_CLASSES:
                return None
            format, template = told.get("format"), told.get("template")
            if format is not None and format not in FORMATS:
                return None
            template = template and checked_template(template)
            return cls(told["task"], told["method"], model, format, template, told.get("base"))
        except (OSError, ValueError):
            return None
