"""Where a run's metrics are sent to, beside its own storage: a section per tracker."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trainer.recipe.base import Listed, Location, Section


class TensorBoardSection(Section):
    """Of `tracking: [tensorboard]`."""

    folder: Location | None = None
    """Folder for the event files, which then lie in `<folder>/<name>`: an fsspec URL or a local path. Without it they
    lie in the run itself, under `tensorboard/`."""


class WandbSection(Section):
    """Of `tracking: [wandb]`. The key comes from the driver's environment (`WANDB_API_KEY`, or `wandb login`)."""

    project: str = Field(default="muster", min_length=1)
    """Project that the run appears in."""

    entity: str | None = None
    """User or team that the project belongs to; null is the key's own."""

    mode: Literal["online", "offline"] = "online"
    """`offline` writes files that `wandb sync` sends later, and needs neither key nor network."""

    folder: str | None = None
    """Local folder for W&B's own files, in which it makes one named `wandb`; null is the run's folder where that is a
    local one, and else the driver's working directory."""

    group: str | None = None
    """Name that several runs share, to be shown together."""

    tags: Listed[str] = ()
    """Words to find the run by."""


class MlflowSection(Section):
    """Of `tracking: [mlflow]`. Credentials come from the driver's environment (`MLFLOW_TRACKING_TOKEN`, or
    `MLFLOW_TRACKING_USERNAME` and `MLFLOW_TRACKING_PASSWORD`)."""

    uri: Location | None = Field(default=None, examples=["http://mlflow:5000", "sqlite:///mlflow.db"])
    """The tracking server, database or folder; null takes it from the environment (`MLFLOW_TRACKING_URI`)."""

    experiment: str = Field(default="muster", min_length=1)
    """Experiment that the run appears in; it is made where it is missing."""


class PrometheusSection(Section):
    """Of `tracking: [prometheus]`: the driver answers at `http://<address>:<port>/metrics`."""

    port: int = Field(default=9464, ge=0, le=65535)
    """TCP port on the driver's host; 0 takes a free one, which the log names."""

    address: str = Field(default="0.0.0.0", min_length=1)
    """Address to listen at; `127.0.0.1` is for this host alone."""


TRACKER_SECTIONS: dict[str, type[Section]] = {
    "tensorboard": TensorBoardSection,
    "wandb": WandbSection,
    "mlflow": MlflowSection,
    "prometheus": PrometheusSection,
}
"""The section of each tracker that has settings; it stands in the recipe under the tracker's name."""
