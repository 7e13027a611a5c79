"""The model that was saved: the base as training held it, with the saved adapter on it.

Plain peft puts it there, as it would anywhere else. But pissa and olora were trained on what is left of the base, and
quantising that is another thing than quantising the base; so they are put back as training does on a quantised one.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trainer.adapters import make_adapter
from trainer.adapters.meta_init import StayingOnHost
from trainer.adapters.packed_prompts import before_embeddings, before_keys
from trainer.adapters.pissa import Residual
from trainer.artifacts.adapter_files import ADAPTER_WEIGHTS, check_patterns, check_tensors, read_adapter_config
from trainer.artifacts.locate import Artifact
from trainer.bounds import bounded_memory
from trainer.errors import InputError, MusterError
from trainer.model import Head, build, fetch_model
from trainer.model.files.identity import WEIGHTS, differences, identity_of
from trainer.model.files.remote_code import brings_code, check_code
from trainer.model.offload import LaidOut, lay_out, spread
from trainer.model.placement import Placement
from trainer.recipe import Recipe
from trainer.recipe.sections.tasks import AUTO_CLASSES, CAUSAL

log = logging.getLogger(__name__)

MOST_BYTES, TIMES = 4 * 2**30, 8
"""Bound of the host's memory for laying an adapter out: so many bytes, and so many times its file."""
INSERTED: dict[str, Callable[[Any], None]] = {
    "PROMPT_TUNING": before_embeddings,
    "P_TUNING": before_embeddings,
    "PREFIX_TUNING": before_keys,
}


def load(subject: Artifact, placement: Placement, labels: tuple[str, ...] | None, *, seed: int = 0) -> Any:
    """In evaluation mode where ``placement`` says. ``labels``: of a classifier's outputs. ``seed``: of the run, whose
    head it may be. Of several adapters the first is switched on.

    Raises InputError when an adapter does not fit the base."""
    folder = fetch_model(subject.section).folder
    if brings_code(folder) and not subject.section.trust_remote_code:
        check_code(subject.section, folder)
        log.warning("%s brings code that was not run; transformers' own takes its place", subject.section.path)
    if subject.adapters:
        _check_base(subject)
    if placement.disk:
        return _spread(subject, folder, placement, labels)
    return _whole(subject, folder, placement, Head(labels, seed) if labels else None).eval()


def _check_base(subject: Artifact) -> None:
    """Raises InputError when the adapter was trained on a base of another shape, on which it may still fit."""
    was = subject.origin.base if subject.origin else None
    unlike = differences(was, identity_of(subject.section)) if was else []
    shape = [told for told in unlike if not told.startswith(WEIGHTS)]
    if shape:
        raise InputError(
            f"the adapter does not fit the base {subject.section.path}: it was trained on another, of which "
            f"{', '.join(shape)}; name that one"
        )
    if unlike:
        log.warning(
            "%s holds other weights than the base that the adapter was trained on, or the same in another type: its "
            "answers will not be those of training",
            subject.section.path,
        )


def _whole(subject: Artifact, folder: Path, placement: Placement, head: Head | None) -> Any:
    def base(quantization: str, place: Placement) -> Any:
        section = subject.section.model_copy(update={"quantization": quantization})
        return build(section, folder, place, full=False, checkpointing=False, head=head).model

    model = base(subject.section.quantization, placement)
    if not subject.adapters:
        return model
    recipe = subject.recipe
    if recipe and _from_the_rest(recipe):
        (adapter,) = subject.adapters.values()
        with _fits(subject.section.path, adapter):
            return _as_trained(recipe, model, adapter, lambda: base("none", Placement.on("cpu")))
    # Over several GPUs peft puts each part where its layer lies.
    return _adapted(subject, model, {} if placement.limits else {"torch_device": str(placement.device)})


