"""Merging: an adapter becomes part of the base's weights, or several adapters become one.

An adapter is always merged into the unquantised base: quantising the merged weights would lose the update. The written
model is loaded again and must give the logits of base and adapter. The output folder gets its name only after this
check, so that a wrong model cannot be used by mistake.
"""

from __future__ import annotations

import inspect
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from trainer.adapters.meta_init import StayingOnHost
from trainer.artifacts.combine import Mix, mixed
from trainer.artifacts.load import load, reads_a_prompt, without_weights
from trainer.artifacts.locate import DEFAULT, Artifact, ArtifactRef, base_files, find, tokenizer_of
from trainer.artifacts.merge_streamed import merge_in_parts
from trainer.checkpoint.artifact_info import ArtifactInfo
from trainer.checkpoint.model_card import merged_card
from trainer.errors import CorruptObject, InputError, StorageError, UsageError
from trainer.experts import is_mixture
from trainer.model.base_config import is_packed, load_config
from trainer.model.placement import Placement, placement_for
from trainer.recipe.trust import NOBODY, Trust

TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
"""Limits of the norm of the difference of logits, relative to their norm. Below float32, merging rounds the sum of
weight and update, which base and adapter keep separate."""
PROBES = ("The quick brown fox jumps over the lazy dog.", "Question: how many are 3 and 4?\nAnswer: 3 + 4 = 7")
SHARD = "5GB"


@dataclass(frozen=True)
class Merged:
    """A merged model. ``difference``: of the logits before and after, relative to their norm; ``tolerance``: the
    largest one that is accepted."""

    subject: Artifact
    folder: Path
    difference: float

    @property
    def tolerance(self) -> float:
        return TOLERANCES[self.subject.section.dtype]


def merge(
    address: ArtifactRef,
    out: Path,
    *,
    mix: Mix | None = None,
    dtype: str | None = None,
    limits: Mapping[int | str, int] | None = None,
    say: Callable[[str], None] = lambda phase: None,
    trust: Trust = NOBODY,
) -> Merged:
    """Writes the merged model into the new folder ``out``. ``mix``: one of several adapters, or their weights.
    ``dtype``: of the merged weights, by default the one of training. ``trust``: whose code may run.

    Raises UsageError for an artifact that cannot be merged, CorruptObject when the result has other logits."""
    with _scratch(out) as (folder, scratch):
        say("fetching the adapter")
        found = find(address, scratch / "adapter", trust=trust)
        if not found.adapters:
            raise UsageError(f"{found.section.path} is a whole model already: there is no adapter to merge")
        if _is_packed(found):
            raise InputError("the base's files are quantised: name an unquantised base in the adapter's muster.json")
        subject = _unquantised(found, dtype)
        files = base_files(subject, weights=True)
        with placement_for(subject.section, files, limits) as placement:
            tokenizer = tokenizer_of(subject)
            probes = [torch.tensor([tokenizer(text)["input_ids"]], device=placement.device) for text in PROBES]
            say("loading base and adapter")
            before = _merge_into(folder, subject, placement, mix, probes, say)
            tokenizer_of(subject).save_pretrained(folder)
            say("comparing logits")
            difference = _compare(folder, subject, placement, probes, before)
        _origin(subject, "none").write(folder)
        (folder / "README.md").write_text(merged_card(subject.section, subject.method, difference))
    return Merged(subject, out, difference)


def combine(
    address: ArtifactRef,
    out: Path,
    mix: Mix,
    *,
    say: Callable[[str], None] = lambda phase: None,
    trust: Trust = NOBODY,
) -> Artifact:
    """Writes the combination ``mix`` of several adapters into the new folder ``out``, as one adapter."""
    with _scratch(out) as (folder, scratch):
        say("fetching the adapters")
        subject = find(address, scratch / "adapter", trust=trust)
        if not subject.adapters:
            raise UsageError(f"{subject.section.path} is a whole model: there is nothing to combine")
        mix.check(list(subject.adapters))
        say("combining")
        plain = replace(subject, recipe=None) if _is_packed(subject) else _unquantised(subject, None)
        model = without_weights(plain, base_files(plain, weights=True)).model
        with StayingOnHost():
            name = mixed(model, mix)
        model.peft_config[name].base_model_name_or_path = subject.section.path
        model.save_pretrained(str(scratch / "written"), selected_adapters=[name])
        written = scratch / "written"
        for file in sorted((written / name if name != DEFAULT else written).iterdir()):
            if file.suffix in (".safetensors", ".json"):
                shutil.move(file, folder / file.name)
        tokenizer_of(subject).save_pretrained(folder)
        _origin(subject, subject.method).write(folder)
    return subject


