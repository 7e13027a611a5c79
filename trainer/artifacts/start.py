"""The trained adapter that a run begins from (`adapter.from`): found, fetched, and compared with the recipe's own.

Nothing of it may be lost or left at a new value without a message: it must have the same settings as the recipe's
adapter, and exactly its tensors. Its files are not trusted, and peft does not read them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.adapters import Adapter
from trainer.artifacts.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, LISTED, read_adapter_config
from trainer.checkpoint import CommitRecord, list_commits
from trainer.checkpoint.artifact_info import ORIGIN_FILE, ArtifactInfo
from trainer.checkpoint.blobs import entry_of_file
from trainer.checkpoint.publish import chosen_of, is_last
from trainer.errors import CorruptObject, InputError
from trainer.model.files.fetch import hub_cause
from trainer.model.files.identity import differences, identity_of
from trainer.model.files.safetensors_header import header_of
from trainer.recipe import ModelSection
from trainer.run import layout
from trainer.storage import Storage, open_storage

if TYPE_CHECKING:
    from peft import PeftConfig

log = logging.getLogger(__name__)

FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, ORIGIN_FILE)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
NOT_COMPARED = frozenset(
    [
        # The place of the adapter: its tensors show it.
        *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
        *("target_modules", "target_parameters", "exclude_modules", "modules_to_save", "feedforward_modules"),
        *("layers_to_transform", "layers_pattern", "fan_in_fan_out", "megatron_config", "megatron_core"),
        # Sizes of the base model, which peft enters: the shapes of the tensors show them.
        *("token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers", "num_key_value_heads"),
        # Initial values, which are replaced.
        *("init_lora_weights", "init_weights", "init_ia3_weights", "prompt_tuning_init", "prompt_tuning_init_text"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "tokenizer_name_or_path", "d_initial"),
        # Training only; adalora's schedule belongs to a run.
        *("runtime_config", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step", "target_r"),
    ]
)
"""Fields of peft's configuration, besides the rates of dropout, in which two equal adapters may differ."""
KEYS = {
    "peft_type": "adapter.method",
    "use_dora": "adapter.method",
    "use_rslora": "adapter.method",
    "r": "adapter.rank",
    "init_r": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "alpha": "adapter.alpha",
    "bias": "adapter.bias",
    "num_virtual_tokens": "adapter.virtual_tokens",
    "adapter_len": "adapter.virtual_tokens",
    "adapter_layers": "adapter.layers",
    "trainable_token_indices": "adapter.trainable_tokens",
    "projection_prng_key": "seed",
}
"""The recipe's key of a field, where the names differ."""


@dataclass(frozen=True)
class Start:
    """The adapter as it was found. ``uri``: as in the recipe; ``folder``: of its files; ``step``: of its run, if it has
    one; ``sha256``: of its weights."""

    uri: str
    folder: str
    step: int | None
    sha256: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Candidate:
    """A folder with an adapter's files. ``record``: the commit that they must agree with; None outside of a run."""

    folder: Storage
    record: CommitRecord | None = None

    def names(self) -> list[str]:
        there = self.record.files if self.record else {info.key for info in self.folder.list()}
        return [name for name in FILES if name in there]

    def check(self, name: str, path: Path) -> None:
        """Raises CorruptObject for another file than was committed."""
        if self.record and entry_of_file(path) != self.record.files[name]:
            raise CorruptObject(f"{self.folder.uri(name)} is not what was committed")

    def base(self, folder: Path) -> Mapping[str, Any] | None:
        """Returns the identity of the base model that it was trained on. ``folder``: of its files on this host."""
        stored = self.record.state.get("base") if self.record else None
        info = None if stored else ArtifactInfo.read(folder)
        return stored or (info.base if info else None)


