"""The trackers, which show a run's metrics elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.recipe.base import Section
from trainer.recipe.sections.tracking import MlflowSection, PrometheusSection, TensorBoardSection, WandbSection
from trainer.registry import Choice, Registry


@dataclass(frozen=True)
class TrackerRow(Choice):
    """A tracker's row. ``section``: its settings; their key in the recipe is the tracker's name. ``library``: the
    module that must be importable, if there is one; ``package``: its name on the package index, which may differ."""

    section: type[Section] | None = None
    library: str = ""
    package: str = ""


TRACKERS = Registry(
    "tracker",
    {
        "tensorboard": TrackerRow(
            "trainer.tracking.tensorboard:TensorBoard", TensorBoardSection, "tensorboardX", "tensorboardX"
        ),
        "wandb": TrackerRow("trainer.tracking.wandb:Wandb", WandbSection, "wandb", "wandb"),
        "mlflow": TrackerRow("trainer.tracking.mlflow:Mlflow", MlflowSection, "mlflow", "mlflow-skinny"),
        "prometheus": TrackerRow(
            "trainer.tracking.prometheus:Prometheus", PrometheusSection, "prometheus_client", "prometheus-client"
        ),
    },
    group="muster.trackers",
    held=TrackerRow(""),
)
