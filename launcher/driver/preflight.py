"""Checks what a run needs before any worker starts, when a mistake costs least."""

from __future__ import annotations

import errno
import inspect
import tempfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.data import resolve_chat_template
from trainer.data.formats.dialogue import dialogue_of
from trainer.data.run_data import check_rows
from trainer.errors import InputError, StorageError
from trainer.fast_imports import load_libraries
from trainer.recipe import ModelSection, Recipe
from trainer.recipe.tasks import SEQUENCE, TASKS
from trainer.storage import Storage

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def check_storage(storage: Storage) -> bool:
    """Returns True if the storage has conditional put. Raises InputError if it cannot be written."""
    try:
        return storage.check_writable()
    except StorageError as error:
        if _is_full(error):
            raise InputError(
                f"the disk of {storage.url} is full: make room there, or choose another storage"
            ) from error
        raise


def _is_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__
    return False


def check_model(recipe: Recipe, warn: Callable[[str], None]) -> None:
    """The model is there, whole, and one that the task can use; the adapter's target modules are in it; its tokenizer
    and its positions fit the recipe; the first rows of every source become samples; and what rates texts is there.

    Reads configuration, rows, and of the weights the headers alone. Raises InputError; ``warn`` gets what may be meant.
    """
    load_libraries()
    from trainer.adapters import make_adapter
    from trainer.model import check_weights, fetch_model

    folder = fetch_model(recipe.model, weights=False).folder
    model = _model_without_weights(recipe.model, folder, TASKS[recipe.task].auto_class)
    make_adapter(recipe).check(model)
    check_keys(recipe, model)
    for name in recipe.adapter.idle():
        warn(f"adapter.{name} has no effect with adapter.method {recipe.adapter.label}")
    check_weights(recipe.model)
    tokenizer = load_run_tokenizer(recipe)
    embeddings: Any = model.get_input_embeddings()
    check_vocabulary(recipe.model.path, tokenizer, len(embeddings.weight))
    check_positions(recipe, model, warn)
    for odd in check_rows(recipe, tokenizer):
        warn(odd)
    if recipe.rollout_section is not None:
        from trainer.artifacts.reward_model import check_reward

        check_reward(recipe)
        dialogue_of(recipe, tokenizer, resolve_chat_template(recipe.data.chat_template))
    if TASKS[recipe.task].has_teacher:
        from trainer.worker.start.stored_teacher import has_stored

        if not has_stored(recipe, tokenizer):
            check_teacher(recipe, warn)
    if recipe.generative_eval.count:
        from trainer.worker.texts.generative_eval import AnswerMetric

        AnswerMetric(recipe.generative_eval.metric).close()


def check_teacher(recipe: Recipe, warn: Callable[[str], None]) -> None:
    """Raises InputError if the teacher is not there, is no complete causal language model, has another tokenizer, or
    too few positions. Reads configuration and headers; of an adapter, its files."""
    from trainer.artifacts.teacher import located
    from trainer.model import check_weights, fetch_model

    with located(recipe) as (subject, shared):
        if shared:
            return
        section = subject.section
        try:
            folder = fetch_model(section, weights=False).folder
            model = _model_without_weights(section, folder, TASKS[subject.task].auto_class)
            check_weights(section)
            check_positions(recipe, model, lambda odd: warn(f"distill.teacher: {odd}"))
        except InputError as error:
            raise InputError(f"distill.teacher {recipe.distill.teacher}: {error}") from error


def check_begins_from(recipe: Recipe, warn: Callable[[str], None]) -> None:
    """Checks that the adapter of `adapter.from` is there and fits, as far as its configuration and the header of its
    weights show it. The workers compare the rest: a model's build may leave layers out. Raises InputError."""
    from trainer.adapters import make_adapter
    from trainer.adapters.peft_method import PeftMethod
    from trainer.adapters.targets import ALL_LINEAR
    from trainer.artifacts.adapter_files import read_adapter_config
    from trainer.artifacts.start import check_round_trip, check_settings, check_tensors, look_at_start
    from trainer.plan.config import read_base
    from trainer.plan.meta_model import skeleton

    uri, adapter = recipe.adapter.begins_from, make_adapter(recipe)
    assert uri is not None
    assert isinstance(adapter, PeftMethod)
    check_round_trip(uri, adapter)
    row = TASKS[recipe.task]
    model = skeleton(recipe, read_base(recipe.model, row.auto_class).config)
    with tempfile.TemporaryDirectory(prefix="muster-start-") as folder:
        theirs = look_at_start(uri, Path(folder), recipe.model, warn)
        check_settings(uri, read_adapter_config(Path(folder), uri), adapter.saved_config(model))
    names, others = adapter.saved_layout(model)
    mine = {saved: tuple(model.get_parameter(name).shape) for name, saved in names.items()}
    mine |= {name: tuple(tensor.shape) for name, tensor in others.items()}
    if names and not row.has_head:  # the outputs of a head follow from the data, and peft computes virtual tokens
        check_tensors(uri, theirs, mine, complete=recipe.adapter.target_modules != ALL_LINEAR)