def fetch_start(
    uri: str,
    target: Path,
    section: ModelSection,
    *,
    before: Mapping[str, Any] | None = None,
    warn: Callable[[str], None] = log.warning,
) -> Start:
    """Downloads the adapter's files into ``target``, and compares its base model with ``section``. ``before``: what an
    earlier attempt has begun from, which is preferred while it exists. Raises InputError."""
    candidates = sorted(_candidates(uri), key=lambda one: before is None or one.folder.url != before.get("folder"))
    for candidate in candidates:
        names = _checked_names(uri, candidate)
        try:
            for name in names:
                candidate.folder.download(name, target / name)
                candidate.check(name, target / name)
        except (CorruptObject, FileNotFoundError) as error:
            if candidate.record is None:
                raise InputError(f"adapter.from {uri} changed while it was copied ({error}); run again") from error
            warn(f"adapter.from: {candidate.folder.url} is skipped: {error}")
            continue
        check_base(uri, candidate.base(target), read_adapter_config(target, uri), section, warn)
        step = candidate.record.step if candidate.record else None
        return Start(uri, candidate.folder.url, step, entry_of_file(target / ADAPTER_WEIGHTS)["sha256"])
    raise _nothing(uri)


def fetch_again(start: Start, target: Path) -> None:
    """Downloads the files that another host has found. Raises InputError if they have changed."""
    folder = open_storage(start.folder)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        folder.download(name, target / name)
    if entry_of_file(target / ADAPTER_WEIGHTS)["sha256"] != start.sha256:
        raise InputError(f"adapter.from {start.uri} changed while the workers read it; run the same command again")


def look_at_start(
    uri: str, target: Path, section: ModelSection, warn: Callable[[str], None]
) -> Mapping[str, tuple[int, ...]]:
    """Downloads the configuration only, and compares the base model. Returns the shapes of the adapter's tensors.
    Raises InputError."""
    for candidate in _candidates(uri):
        names = _checked_names(uri, candidate)
        info = candidate.folder.info(ADAPTER_WEIGHTS)
        if info is None:
            continue
        for name in names:
            if name != ADAPTER_WEIGHTS:
                candidate.folder.download(name, target / name)
        check_base(uri, candidate.base(target), read_adapter_config(target, uri), section, warn)
        return shapes_in(candidate.folder, uri)
    raise _nothing(uri)


def shapes_in(folder: Storage, uri: str) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the tensors in the adapter's file. Raises InputError for a damaged file."""
    info = folder.info(ADAPTER_WEIGHTS)
    assert info is not None
    read = folder.read_range
    header = header_of(lambda start, stop: read(ADAPTER_WEIGHTS, start, stop), info.size, f"adapter.from {uri}")
    return {name: entry.shape for name, entry in header.items()}


def _candidates(uri: str) -> Iterator[_Candidate]:
    """Yields the folders that may hold the adapter: of a run the final adapter, and then its checkpoints, the newest
    first."""
    if "://" not in uri and not Path(uri).exists() and HUB_ID.fullmatch(uri):
        yield _Candidate(open_storage(_from_hub(uri)))
        return
    place = open_storage(uri)
    if place.info(layout.RECIPE) is None:
        yield _Candidate(place)
        return
    commits = list_commits(place)
    if commits and is_last(commits[0]) and place.info(f"{layout.ADAPTER}/{ADAPTER_CONFIG}"):
        yield _Candidate(place.child(layout.ADAPTER), chosen_of(place, commits[0]))
    for record in commits:
        yield _Candidate(place.child(layout.checkpoint(record.checkpoint)), record)


def _from_hub(name: str) -> str:
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(name, allow_patterns=list(FILES))
    except Exception as error:
        raise InputError(
            f"adapter.from {name!r} is neither a folder here nor an adapter that the Hub gives: {hub_cause(error)}"
        ) from error


def _checked_names(uri: str, candidate: _Candidate) -> list[str]:
    names = candidate.names()
    if ADAPTER_CONFIG in names and ADAPTER_WEIGHTS in names:
        return names
    what = f"has {ADAPTER_CONFIG} and no {ADAPTER_WEIGHTS}; weights in other files are not read"
    if ADAPTER_CONFIG not in names:
        what = f"holds no {ADAPTER_CONFIG}; name a run or the folder of an adapter, or a complete model in model.path"
    raise InputError(f"adapter.from {uri} {what}")