@contextmanager
def _scratch(out: Path) -> Iterator[tuple[Path, Path]]:
    """Yields the folder to write, which is renamed to ``out`` if the context succeeds, and a folder for temporary
    files. Raises StorageError when the disk is full."""
    from safetensors import SafetensorError

    if "://" in str(out) or str(out).startswith(("s3:", "gs:", "hf:")):
        raise UsageError(f"--out {out} is no folder of this machine: write it here, and copy it")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out {out} is there already: name a new folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written: {error.strerror or error}") from error
    try:
        with tempfile.TemporaryDirectory(prefix="muster-merge-") as scratch:
            yield part, Path(scratch)
        if out.exists():
            out.rmdir()
        part.chmod(0o755)
        part.rename(out)
    except (OSError, SafetensorError) as error:
        cause = " ".join(str(error).split())[:200]
        raise StorageError(f"{out} was not written, and nothing is left of it: {cause}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _is_packed(subject: Artifact) -> bool:
    return is_packed(load_config(subject.section, base_files(subject), None))


def _unquantised(subject: Artifact, dtype: str | None) -> Artifact:
    changes = {"quantization": "none", "dtype": dtype or subject.section.dtype}
    return replace(subject, section=subject.section.model_copy(update=changes), recipe=None)


def _merge_into(
    folder: Path,
    subject: Artifact,
    placement: Placement,
    mix: Mix | None,
    probes: list[torch.Tensor],
    say: Callable[[str], None],
) -> list[torch.Tensor]:
    """Writes the merged model into ``folder``. Returns the logits of base and adapter for ``probes``."""
    model = load(subject, placement, subject.classes)
    if reads_a_prompt(model):
        raise UsageError(f"{subject.method} trains vectors before the text: there is no weight to merge them into")
    if mix is not None:
        if placement.disk and len(mix.weights) > 1:
            raise UsageError("the base does not fit in memory: combine the adapters first, by --as-adapter, then merge")
        mixed(model, mix)
    elif len(subject.adapters) > 1:
        raise UsageError(f"say which of {', '.join(subject.adapters)} to merge, or how much of each, by --use")
    before = _logits(model, probes)
    say("merging")
    try:
        _write(folder, subject, model, placement)
    except (NotImplementedError, AttributeError, TypeError) as error:
        raise UsageError(f"peft cannot merge {subject.method}: {error}") from error
    return before


def _write(folder: Path, subject: Artifact, model: Any, placement: Placement) -> None:
    active = list(model.active_adapters)
    if placement.disk:
        laid_out = without_weights(subject, base_files(subject))
        merge_in_parts(laid_out, active, folder)
        return
    _untie(model)
    _check_shared(model)
    merged = model.merge_and_unload(safe_merge=True, adapter_names=active)
    merged.config.architectures = [type(merged).__name__]
    merged.save_pretrained(str(folder), max_shard_size=SHARD)


def _check_shared(model: Any) -> None:
    """Raises UsageError if layers share a weight and have adapters of their own: the sum would be in all of them."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    seen: dict[int, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        layer: Any = module
        weight = getattr(layer.get_base_layer(), getattr(layer, "parameter_name", "weight"), None)
        first = seen.setdefault(id(weight), name) if isinstance(weight, torch.nn.Parameter) else name
        if first != name:
            plain = [n.removeprefix("base_model.model.") for n in (first, name)]
            raise UsageError(
                f"{' and '.join(plain)} are one weight in the base model, and each has an adapter of its own: these "
                "cannot be merged; load the adapter with peft"
            )


def _untie(model: Any) -> None:
    """Gives embeddings or a head with an adapter a weight of their own, where these two share one.

    peft would merge into the shared weight, and so change both. It notes in the configuration that they differ."""
    base = model.get_base_model()
    ends = base.get_input_embeddings(), base.get_output_embeddings()
    for one, other in (ends, ends[::-1]):
        layer: Any = getattr(one, "base_layer", one)
        shared: Any = getattr(other, "weight", None)
        if layer is not one and layer.weight is shared:
            layer.weight = torch.nn.Parameter(shared.detach().clone(), requires_grad=False)


@torch.no_grad()
def _logits(model: Any, probes: list[torch.Tensor]) -> list[torch.Tensor]:
    """Returns the logits [1, L, V] of each text, or [1, C] of a classifier."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    plain = {"use_cache": False} if "use_cache" in inspect.signature(base.forward).parameters else {}
    return [model(input_ids=ids, **plain).logits.float().cpu() for ids in probes]


def _difference(before: Sequence[torch.Tensor], after: Sequence[torch.Tensor], *, mixture: bool) -> float:
    """Returns the norm of the change of the logits, relative to their norm.

    ``mixture``: it is that of the median token. Rounding can give a few tokens another expert, and change those after
    them too, while a wrong sum changes all."""
    pairs = [((a - b).norm(dim=-1).flatten(), b.norm(dim=-1).flatten()) for a, b in zip(after, before, strict=True)]
    moved, size = (torch.cat(norms) for norms in zip(*pairs, strict=True))
    if mixture:
        return float((moved / size).median())
    return float(moved.norm() / size.norm()) if size.any() else float(moved.norm())


def _compare(
    folder: Path, subject: Artifact, placement: Placement, probes: list[torch.Tensor], before: list[torch.Tensor]
) -> float:
    there = {"path": str(folder), "revision": "main"}
    whole = replace(subject, section=subject.section.model_copy(update=there), adapters={})
    model = load(whole, placement, subject.classes)
    difference = _difference(before, _logits(model, probes), mixture=is_mixture(model))
    dtype = subject.section.dtype
    if not difference <= TOLERANCES[dtype]:
        hint = "" if dtype == "float32" else "; merge with --dtype float32"
        raise CorruptObject(
            f"the merged model's logits differ from the adapter's by {difference:.1e} of their norm, more than "
            f"{TOLERANCES[dtype]:g}: nothing was kept{hint}"
        )
    return difference


def _origin(subject: Artifact, method: str) -> ArtifactInfo:
    known = subject.origin
    data = (known.format, known.template) if known else (None, None)
    return ArtifactInfo(subject.task, method, subject.section, *data)
