"""Code that is part of a model: its configuration names Python files in its folder under ``auto_map``."""

from __future__ import annotations

from pathlib import Path

from trainer.errors import InputError
from trainer.model.files.configs import read_config
from trainer.recipe.sections.model import ModelSection

ASK = (
    "look at its Python files, then give --trust-remote-code (in a recipe file of your own: model.trust_remote_code: "
    "true)"
)


def brings_code(folder: Path) -> bool:
    return bool(_config(folder).get("auto_map"))


def check_code(section: ModelSection, folder: Path) -> None:
    """Raises InputError when only the model's own code can build it, and the user does not trust that code."""
    if section.trust_remote_code or not brings_code(folder):
        return
    from transformers import CONFIG_MAPPING

    if _config(folder).get("model_type") not in CONFIG_MAPPING:
        raise InputError(f"model.path {section.path!r} is built by code that comes with it, which was not run: {ASK}")


def _config(folder: Path) -> dict[str, object]:
    try:
        return read_config(folder / "config.json", str(folder))
    except InputError:
        return {}  # reported where the model is built
