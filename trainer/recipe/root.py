"""The recipe: the model of the complete file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from trainer.recipe.base import MAY_CHANGE, Conflict, Listed, Location, OneOf, Section
from trainer.recipe.sections.adapter import AdapterSection
from trainer.recipe.sections.checkpoint import CheckpointSection
from trainer.recipe.sections.cluster import ClusterSection
from trainer.recipe.sections.compute import ComputeSection
from trainer.recipe.sections.data import DataSection
from trainer.recipe.sections.generative_eval import GenerativeEvalSection
from trainer.recipe.sections.model import ModelSection
from trainer.recipe.sections.optimizer import OptimizerSection
from trainer.recipe.sections.preference import DPOSection, KTOSection, ORPOSection, SimPOSection
from trainer.recipe.sections.profile import ProfileSection
from trainer.recipe.sections.resources import ResourcesSection
from trainer.recipe.sections.rollouts.engine import RolloutSection
from trainer.recipe.sections.rollouts.grpo import GRPOSection
from trainer.recipe.sections.rollouts.ppo import PPOSection
from trainer.recipe.sections.rollouts.task import RolloutTaskSection
from trainer.recipe.sections.samples import SamplesSection
from trainer.recipe.sections.schedule import ScheduleSection
from trainer.recipe.sections.strategy import StrategySection
from trainer.recipe.sections.sweep import SweepSection
from trainer.recipe.sections.tasks import ClassificationSection, DistillSection, SFTSection
from trainer.recipe.sections.tracking import MlflowSection, PrometheusSection, TensorBoardSection, WandbSection
from trainer.recipe.sections.training import TrainingSection
from trainer.recipe.tasks import TASKS
from trainer.recipe.trackers import TRACKERS
from trainer.registry import is_module, key_of


def _module_name(name: str) -> str:
    if not is_module(name):
        raise ValueError(f"{name!r} is no Python module; write its name as in an import, such as my_package.tasks")
    return name


def _run_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise ValueError(
            f"{name!r} cannot name a run: use up to 100 letters, digits, '.', '_' and '-', with a letter or digit first"
        )
    return name


def _or_text(shape: dict[str, Any]) -> None:
    """Makes the JSON Schema of a section that of the section or a text (see `Section.shorthand`)."""
    shape["anyOf"] = [{"$ref": shape.pop("$ref")}, {"type": "string"}]


class Recipe(Section):
    """Everything that decides a run. It is frozen into the run at its first start."""

    name: Annotated[str, AfterValidator(_run_name), MAY_CHANGE] = Field(examples=["my-run"])
    """Name of the run, which is stored at `<storage>/<name>`. The same name and storage resume it."""

    seed: int = Field(default=17, ge=0)
    """Decides the order of the data, the adapter's initial values and dropout. The same seed gives the same run."""

    exact: bool = False
    """Byte-identical results for any number of workers: gradients are added as fixed-point integers, which costs time
    and twice the bytes on the network. Needs `strategy.kind: ddp` on CPUs. Without `exact`, the same number of workers
    gives the same bytes, and another number gives the same result within the rounding noise of float32."""

    task: Annotated[str, OneOf(TASKS)] = "sft"
    """The task, which decides the loss: `sft` is supervised fine-tuning of a causal language model; `classification`
    adds a head with an output per label to any model; `reward` learns from preferences to rate answers, `dpo`, `orpo`
    and `simpo` to give the preferred ones; `kto` learns from answers that are good or bad by themselves; `ppo` and
    `grpo` learn from the rewards of texts that the model writes itself; `distill` learns the distributions of a
    teacher. See [tasks.md](tasks.md)."""

    plugins: Annotated[Listed[Annotated[str, AfterValidator(_module_name)]], MAY_CHANGE] = ()
    """Python modules that are imported before the recipe is checked, installed ones or files of the working folder.
    They may add tasks, methods, formats and other choices that the recipe then names. What an installed package offers
    by its entry points needs no entry here. See [extending.md](extending.md#in-a-package-of-your-own)."""

    model: ModelSection = Field(json_schema_extra=_or_text)
    adapter: AdapterSection = AdapterSection()

    adapters: Annotated[dict[str, dict[str, Any]], MAY_CHANGE] = Field(
        default_factory=dict, examples=[{"low": {"optimizer.lr": 1e-4}, "high": {"optimizer.lr": 3e-4}}]
    )
    """Several runs on one base model, in the same processes: by the ending of each run's name, the settings that it
    changes, by their dotted path. `muster run` trains all of them together. See [sweeps.md](sweeps.md#together)."""

    data: DataSection
    training: TrainingSection
    sft: SFTSection = SFTSection()
    classification: ClassificationSection = ClassificationSection()
    dpo: DPOSection = DPOSection()
    kto: KTOSection = KTOSection()
    orpo: ORPOSection = ORPOSection()
    simpo: SimPOSection = SimPOSection()
    ppo: PPOSection = PPOSection()
    grpo: GRPOSection = GRPOSection()
    rollout: RolloutSection = RolloutSection()
    distill: DistillSection = DistillSection()
    optimizer: OptimizerSection
    schedule: ScheduleSection = ScheduleSection()
    strategy: Annotated[StrategySection, MAY_CHANGE] = StrategySection()
    compute: Annotated[ComputeSection, MAY_CHANGE] = ComputeSection()
    resources: Annotated[ResourcesSection, MAY_CHANGE] = ResourcesSection()

    storage: Annotated[Location, MAY_CHANGE] = Field(examples=["runs"])
    """Folder that runs are kept in: an fsspec URL (`s3://runs`) or a local path that all workers can access. Prepared
    data is shared between the runs of a storage."""

    checkpoint: Annotated[CheckpointSection, MAY_CHANGE] = CheckpointSection()
    cluster: Annotated[ClusterSection, MAY_CHANGE] = ClusterSection()

    tracking: Annotated[Listed[Annotated[str, OneOf(TRACKERS)]], MAY_CHANGE] = ()
    """Trackers that the metrics are also sent to: `tensorboard`, `wandb`, `mlflow`, and `prometheus`, which fetches
    them. The run's own storage always contains them. See [tracking.md](tracking.md)."""

    tensorboard: Annotated[TensorBoardSection, MAY_CHANGE] = TensorBoardSection()
    wandb: Annotated[WandbSection, MAY_CHANGE] = WandbSection()
    mlflow: Annotated[MlflowSection, MAY_CHANGE] = MlflowSection()
    prometheus: Annotated[PrometheusSection, MAY_CHANGE] = PrometheusSection()

    samples: Annotated[SamplesSection, MAY_CHANGE] = SamplesSection()
    generative_eval: Annotated[GenerativeEvalSection, MAY_CHANGE] = GenerativeEvalSection()
    profile: Annotated[ProfileSection, MAY_CHANGE] = ProfileSection()
    sweep: Annotated[SweepSection | None, MAY_CHANGE] = None

    @classmethod
    def load(cls, source: str | Path | dict[str, Any], /, **overrides: Any) -> Recipe:
        """Reads a recipe from a YAML or JSON file, by the name of a shipped one, or from the same as a mapping.

        ``overrides``: values by dotted key, as in ``**{"optimizer.lr": 1e-4}``. Raises RecipeError with all mistakes.
        """
        from trainer.recipe.loading import load_with

        return load_with(source, overrides)

    @property
    def run_uri(self) -> str:
        """The run's location: ``<storage>/<name>``."""
        scheme, separator, path = self.storage.rpartition("://")
        return f"{scheme}{separator}{path.rstrip('/')}/{self.name}"

    @property
    def rollout_section(self) -> RolloutTaskSection | None:
        """The settings of a task that learns from texts of the model; None for any other task."""
        section = getattr(self, key_of(self.task), None)
        return section if isinstance(section, RolloutTaskSection) else None

    @property
    def stores_outputs(self) -> bool:
        """True if what the task needs of a frozen model is computed once, before the first step, and stored: as asked,
        or because its reference is not the model with its adapter switched off."""
        row = TASKS[self.task]
        if row.has_teacher:
            return self.distill.store
        if not row.stores_reference:
            return False
        adapter = self.adapter
        changed = adapter.changes_base or adapter.bias not in (None, "none")
        asked: bool = getattr(getattr(self, key_of(self.task)), "precompute_reference", False)
        return changed or adapter.begins_from is not None or asked

    def conflicts(self) -> Iterator[Conflict]:
        """Yields all values that are not valid together, inside the sections and across them."""
        from trainer.recipe.rules.compatibility import across_sections

        for name in type(self).model_fields:
            section = getattr(self, name)
            if isinstance(section, Section):
                yield from (conflict.under(name) for conflict in section.conflicts())
        yield from across_sections(self)
