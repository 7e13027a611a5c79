"""The trackers, which show a run's metrics elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.recipe.base import Section
from trainer.recipe.sections.tracking import MlflowSection, PrometheusSection, TensorBoardSection, WandbSection
from trainer.registry import Choice, Registry


@dataclass(frozen=True)
class TrackerRow(Choice):
    """A tracker's row. ``section``: its settings; their key in the recipe is the tracker's name."""

    section: type[Section]


TRACKERS = Registry(
    "tracker",
    {
        "tensorboard": TrackerRow("trainer.tracking.tensorboard:TensorBoard", TensorBoardSection),
        "wandb": TrackerRow("trainer.tracking.wandb:Wandb", WandbSection),
        "mlflow": TrackerRow("trainer.tracking.mlflow:Mlflow", MlflowSection),
        "prometheus": TrackerRow("trainer.tracking.prometheus:Prometheus", PrometheusSection),
    },
)
