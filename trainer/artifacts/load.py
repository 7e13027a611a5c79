"""Loading of a saved model: the base model as in training, with the saved adapter on it.

Plain peft loads the adapter. The exception is pissa and olora on a quantised base: they were trained on the quantised
residual, which differs from the quantised base. So they are restored as in training.
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
from trainer.adapters.peft_targets import as_attached, names_as_given
from trainer.adapters.pissa import Residual
from trainer.adapters.prompts import insert_for_each_sample
from trainer.artifacts.adapter_files import ADAPTER_WEIGHTS, check_patterns, check_tensors, read_adapter_config
from trainer.artifacts.locate import Artifact
from trainer.bounds import bounded_memory
from trainer.errors import InputError, MusterError
from trainer.experts import compute_by_expert, unpacked_shapes
from trainer.model import Head, build, fetch_model
from trainer.model.files.identity import WEIGHTS, differences, identity_of
from trainer.model.files.remote_code import brings_code, check_code
from trainer.model.offload import LaidOut, lay_out, spread
from trainer.model.placement import Placement
from trainer.recipe import Recipe
from trainer.recipe.tasks import CAUSAL, TASKS

log = logging.getLogger(__name__)

MOST_BYTES, TIMES = 4 * 2**30, 8
"""Limit of host memory to create an adapter: so many bytes, plus so many times the size of its files."""


def load(subject: Artifact, placement: Placement, labels: tuple[str, ...] | None, *, seed: int = 0) -> Any:
    """Returns the model in evaluation mode, placed by ``placement``. ``labels``: names of a classifier's outputs.
    ``seed``: of the run, for the initial values of a classifier's head. Of several adapters, the first is active.

    Raises InputError when an adapter does not fit the base model."""
    folder = fetch_model(subject.section).folder
    check_base(subject, folder)
    if not placement.disk:
        return _in_memory(subject, folder, placement, Head(labels, seed) if labels else None).eval()
    if labels and subject.adapters:
        raise InputError(f"{subject.section.path} does not fit in memory, and the head of a classifier is put on it")
    return spread(subject.section, folder, placement, partial(attach, subject), _auto(subject))


def check_base(subject: Artifact, folder: Path) -> None:
    """Raises InputError when the base model in ``folder`` needs code that is not trusted, or when the adapter was
    trained on a base model of another shape, even if it would fit. Warns about a base model with other weights."""
    if brings_code(folder) and not subject.section.trust_remote_code:
        check_code(subject.section, folder)
        log.warning("%s brings code that was not run; transformers' own takes its place", subject.section.path)
    was = subject.origin.base if subject.origin and subject.adapters else None
    unlike = differences(was, identity_of(subject.section)) if was else []
    shape = [difference for difference in unlike if not difference.startswith(WEIGHTS)]
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


def _in_memory(subject: Artifact, folder: Path, placement: Placement, head: Head | None) -> Any:
    def base(quantization: str, place: Placement) -> Any:
        section = subject.section.model_copy(update={"quantization": quantization})
        return build(section, folder, place, full=False, checkpointing=False, head=head).model

    model = base(subject.section.quantization, placement)
    if not subject.adapters:
        return model
    if on_residual(subject):
        assert subject.recipe is not None
        (adapter,) = subject.adapters.values()
        with _fits(subject.section.path, adapter):
            return _as_trained(subject.recipe, model, adapter, lambda: base("none", Placement.on("cpu")))
    # Without `torch_device`, peft puts each part of the adapter on the device of its layer (several GPUs).
    return _adapted(subject, model, {} if placement.limits else {"torch_device": str(placement.device)})


def on_residual(subject: Artifact) -> bool:
    """Returns True for an adapter that was trained on the quantised rest of its base model, which has to be computed
    again."""
    recipe = subject.recipe
    return recipe is not None and recipe.adapter.row.residual and recipe.model.quantization != "none"


def without_weights(subject: Artifact, folder: Path) -> LaidOut:
    """Returns the base model on the meta device, with the adapters on it, which have their weights."""
    return lay_out(subject.section, folder, torch.device("cpu"), partial(attach, subject), _auto(subject))


def _auto(subject: Artifact) -> Any:
    import transformers

    return getattr(transformers, TASKS[subject.task].auto_class)


def attach(subject: Artifact, base: Any) -> Any:
    """Puts the adapters, with their weights on the host, on a base model without weights."""
    from peft import load_peft_weights, set_peft_model_state_dict

    if not subject.adapters:
        return base
    model = _adapted(subject, base, {"low_cpu_mem_usage": True, "torch_device": "cpu"})
    # peft has loaded the weights and then moved them to the base's device, meta. So they are loaded again.
    with StayingOnHost():
        for name, folder in subject.adapters.items():
            weights = load_peft_weights(str(folder), device="cpu")
            set_peft_model_state_dict(model, weights, adapter_name=name, low_cpu_mem_usage=True)
    return model


@contextmanager
def _fits(base: str, folder: Path) -> Iterator[None]:
    """Limits the memory inside the context, in which peft creates an adapter, and turns peft's errors into
    InputError."""
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    try:
        with bounded_memory(MOST_BYTES + TIMES * size):
            yield
    except MusterError:
        raise
    except Exception as error:  # peft raises errors of any type for untrusted files
        cause = " ".join(str(error).split())[:400] or type(error).__name__
        raise InputError(f"the adapter does not fit the base {base}: {cause}") from error


def _adapted(subject: Artifact, base: Any, how: dict[str, Any]) -> Any:
    from peft import PeftConfig, PeftModel

    (first, folder), *others = subject.adapters.items()
    modules = [name for name, _ in base.named_modules()]
    for name, one in subject.adapters.items():
        if not (one / ADAPTER_WEIGHTS).is_file():
            raise InputError(f"the adapter {name} has no {ADAPTER_WEIGHTS}, and weights in other files are not read")
        check_patterns(read_adapter_config(one, name), modules, name)
    with _fits(subject.section.path, folder), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys")
        config = PeftConfig.from_pretrained(str(folder))
        if not others:
            as_attached(config, base)
        try:
            with names_as_given(base, config), unpacked_shapes(base):
                model = PeftModel.from_pretrained(base, str(folder), adapter_name=first, config=config, **how)
                for name, other in others:
                    model.load_adapter(str(other), adapter_name=name, **how)
        except UserWarning as lacking:
            raise ValueError(str(lacking)) from None
        compute_by_expert(model)
        for name, one in subject.adapters.items():
            check_tensors(model, name, one, subject.section.path)
    if TASKS[subject.task].auto_class == CAUSAL:
        insert_for_each_sample(model, read_adapter_config(folder, first)["peft_type"])
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
                if value.shape != parameter.shape:  # `copy_` would broadcast a single row
                    raise ValueError(f"{name} is {tuple(value.shape)}, and {tuple(parameter.shape)} is wanted")
                parameter.copy_(value)
        adapter.after_restore(model, file.get_tensor)
    return model


def reads_a_prompt(model: Any) -> bool:
    """Returns True if trained vectors precede the text, which transformers' generation in padded batches does not
    support."""
    config = getattr(model, "active_peft_config", None)
    return config is not None and (config.is_prompt_learning or config.peft_type == "ADAPTION_PROMPT")