def _nothing(uri: str) -> InputError:
    return InputError(f"adapter.from {uri} has neither a final adapter nor a complete checkpoint yet: train it first")


def check_base(
    uri: str,
    was: Mapping[str, Any] | None,
    config: Mapping[str, Any],
    section: ModelSection,
    warn: Callable[[str], None],
) -> None:
    """Raises InputError if the adapter was trained on other files than those of ``section``; warns about another name
    if the files are not known. ``was``: the identity of its base model, if it is known."""
    unlike = differences(was, identity_of(section)) if was else []
    if unlike:
        raise InputError(
            f"adapter.from {uri} was trained on another base model than model.path {section.path}: "
            f"{', '.join(unlike)}; name the base model of that adapter"
        )
    named = config.get("base_model_name_or_path")
    if not was and named != section.path:
        warn(
            f"adapter.from {uri} names the base model {named}, and model.path is {section.path}: whether they are the "
            "same is not known"
        )


def check_round_trip(uri: str, adapter: Adapter) -> None:
    """Raises InputError for an adapter whose file does not hold what is trained."""
    if not adapter.round_trips:
        raise InputError(
            f"adapter.from {uri} does not work with adapter.method {adapter.recipe.adapter.label} here: its file holds "
            "what a trained MLP computes and not the MLP; leave encoder_hidden out, or take another method"
        )


def check_settings(uri: str, given: Mapping[str, Any], config: PeftConfig) -> None:
    """Compares an adapter's configuration with the recipe's. Raises InputError with every setting that differs and
    changes what an adapter computes."""
    defaults = {field.name: field.default for field in fields(config) if field.default is not MISSING}
    theirs, mine = {**defaults, **given}, config.to_dict()
    names = ["peft_type"] if _plain(theirs.get("peft_type")) != _plain(mine["peft_type"]) else [*mine, *theirs]
    unlike = [
        f"{name} is {_text(theirs.get(name))} there and {_text(mine.get(name))} here ({KEYS.get(name, 'adapter')})"
        for name in dict.fromkeys(names)
        if not (name in NOT_COMPARED or "dropout" in name) and _plain(theirs.get(name)) != _plain(mine.get(name))
    ]
    if unlike:
        raise InputError(
            f"adapter.from {uri} has other settings than this recipe: {', '.join(unlike)}; take those of that adapter"
        )


def _plain(value: Any) -> Any:
    """Returns a value as JSON has it. What is empty or off is the same as what an older version of peft left out."""
    if isinstance(value, set | frozenset | tuple | list):
        return sorted(map(str, value)) or None
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()} or None
    return getattr(value, "value", value) or None


def _text(value: Any) -> str:
    return str(getattr(value, "value", value))[:80]


def check_tensors(
    uri: str, theirs: Mapping[str, tuple[int, ...]], mine: Mapping[str, tuple[int, ...]], *, complete: bool = True
) -> None:
    """Raises InputError unless both have the same tensors. Not ``complete``: ``mine`` may have more, which the build of
    the model leaves out."""
    foreign, lacking = sorted(theirs.keys() - mine.keys()), sorted(mine.keys() - theirs.keys())
    if foreign:
        raise InputError(
            f"adapter.from {uri}: {len(foreign)} of its {len(theirs)} tensors have no place in this recipe's adapter "
            f"({', '.join(foreign[:LISTED])}); give adapter.target_modules, modules_to_save, trainable_tokens and the "
            "task as it was trained with"
        )
    if lacking and complete:
        raise InputError(
            f"adapter.from {uri} lacks {len(lacking)} of the {len(mine)} tensors of this recipe's adapter "
            f"({', '.join(lacking[:LISTED])}); give adapter.target_modules, modules_to_save, trainable_tokens and the "
            "task as it was trained with"
        )
    for name in sorted(theirs.keys() & mine.keys()):
        if tuple(theirs[name]) != tuple(mine[name]):
            raise InputError(
                f"adapter.from {uri}: {name} has the shape {list(theirs[name])}, and this recipe gives "
                f"{list(mine[name])}"
            )
