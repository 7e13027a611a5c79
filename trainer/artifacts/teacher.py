"""The teacher of a recipe with `task: distill`: an adapter on the student's base model, or a second model.

A second model is complete on each rank, or sharded over the ranks where the student's strategy shards anything.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from trainer.artifacts.adapter_files import ADAPTER_WEIGHTS
from trainer.artifacts.load import load
from trainer.artifacts.locate import Artifact, find, tokenizer_of
from trainer.artifacts.sharded import load_sharded
from trainer.artifacts.shared_base import PlannedModel, address_of, is_same_base, shared_adapter
from trainer.distributed.world import World
from trainer.errors import InputError
from trainer.model import check_isolation, check_left_to_right, fetch_model, load_tokenizer
from trainer.model.files.identity import identity_of
from trainer.model.kernels.attention import settle_attention
from trainer.model.placement import Placement
from trainer.recipe import ModelSection, Recipe
from trainer.recipe.methods import METHODS
from trainer.recipe.strategies import Mesh
from trainer.recipe.tasks import TASKS
from trainer.recipe.trust import Trust
from trainer.run.frozen import read_recipe
from trainer.storage import open_storage
from trainer.tasks.distill.head import DistillHead
from trainer.tasks.distill.teacher import ADAPTER, ModelTeacher, SharedTeacher, Teacher

log = logging.getLogger(__name__)


def teacher_of(recipe: Recipe, device: torch.device, world: World | None = None) -> Teacher | None:
    """Returns the recipe's teacher; None if its task has none. ``world``: the ranks that train together, which all call
    it; None for one process. Raises InputError for a teacher that the student cannot learn from."""
    if not TASKS[recipe.task].has_teacher:
        return None
    with _located(recipe) as subject:
        check_vocabulary(recipe, _tokenizer(recipe), tokenizer_of(subject))
        identity = _identity(subject, str(recipe.distill.teacher))
        if (shared := _shared(subject, recipe)) is not None:
            return SharedTeacher(shared, identity)
        return _second_model(subject, recipe, device, world, identity)


@contextmanager
def located(recipe: Recipe) -> Iterator[tuple[Artifact, bool]]:
    """Finds the teacher's files; yields it, and True if it shares the student's base model. Raises InputError if it is
    no causal language model, or has another tokenizer than the student."""
    with _located(recipe) as subject:
        check_vocabulary(recipe, _tokenizer(recipe), tokenizer_of(subject))
        yield subject, _shared(subject, recipe) is not None


def teacher_identity(recipe: Recipe) -> dict[str, Any]:
    """Returns what identifies the recipe's teacher, without loading it. Raises InputError if it is not there, or has
    another tokenizer than the student."""
    with located(recipe) as (subject, _):
        return _identity(subject, str(recipe.distill.teacher))


def is_gone(place: str) -> bool:
    """Returns True if nothing is stored at a teacher's location any more."""
    return not (open_storage(place).list() if "://" in place else Path(place).exists())


def planned_teacher(recipe: Recipe) -> PlannedModel | None:
    """Returns the teacher for a plan, which reads no weights; None if the task has none."""
    place = recipe.distill.teacher
    if not TASKS[recipe.task].has_teacher or place is None:
        return None
    address = address_of(place)
    if address.adapters:
        with _located(recipe) as subject:
            return PlannedModel(subject.section, _shared(subject, recipe) is not None)
    if address.model is not None:
        return PlannedModel(_quantised(ModelSection(path=place), recipe), as_stored=True)
    begun = read_recipe(open_storage(place))
    section = _quantised(begun.model, recipe)
    return PlannedModel(section, begun.adapter.row.plain_lora == 1 and is_same_base(section, recipe))


@contextmanager
def _located(recipe: Recipe) -> Iterator[Artifact]:
    """The code of a teacher may run only if it is the recipe's own base model and the recipe trusts it."""
    place = str(recipe.distill.teacher)
    with tempfile.TemporaryDirectory(prefix="muster-teacher-") as folder:
        subject = find(address_of(place), Path(folder), trust=Trust(model=recipe.model))
        if TASKS[subject.task].has_head:
            raise InputError(
                f"distill.teacher {place} is for task {subject.task}, and gives no distributions of tokens; name a "
                "causal language model"
            )
        yield replace(subject, section=_quantised(subject.section, recipe))