def check_keys(recipe: Recipe, model: PreTrainedModel) -> None:
    """Raises InputError for an adapter of keys and values on a classifier whose class takes none: peft refuses to run
    it. peft does not ask this of causal language models."""
    classifier = TASKS[recipe.task].auto_class == SEQUENCE
    forwards = (inspect.signature(part.forward).parameters for part in (model, model.base_model))  # peft tries both
    takes = any("past_key_values" in parameters for parameters in forwards)
    if recipe.adapter.row.own_vectors == "keys" and classifier and not takes:
        raise InputError(
            f"adapter.method {recipe.adapter.label} gives each layer keys and values, and {type(model).__name__} of "
            f"transformers {metadata.version('transformers')} does not take them, so that peft cannot run the adapter; "
            "choose another method, or an older transformers"
        )


def _model_without_weights(section: ModelSection, folder: Path, auto_class: str) -> PreTrainedModel:
    """The model's modules on torch's meta device, which holds shapes only."""
    import torch
    import transformers

    from trainer.model.base_config import load_config
    from trainer.model.files.configs import UNUSABLE, cause

    config = load_config(section, folder, auto_class)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = getattr(transformers, auto_class).from_config(
                config, trust_remote_code=section.trust_remote_code
            )
    except (*UNUSABLE, RuntimeError) as e:
        raise InputError(
            f"model.path {section.path!r} holds a {config.model_type!r} model that cannot be built: {cause(e)}"
        ) from e
    return model


def check_vocabulary(path: str, tokenizer: PreTrainedTokenizerBase, embeddings: int) -> None:
    """Raises InputError when the tokenizer gives tokens that the model has no embedding for: on a GPU, that would end
    a worker without a word."""
    marks = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos")}
    beyond = {name: number for name, number in marks.items() if number is not None and number >= embeddings}
    if beyond:
        name, number = next(iter(beyond.items()))
        raise InputError(
            f"the tokenizer of {path} gives its {name}_token {getattr(tokenizer, f'{name}_token')!r} the number "
            f"{number}, and the model has embeddings for {embeddings} tokens only: set {name}_token in "
            "tokenizer_config.json to the one that the model was trained with"
        )
    if tokenizer.vocab_size > embeddings:
        raise InputError(
            f"the tokenizer of {path} has {tokenizer.vocab_size} tokens, and the model embeddings for {embeddings} "
            "only: put the tokenizer that belongs to the model beside its config.json"
        )


def check_positions(recipe: Recipe, model: PreTrainedModel, warn: Callable[[str], None]) -> None:
    """Warns if samples may be longer than the model was trained for; raises InputError if it has no such positions.
    Positions start at 0 for each sample of a pack, so a long pack of short samples is fine."""
    positions = getattr(model.config, "max_position_embeddings", None)
    length = recipe.data.sequence_length
    if not isinstance(positions, int) or length <= positions:
        return
    text = f"data.sequence_length {length} is more than the {positions} positions that the model was trained with"
    if not recipe.data.packing or _learns_positions(model, positions):
        raise InputError(f"{text}; set it to {positions} or less")
    warn(f"{text}: samples that are longer than {positions} tokens will be learnt badly, or set it to {positions}")


def _learns_positions(model: PreTrainedModel, positions: int) -> bool:
    """Returns True if positions are rows of a table of limited length (GPT-2, OPT) and not rotary."""
    import torch

    rows = {m.num_embeddings for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    return not rows.isdisjoint((positions, positions + 2))  # OPT keeps two rows to itself


def load_run_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    from trainer.model import fetch_model, load_tokenizer

    files = fetch_model(recipe.model, weights=False)
    return load_tokenizer(files.folder, trust_remote_code=recipe.model.trust_remote_code)
