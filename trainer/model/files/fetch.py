"""Brings a model's files to this host: from a folder (used in place), or from an fsspec URL or the Hub (into a cache).

A copy is made once per host, under a file lock, in a temporary folder that is renamed when it is complete. Its name is
a digest of the objects' sizes and ETags, so that a changed model is fetched again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from trainer.errors import InputError
from trainer.model.files.configs import check_configs
from trainer.recipe.sections.model import ModelSection
from trainer.registry import choose_hint
from trainer.storage import ObjectInfo, Storage, open_storage
from trainer.storage.host_cache import host_cache, make_own

LOCK_TIMEOUT_S = 3600
WEIGHTS = (".safetensors",)
SKIPPED = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".ot")
TWICE = ("consolidated", "original/")
"""The paths at which repositories store the same weights a second time, in their authors' own format."""
LONGEST_CAUSE = 300
HUB_PATTERNS = ["*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"]


@dataclass(frozen=True)
class ModelFiles:
    """A model's files in ``folder``; ``fetched_bytes``: read from object storage by this process."""

    folder: Path
    fetched_bytes: int = 0


def cache_folder() -> Path:
    return host_cache(Path("~/.cache/muster").expanduser())


def fetch_model(section: ModelSection, *, weights: bool = True) -> ModelFiles:
    """Returns the model's files on this host; ``weights``: with its weight files.

    Raises InputError when there is no such folder, URL or Hub repository, or when it holds no ``config.json``.
    """
    if "://" in section.path:
        return _checked(_from_url(section.path, weights), section.path)
    if Path(section.path).is_dir():
        return _checked(ModelFiles(Path(section.path)), section.path)
    return _checked(_from_hub(section, weights), section.path)


def _checked(files: ModelFiles, path: str) -> ModelFiles:
    if not (files.folder / "config.json").is_file():
        raise InputError(f"model.path {path!r} holds no config.json: name a folder in the Hugging Face format")
    check_configs(files.folder, f"model.path {path!r}")
    return files


def _from_url(url: str, weights: bool) -> ModelFiles:
    storage = open_storage(url)
    skipped = SKIPPED if weights else SKIPPED + WEIGHTS
    listed = (o for o in storage.list() if "/" not in o.key)
    objects = [o for o in listed if not o.key.endswith(skipped) and not o.key.startswith(TWICE)]
    if not any(o.key == "config.json" for o in objects):
        raise InputError(
            f"model.path {url!r} holds no config.json: name the URL of a folder in the Hugging Face format"
        )
    listing = json.dumps([url, [(o.key, o.size, o.etag) for o in objects]])
    target = cache_folder() / "models" / hashlib.sha256(listing.encode()).hexdigest()[:32]
    size = sum(o.size for o in objects)
    try:
        make_own(target.parent)
        with FileLock(f"{target}.lock", timeout=LOCK_TIMEOUT_S):
            if target.is_dir():
                return ModelFiles(target)
            # Partial copies of processes that were killed: this process holds the lock, so no other one writes them.
            for partial in target.parent.glob(f"{target.name}.*/"):
                shutil.rmtree(partial, ignore_errors=True)
            _download(storage, objects, target)
    except FileNotFoundError as e:
        raise InputError(f"model.path {url!r} changed while it was copied ({e}); run the same command again") from e
    except OSError as e:
        raise InputError(
            f"the model cache {target.parent} cannot take the {size:,} bytes of {url} ({e.strerror or e}): "
            "set MUSTER_CACHE to a writable folder with free space"
        ) from e
    return ModelFiles(target, size)


def _download(storage: Storage, objects: list[ObjectInfo], target: Path) -> None:
    part = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
    try:
        for item in objects:
            storage.download(item.key, part / item.key)
        part.rename(target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _from_hub(section: ModelSection, weights: bool) -> ModelFiles:
    from huggingface_hub import snapshot_download

    patterns = [
        *HUB_PATTERNS,
        *(["*.safetensors"] if weights else []),
        *(["*.py"] if section.trust_remote_code else []),
    ]
    if section.path.startswith(("/", ".", "~")) or section.path.count("/") > 1:
        raise InputError(
            f"model.path {section.path!r} is no folder on this host; correct the path{near_folder(section.path)}"
        )
    try:
        folder = snapshot_download(
            section.path,
            revision=section.revision,
            allow_patterns=patterns,
            ignore_patterns=[f"{name}*" for name in TWICE],
        )
    except Exception as e:
        raise InputError(
            f"model.path {section.path!r} is neither a folder here nor a model that the Hub gives "
            f"(revision {section.revision!r}): {hub_cause(e)}{near_folder(section.path)}"
        ) from e
    return ModelFiles(Path(folder))


def hub_cause(error: Exception) -> str:
    """Returns why the Hub gives no file, as a clause. Its library's own messages are sentences about its cache."""
    from huggingface_hub import errors

    causes = {
        errors.GatedRepoError: "it is given to accounts that have accepted its terms; set HF_TOKEN to the token of one",
        errors.RepositoryNotFoundError: "it has none of this name, or a private one, for which HF_TOKEN is needed",
        errors.RevisionNotFoundError: "the model has no such revision",
        errors.OfflineModeIsEnabled: "it is not in the cache, and HF_HUB_OFFLINE is set",
        errors.LocalEntryNotFoundError: "it is not in the cache, and the Hub cannot be reached",
    }
    known = (clause for kind, clause in causes.items() if isinstance(error, kind) or isinstance(error.__cause__, kind))
    return next(known, " ".join(str(error).split())[:LONGEST_CAUSE])


def near_folder(path: str) -> str:
    """Returns a hint at a model's folder here whose name is close to the path's, else an empty text."""
    named = Path(path).expanduser()
    return choose_hint(named.name, tuple(config.parent.name for config in named.parent.glob("*/config.json")))