def _quantised(section: ModelSection, recipe: Recipe) -> ModelSection:
    kind = recipe.distill.quantization
    return section if kind is None else section.model_copy(update={"quantization": kind})


def _shared(subject: Artifact, recipe: Recipe) -> Any:
    """Returns the teacher's adapter for the student's base model; None if it needs a model of its own."""
    place, own = recipe.distill.teacher, recipe.adapter
    # The student would train these parts of the base model, which the teacher would then use.
    if own.modules_to_save or own.trainable_tokens or own.bias not in (None, "none"):
        return None
    found = shared_adapter(subject, recipe, ADAPTER, f"distill.teacher {place}")
    if found is None or found.adapter.config.target_parameters:
        return None
    log.info("%s is loaded on the student's base model", place)
    return found.adapter


def _second_model(
    subject: Artifact, recipe: Recipe, device: torch.device, world: World | None, identity: Mapping[str, Any]
) -> ModelTeacher:
    seed = subject.recipe.seed if subject.recipe else 0
    if world is not None and recipe.strategy.row.sharded:
        mesh, offload = Mesh.of(recipe, world.size), recipe.strategy.offload
        model = load_sharded(subject, world, mesh, offload=offload, seed=seed)
    else:
        model = load(subject, Placement.on(device), None, seed=seed).requires_grad_(False)
    head = DistillHead(model, recipe.distill, packed=recipe.data.packing)
    _settle(model, head, recipe, subject, device)
    return ModelTeacher(model, head, identity)


def _settle(model: Any, head: DistillHead, recipe: Recipe, subject: Artifact, device: torch.device) -> None:
    """Sets the attention kernel, and checks that the model takes the rows of a micro-batch as the student does. Raises
    InputError."""
    compute = recipe.compute
    if subject.method not in METHODS or METHODS[subject.method].own_vectors != "none":
        compute = compute.model_copy(update={"attention": "sdpa"})
    as_teacher = recipe.model_copy(update={"model": subject.section, "compute": compute})
    length, path = recipe.data.sequence_length, subject.section.path
    try:
        settle_attention(as_teacher, model, model, head.inputs, device)
        check_left_to_right(model, model, head.inputs, device, path, length)
        if recipe.data.packing:
            check_isolation(model, model, head.inputs, device, path, length)
    except InputError as error:
        raise InputError(f"distill.teacher {recipe.distill.teacher}: {error}") from error


def _tokenizer(recipe: Recipe) -> Any:
    folder = fetch_model(recipe.model, weights=False).folder
    return load_tokenizer(folder, trust_remote_code=recipe.model.trust_remote_code)


def check_vocabulary(recipe: Recipe, student: Any, teacher: Any) -> None:
    """Raises InputError if a token has another number for the teacher than for the student."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours == theirs:
        return
    token = min(
        (token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)),
        key=lambda token: (min(n for n in (ours.get(token), theirs.get(token)) if n is not None), token),
    )
    raise InputError(
        f"distill.teacher {recipe.distill.teacher} has another vocabulary than model.path {recipe.model.path}: the "
        f"token {token[:80]!r} is {_number(theirs.get(token))} of the teacher and {_number(ours.get(token))} of the "
        "student; name a teacher with the same tokenizer"
    )


def _number(number: int | None) -> str:
    return "no token" if number is None else f"number {number}"


def _identity(subject: Artifact, place: str) -> dict[str, Any]:
    files = {name: folder / ADAPTER_WEIGHTS for name, folder in subject.adapters.items()}
    adapters = {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items() if file.is_file()}
    base = identity_of(subject.section)
    quantization, dtype = subject.section.quantization, subject.section.dtype
    return {"location": place, "base": base, "adapters": adapters, "quantization": quantization, "dtype": dtype}
