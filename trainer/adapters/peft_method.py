"""Base class of the methods that peft implements: built from a peft configuration, and saved in peft's format."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from trainer.adapters.base import Adapter, head_modules
from trainer.adapters.meta_init import StayingOnHost, elements_of_rows, original_of, take_values
from trainer.adapters.peft_targets import (
    as_saved,
    attached_targets,
    check_attached,
    lost_by_peft,
    names_as_given,
    refused_by_peft,
    wanted_targets,
)
from trainer.adapters.targets import (
    ALL_LINEAR,
    check_names,
    check_targets,
    matched_linear,
    resolve,
    targeted_experts,
)
from trainer.errors import CorruptObject, InputError
from trainer.experts import unpacked_shapes
from trainer.precision import cast_where_used
from trainer.recipe.tasks import PEFT_TYPES, TASKS

if TYPE_CHECKING:
    from peft import PeftConfig

    from trainer.adapters.base import Read, Rows, ShapeOf

log = logging.getLogger(__name__)

ADAPTER_NAME = "default"


class PeftMethod(Adapter):
    """A subclass defines its ``peft_type`` and maps the recipe's settings to peft's fields (``settings``)."""

    peft_type: ClassVar[str]

    reads_base: ClassVar[bool] = False
    """True if initial values are computed from the base model's weights; the base is then never loaded sharded."""

    adapts_experts: ClassVar[bool] = False
    """True if peft has this method for parameters, as which transformers keeps experts."""

    def settings(self, base: torch.nn.Module) -> dict[str, Any]:
        """Returns the fields of peft's configuration, without those that every method has."""
        raise NotImplementedError

    def targets(self, base: torch.nn.Module) -> str | list[str]:
        assert self.recipe.adapter.target_modules is not None
        found = resolve(base, self.recipe.adapter.target_modules, experts=self.adapts_experts)
        if self.recipe.adapter.target_modules != ALL_LINEAR:
            return found
        refused = refused_by_peft(base, found) if "LORA" in self.peft_type else set()
        return [name for name in found if name not in self.left_out | refused]

    def expert_targets(self, base: torch.nn.Module) -> list[str]:
        """Returns the full names of the experts' parameters that get an adapter."""
        section = self.recipe.adapter
        if not self.adapts_experts or not section.experts or section.target_modules is None:
            return []
        return [name for name in targeted_experts(base, section.target_modules) if name not in self.left_out]

    def may_leave_out(self, model: torch.nn.Module, unused: Sequence[str]) -> list[str]:
        layers = {f"{name}.": target for name, target in attached_targets(model).items()}
        owners = [next((t for prefix, t in layers.items() if name.startswith(prefix)), None) for name in unused]
        if self.recipe.adapter.target_modules != ALL_LINEAR or None in owners:
            return []
        return sorted({owner for owner in owners if owner is not None})

    def check(self, base: Any) -> None:
        section = self.recipe.adapter
        if self._takes_targets(self._fields()) and section.target_modules is not None:
            check_targets(base, section.target_modules, experts=self.adapts_experts and bool(section.experts))
            self._check_ties(base)
        check_names(base, "adapter.modules_to_save", section.modules_to_save)
        if section.trainable_tokens:
            self._check_tokens(base)
        self.config(base, ())

    def _check_tokens(self, base: Any) -> None:
        section, embeddings = self.recipe.adapter, base.get_input_embeddings()
        beyond = [t for t in section.trainable_tokens if t >= embeddings.num_embeddings]
        if beyond:
            raise InputError(
                f"adapter.trainable_tokens {beyond} are beyond the model's {embeddings.num_embeddings} embeddings"
            )
        sharing = [n for n, m in base.named_modules() if getattr(m, "weight", None) is embeddings.weight]
        for name in section.modules_to_save:
            if any(f".{module}".endswith(f".{name}") for module in sharing):
                raise InputError(
                    f"adapter.modules_to_save {name} trains all rows of the embeddings, and adapter.trainable_tokens "
                    "some of them; leave one of the two out"
                )

    def _check_ties(self, base: Any) -> None:
        """Raises InputError for a head whose weight the method would change, if it is that of the embeddings too."""
        head, weight = base.get_output_embeddings(), base.get_input_embeddings().weight
        if not self.recipe.adapter.row.residual or getattr(head, "weight", None) is not weight:
            return
        if any(base.get_submodule(name) is head for name in matched_linear(base, self.targets(base))):
            raise InputError(
                f"adapter.method {self.recipe.adapter.label} changes the weights that it adapts, and the head in "
                "adapter.target_modules shares its weight with the embeddings: leave the head out, or use lora"
            )

    def config_class(self) -> type[PeftConfig]:
        from peft import PeftType
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(self.peft_type)]

    def _fields(self) -> list[str]:
        return list(self.config_class().__dataclass_fields__)

    def _takes_targets(self, fields: list[str]) -> bool:
        section = self.recipe.adapter
        return section.uses("target_modules") and section.target_modules is not None and "target_modules" in fields

    def config(self, base: torch.nn.Module, trained_whole: Iterable[str]) -> PeftConfig:
        """Returns peft's configuration. ``trained_whole``: the task's own modules, which are saved with the adapter."""
        section, fields = self.recipe.adapter, self._fields()
        task_type = PEFT_TYPES[TASKS[self.recipe.task].auto_class]
        common: dict[str, Any] = {"task_type": task_type, "revision": self.recipe.model.revision}
        if self._takes_targets(fields):
            common["target_modules"] = self.targets(base)
            if experts := self.expert_targets(base):
                common["target_parameters"] = experts
        extra = list(dict.fromkeys([*trained_whole, *section.modules_to_save]))
        if extra:
            common["modules_to_save"] = extra
        if section.trainable_tokens:
            common["trainable_token_indices"] = list(section.trainable_tokens)
        return self.config_class()(**common, **self.settings(base))

    def attach(self, base: Any, plain: Callable[[], torch.nn.Module] | None = None) -> torch.nn.Module:
        from peft import get_peft_model

        self.check(base)
        config = self.config(base, head_modules(base))
        wanted = wanted_targets(base, config)
        try:
            with seeded(self.recipe.seed), names_as_given(base, config), unpacked_shapes(base):
                model = get_peft_model(base, config)
        except (ValueError, TypeError, NotImplementedError) as e:
            section = self.recipe.adapter
            targets = f"adapter.target_modules {section.target_modules!r}"
            what = targets if section.uses("target_modules") else f"the settings of adapter.method {section.label}"
            raise InputError(f"{what} do not fit this model: {e}") from e
        except RuntimeError as e:
            if not next(base.parameters()).is_meta:
                raise
            label = self.recipe.adapter.label
            raise InputError(f"adapter.method {label} cannot be laid out without the model's weights: {e}") from e
        check_attached(model, wanted)
        self.complete(model)
        self.initialise(model, plain)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        if self.recipe.model.dtype != "float32":
            cast_where_used(model)
        self._names, self._constants = self.saved_layout(model)
        self._warn_of_lost(model)
        return model

    def _warn_of_lost(self, model: Any) -> None:
        import peft

        trained = {self._names[name]: p for name, p in model.named_parameters() if name in self._names}
        lost = sorted(lost_by_peft(model, trained) if "LORA" in self.peft_type else ())
        if lost:
            log.warning(
                "peft %s leaves out %d of the adapter's %d tensors when it loads them into %s, since it renames them "
                "(%s): use muster merge, generate and chat",
                *(peft.__version__, len(lost), len(trained), type(model.get_base_model()).__name__, lost[0]),
            )

    def loads_by_shard(self, base: torch.nn.Module) -> bool:
        return not (self.reads_base or self.recipe.adapter.trainable_tokens)  # the latter start as rows of the base

    def attach_without_weights(self, base: Any) -> torch.nn.Module:
        with StayingOnHost():
            model = self.attach(base)
        self._first_values = take_values(model)
        return model

    def init_parameter(self, name: str, shape: torch.Size, start: int, stop: int, rows: Rows) -> torch.Tensor:
        original, columns = original_of(name, ADAPTER_NAME), shape[1:].numel()
        if original is None:
            return self._first_values.pop(name).reshape(-1)[start:stop]
        first, last = start // columns, -(-stop // columns)
        return elements_of_rows(rows(original, first, last), first, columns, start, stop)

    def saved_layout(self, model: Any) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
        """Returns the saved name of each parameter that is saved unchanged, and the other tensors of the file."""
        return saved_by_peft(model)

    def complete(self, model: Any) -> None:
        """Sets up what peft's configuration cannot express, after it has put its layers around those of the base."""

    def initialise(self, model: Any, plain: Callable[[], torch.nn.Module] | None) -> None:
        """Replaces peft's initial values, which are drawn under the recipe's seed, where the method needs others."""

    def saved_names(self, model: torch.nn.Module) -> dict[str, str]:
        return self._names

    def saved_shapes(self, model: torch.nn.Module, shape_of: ShapeOf) -> dict[str, tuple[int, ...]]:
        return super().saved_shapes(model, shape_of) | {name: tuple(t.shape) for name, t in self._constants.items()}

    def peft_state_dict(self, model: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the saved file's tensors, by name."""
        return {self._names[n]: t for n, t in weights.items()} | self._constants

    def save(self, model: torch.nn.Module, weights: Mapping[str, torch.Tensor], folder: Path) -> None:
        from safetensors.torch import save_file

        tensors = {name: tensor.contiguous() for name, tensor in self.peft_state_dict(model, weights).items()}
        save_file(tensors, folder / self.weights_file, {"format": "pt"})
        self.saved_config(model).save_pretrained(str(folder))

    def saved_config(self, model: Any) -> Any:
        """Returns a copy of peft's configuration, ready to be saved."""
        config: Any = copy.deepcopy(model.peft_config[ADAPTER_NAME])
        # peft has stored the folder from which the base was loaded.
        config.base_model_name_or_path = self.recipe.model.path
        for name, value in vars(config).items():
            if isinstance(value, set):  # the order of a set differs from process to process
                setattr(config, name, sorted(value))
        config.inference_mode = True
        if self.adapts_experts:
            as_saved(config, model.get_base_model())
        return config

    def after_restore(self, model: torch.nn.Module, read: Read) -> None:
        for name, mine in self._constants.items():
            if not torch.equal(read(name), mine):
                raise CorruptObject(
                    f"{name} had other values when the run began: this version of torch draws other random numbers "
                    "from the same seed; resume with the version in the run's provenance.json"
                )


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds torch's random numbers inside the context, and restores their state afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def saved_by_peft(model: Any, apart: str = "") -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Returns the name in peft's file of each trainable parameter, and the other tensors that peft saves, by name.

    ``apart``: prefix of the names of parameters that the method saves in a form of its own. ``model`` is the inner
    model, without wrappers that change names (checkpointing, sharding). Raises InputError when peft saves another
    parameter in a changed form."""
    from peft import get_peft_model_state_dict

    # peft gets a marker instead of each tensor; a marker that it returns gives the saved name.
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **persistent_buffers(model)}
    by_tensor: dict[int, Any] = {id(t): torch.empty(0) for t in tensors.values()}
    markers = {name: by_tensor[id(t)] for name, t in tensors.items()}
    saved = get_peft_model_state_dict(model, state_dict=markers, adapter_name=ADAPTER_NAME, save_embedding_layers=False)
    keys = {id(marker): key for key, marker in saved.items()}
    first = {id(markers[name]): name for name in reversed(list(tensors))}
    trainable = {n for n, p in model.named_parameters() if p.requires_grad and not (apart and n.startswith(apart))}
    lost = sorted(n for n in trainable if id(markers[n]) not in keys)
    if lost:
        raise InputError(f"peft saves {lost[0]} (of {len(lost)}) in a form from which a run cannot resume")
    names = {n: keys[id(markers[n])] for n in trainable}
    others = {key: first[id(marker)] for key, marker in saved.items() if id(marker) in first}
    rest = {key: tensors[name] for key, name in others.items() if name not in trainable}
    return names, {key: on_host(tensor.detach().clone()) for key, tensor in rest.items()}


def on_host(value: Any) -> Any:
    """Returns a tensor or module on the CPU; one on the meta device is returned unchanged."""
    tensors = [value] if isinstance(value, torch.Tensor) else list(value.parameters())
    return value if any(t.is_meta for t in tensors) else value.cpu()


def persistent_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if name.rsplit(".", 1)[-1] not in module._non_persistent_buffers_set:
                found[name] = buffer
    return found