def _spread(subject: Artifact, folder: Path, placement: Placement, labels: tuple[str, ...] | None) -> Any:
    if labels and subject.adapters:
        raise InputError(f"{subject.section.path} does not fit in memory, and the head of a classifier is put on it")
    return spread(subject.section, folder, placement, partial(_attach, subject), _auto(subject))


def without_weights(subject: Artifact, folder: Path) -> LaidOut:
    """The base on the meta device, with the adapters' own weights on it."""
    return lay_out(subject.section, folder, torch.device("cpu"), partial(_attach, subject), _auto(subject))


def _auto(subject: Artifact) -> Any:
    import transformers

    return getattr(transformers, AUTO_CLASSES[subject.task])


def _attach(subject: Artifact, base: Any) -> Any:
    """Puts the adapters on a base without weights. peft lays them out without weights too, loads them, and moves them
    to where the base is: nowhere. So they are loaded once more, and stay on the host."""
    from peft import load_peft_weights, set_peft_model_state_dict

    if not subject.adapters:
        return base
    model = _adapted(subject, base, {"low_cpu_mem_usage": True, "torch_device": "cpu"})
    with StayingOnHost():
        for name, folder in subject.adapters.items():
            weights = load_peft_weights(str(folder), device="cpu")
            set_peft_model_state_dict(model, weights, adapter_name=name, low_cpu_mem_usage=True)
    return model


@contextmanager
def _fits(base: str, folder: Path) -> Iterator[None]:
    """Around what lays an adapter out as its files say, in the memory that they can need."""
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    try:
        with bounded_memory(MOST_BYTES + TIMES * size):
            yield
    except MusterError:
        raise
    except Exception as error:  # of peft, at whatever is in the files
        said = " ".join(str(error).split())[:400] or type(error).__name__
        raise InputError(f"the adapter does not fit the base {base}: {said}") from error


def _from_the_rest(recipe: Recipe) -> bool:
    return recipe.adapter.kind in ("pissa", "olora") and recipe.model.quantization != "none"


def _adapted(subject: Artifact, base: Any, how: dict[str, Any]) -> Any:
    from peft import PeftModel

    (first, folder), *others = subject.adapters.items()
    modules = [name for name, _ in base.named_modules()]
    for name, one in subject.adapters.items():
        if not (one / ADAPTER_WEIGHTS).is_file():
            raise InputError(f"the adapter {name} has no {ADAPTER_WEIGHTS}, and weights in other files are not read")
        check_patterns(read_adapter_config(one, name), modules, name)
    with _fits(subject.section.path, folder), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys")
        try:
            model = PeftModel.from_pretrained(base, str(folder), adapter_name=first, **how)
            for name, other in others:
                model.load_adapter(str(other), adapter_name=name, **how)
        except UserWarning as lacking:
            raise ValueError(str(lacking)) from None
        for name, one in subject.adapters.items():
            check_tensors(model, name, one, subject.section.path)
    kind = read_adapter_config(folder, first)["peft_type"]
    if AUTO_CLASSES[subject.task] == CAUSAL and kind in INSERTED:
        INSERTED[kind](model)
    return model


def _as_trained(recipe: Recipe, base: Any, folder: Path, plain: Callable[[], Any]) -> Any:
    from safetensors import safe_open

    adapter = make_adapter(recipe)
    assert isinstance(adapter, Residual)
    model = adapter.attach(base, plain)
    with safe_open(folder / adapter.weights_file, framework="pt") as file, torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                value = adapter.read_parameter(model, name, file.get_tensor)
                if value.shape != parameter.shape:  # copying would spread one row over all
                    raise ValueError(f"{name} is {tuple(value.shape)}, and {tuple(parameter.shape)} is wanted")
                parameter.copy_(value)
        adapter.after_restore(model, file.get_tensor)
    return model


def reads_a_prompt(model: Any) -> bool:
    """Whether trained vectors stand before the text, for which generation in padded batches is not made."""
    config = getattr(model, "active_peft_config", None)
    return config is not None and (config.is_prompt_learning or config.peft_type == "ADAPTION_PROMPT")
