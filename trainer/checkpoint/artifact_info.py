"""The file ``muster.json`` next to a final adapter: what the adapter was trained on, and in which form.

peft's configuration names the base model, but not how it was loaded (dtype, quantization). (The header of the weights'
file would be copied with the weights too, but safetensors writes it in another order each time, and the same run has to
give the same bytes.)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple, Required, TypedDict

from trainer.parsing import parse_json
from trainer.recipe import ModelSection, Recipe
from trainer.recipe.formats import FORMATS
from trainer.recipe.sections.data import checked_template
from trainer.recipe.tasks import TASKS
from trainer.records import read_record

ORIGIN_FILE = "muster.json"


class _StoredInfo(TypedDict, total=False):
    task: Required[str]
    method: Required[str]
    model: Required[Any]
    format: str | None
    template: str | None
    base: dict[str, Any] | None
    best: dict[str, Any] | None
    begins_from: dict[str, Any] | None


class ArtifactInfo(NamedTuple):
    """``method``: the recipe's name of the method, or peft's name for a method that the recipe takes from peft.
    ``model``: the base model, as in the recipe. ``format`` and ``template``: those of the first training source.
    ``base``: the identity of the base model's files (`trainer.model.files.identity`). ``best``: the evaluation that
    chose it (`checkpoint.keep_best`). ``begins_from``: the trained adapter that its run began with."""

    task: str
    method: str
    model: ModelSection
    format: str | None = None
    template: str | None = None
    base: dict[str, Any] | None = None
    best: dict[str, Any] | None = None
    begins_from: dict[str, Any] | None = None

    @classmethod
    def of(cls, recipe: Recipe) -> ArtifactInfo:
        source = recipe.data.train[0]
        format, template = ("messages", None) if source.style == "chat" else (source.format, source.template)
        return cls(recipe.task, recipe.adapter.label, recipe.model, format, template)

    def write(self, folder: Path) -> None:
        later = ("best", "begins_from")  # only a run that uses them has these
        body = {name: value for name, value in self._asdict().items() if value is not None or name not in later}
        body["model"] = self.model.model_dump(mode="json")
        (folder / ORIGIN_FILE).write_text(json.dumps(body, indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> ArtifactInfo | None:
        """Returns None when the file is missing or invalid."""
        try:
            stored = read_record(_StoredInfo, parse_json((folder / ORIGIN_FILE).read_bytes()))
            # Trust is never read from storage (`trainer.recipe.trust`): anyone may have written the file.
            model = ModelSection.model_validate(stored["model"]).model_copy(update={"trust_remote_code": False})
            if stored["task"] not in TASKS:
                return None
            format, template = stored.get("format"), stored.get("template")
            if format not in FORMATS:  # that of a plug-in, whose prompts are plain texts
                format = None
            template = template and checked_template(template)
            further = [stored.get("base"), stored.get("best"), stored.get("begins_from")]
            return cls(stored["task"], stored["method"], model, format, template, *further)
        except (OSError, ValueError):
            return None
