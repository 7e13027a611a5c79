"""A copy of a base model in NF4, made once and shared by runs: a quarter of the bytes to read, nothing to quantise.

It has the format in which transformers saves bitsandbytes models, so that `from_pretrained` loads it too. Its folder's
name is a digest of the base and the kind of quantisation. ``config.json`` is written last and completes the copy.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from trainer.errors import InputError
from trainer.model.files.fetch import fetch_model
from trainer.model.files.safetensors_index import read_headers
from trainer.model.files.sharded_writer import WeightFiles
from trainer.model.files.weight_check import INDEX
from trainer.model.files.weight_source import WeightSource
from trainer.model.meta import NeedsFullLoad, meta_model
from trainer.model.sharded_load import ShardLoader
from trainer.recipe.sections.model import ModelSection
from trainer.run.shared import announce_use
from trainer.storage import Storage, local_path, open_storage

FORMAT = 1
FILE_BYTES = 2**29
"""The size of one file of the copy, which is held in memory until it is written."""
_SAMPLE = 4096
CONFIG = "config.json"


def copy_of(section: ModelSection, models: Storage) -> Storage | None:
    """Returns the NF4 copy of this base among ``models``, None when there is none."""
    if not models.folders():
        return None
    copy = models.child(copy_name(section))
    # `muster gc` is told first: what it deletes is missing, or is missing after the second look.
    return copy if copy.info(CONFIG) and announce_use(copy) and copy.info(CONFIG) else None


def make_copy(section: ModelSection, models: Storage) -> Storage:
    """Returns the NF4 copy of a base, and writes it if there is none.

    Memory: about one file of the copy and the largest weight in NF4. Raises InputError when the base lacks weights or
    cannot be read tensor by tensor."""
    copy = models.child(copy_name(section))
    if not announce_use(copy):
        raise InputError(f"`muster gc` is deleting {copy.url}: start again when it has ended")
    if copy.info(CONFIG):
        return copy
    folder = fetch_model(section, weights="://" not in section.path).folder
    source = WeightSource(section.path if "://" in section.path else str(folder))
    try:
        base = meta_model(section, folder, torch.device("cpu"), full=False, checkpointing=False)
        loader = ShardLoader(base, source, section.path, torch.device("cpu"))
        files = WeightFiles(copy.upload, FILE_BYTES)
        for tensors in loader.converted():
            files.add(tensors)
        index = files.index()
        source.check_unchanged({place.file for place in loader.stored.values()})
    except NeedsFullLoad as reason:
        raise InputError(f"no NF4 copy of {section.path!r} can be made: {reason}; runs load it without one") from reason
    finally:
        source.close()
    copy.write_json(INDEX, index)
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix != ".safetensors" and file.name not in (CONFIG, INDEX):
            copy.upload(file.name, file)
    copy.write_json(CONFIG, json.loads(base.config.to_json_string(use_diff=False)))
    return copy


def copy_name(section: ModelSection) -> str:
    """Returns the name of the copy's folder: a digest of the base, its dtype, and the format of the copy."""
    inputs = [FORMAT, section.dtype, "nf4", _identity(section)]
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:32]


def _identity(section: ModelSection) -> Any:
    """Returns the base's identity: ETags of objects, the commit of a Hub model, headers and samples of local files.

    A folder is not read completely, which would take as long as loading it; its files' times differ between copies."""
    if "://" in section.path and local_path(section.path) is None:
        found = (
            o for o in open_storage(section.path).list() if o.key.endswith(".safetensors") or o.key in (CONFIG, INDEX)
        )
        return [section.path, sorted((o.key, o.size, o.etag) for o in found)]
    folder = fetch_model(section, weights=False).folder
    if not Path(section.path).is_dir():
        return [section.path, folder.name]
    source = WeightSource(str(folder))
    try:
        return [_sampled(source, section.path), (folder / CONFIG).read_text()]
    finally:
        source.close()


def _sampled(source: WeightSource, path: str) -> str:
    digest = hashlib.sha256()
    for name, place in sorted(read_headers(source, path).items()):
        digest.update(f"{name} {place.dtype} {place.shape}".encode())
        for start in sorted({place.start, max(place.start, place.start + place.bytes - _SAMPLE)}):
            digest.update(source.read(place.file, start, min(start + _SAMPLE, place.start + place.bytes)))
    return digest.hexdigest()
