"""Reads the base's ``config.json`` from ``model.path``, and no other file of it."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.errors import InputError, MusterError
from trainer.model.base_config import load_config
from trainer.model.files.fetch import hub_cause, near_folder
from trainer.plan.known_configs import known_shape
from trainer.recipe.sections.model import ModelSection
from trainer.recipe.tasks import CAUSAL
from trainer.storage import open_storage
from trainer.storage.limit import limited

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

CONFIG = "config.json"
REACH_S = 5.0
"""In seconds. A plan is interactive: a storage that does not answer in this time counts as out of reach."""


@dataclass(frozen=True)
class Base:
    """A base's configuration. ``note``: a warning that it is a known shape, not the base's own file; else empty."""

    config: PreTrainedConfig
    note: str = ""


def read_base(section: ModelSection, auto_class: str = CAUSAL) -> Base:
    """Raises InputError when there is no ``config.json``, or muster cannot take its base for ``auto_class``."""
    try:
        if "://" in section.path:
            return Base(_from_url(section, auto_class))
        if Path(section.path).is_dir():
            return Base(_parse(section, section.path, auto_class))
        return Base(_from_hub(section, auto_class))
    except OutOfReach as error:
        shape = known_shape(section.path)
        if shape is None:
            raise InputError(str(error)) from error
        from transformers import AutoConfig

        settings = {name: value for name, value in shape.items() if name != "model_type"}
        config: PreTrainedConfig = AutoConfig.for_model(shape["model_type"], **settings)
        return Base(config, f"model.path {section.path} is out of reach; planned with the known shape of its name")


class OutOfReach(Exception):
    """The file may exist, but cannot be read from this host now."""


def _from_url(section: ModelSection, auto_class: str) -> PreTrainedConfig:
    try:
        text = open_storage(section.path, deadline_s=REACH_S).read(CONFIG)
    except FileNotFoundError:
        raise OutOfReach(f"model.path {section.path!r} holds no {CONFIG} that can be read from here") from None
    except (MusterError, OSError) as error:
        raise OutOfReach(f"the {CONFIG} of model.path {section.path!r} cannot be read from here: {error}") from error
    with tempfile.TemporaryDirectory(prefix="muster-plan-") as folder:
        Path(folder, CONFIG).write_bytes(text)
        return _parse(section, folder, auto_class)


def _from_hub(section: ModelSection, auto_class: str) -> PreTrainedConfig:
    """Reads it from the Hub's cache on this host, or else from the Hub."""
    from huggingface_hub import hf_hub_download

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs every attempt
    if section.path.startswith(("/", ".", "~")) or section.path.count("/") > 1:
        raise InputError(
            f"model.path {section.path!r} is no folder on this host; correct the path{near_folder(section.path)}"
        )

    def fetch(cached: bool) -> str:
        return str(hf_hub_download(section.path, CONFIG, revision=section.revision, local_files_only=cached))

    try:
        file = fetch(True)
    except Exception:
        failing = f"model.path {section.path!r} is no folder here, and its {CONFIG} cannot be read from the Hub"
        file = within(REACH_S, lambda: fetch(False), failing, near_folder(section.path))
    return _parse(section, str(Path(file).parent), auto_class)


def within(seconds: float, read: Callable[[], str], failing: str, hint: str = "") -> str:
    """Returns the result of ``read``; raises OutOfReach when it raises or is late, with the cause between ``failing``
    and ``hint``."""
    try:
        return limited(lambda _: read(), seconds)
    except Exception as error:
        raise OutOfReach(f"{failing}: {hub_cause(error)}{hint}") from error


def _parse(section: ModelSection, folder: str, auto_class: str) -> PreTrainedConfig:
    if not Path(folder, CONFIG).is_file():
        raise InputError(f"model.path {section.path!r} holds no {CONFIG}: name a folder in the Hugging Face format")
    return load_config(section, Path(folder), auto_class)
