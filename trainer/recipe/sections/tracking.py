"""Trackers that get a run's metrics in addition to its own storage: a section per tracker."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trainer.recipe.base import Listed, Location, Section


class TensorBoardSection(Section):
    """Settings of `tracking: [tensorboard]`."""

    folder: Location | None = None
    """Folder for the event files, an fsspec URL or a local path; they are written to `<folder>/<name>`. null writes
    them into the run itself, under `tensorboard/`."""


class WandbSection(Section):
    """Settings of `tracking: [wandb]`. The key comes from the driver's environment (`WANDB_API_KEY`, or
    `wandb login`)."""

    project: str = Field(default="muster", min_length=1)
    """Project that the run appears in."""

    entity: str | None = None
    """User or team that the project belongs to; null is the owner of the key."""

    mode: Literal["online", "offline"] = "online"
    """`offline` writes files that `wandb sync` sends later, and needs neither key nor network."""

    folder: str | None = None
    """Local folder for W&B's own files, which go into its subfolder `wandb`; null is the run's folder if that is local,
    else the driver's working directory."""

    group: str | None = None
    """Name shared by several runs that are displayed together."""

    tags: Listed[str] = ()
    """Tags of the run, for searches."""


class MlflowSection(Section):
    """Settings of `tracking: [mlflow]`. Credentials come from the driver's environment (`MLFLOW_TRACKING_TOKEN`, or
    `MLFLOW_TRACKING_USERNAME` and `MLFLOW_TRACKING_PASSWORD`)."""

    uri: Location | None = Field(default=None, examples=["http://mlflow:5000", "sqlite:///mlflow.db"])
    """The tracking server, database or folder; null takes it from the environment (`MLFLOW_TRACKING_URI`)."""

    experiment: str = Field(default="muster", min_length=1)
    """Experiment that the run appears in; it is created if it is missing."""


class PrometheusSection(Section):
    """Settings of `tracking: [prometheus]`: the driver serves the metrics at `http://<address>:<port>/metrics`."""

    port: int = Field(default=9464, ge=0, le=65535)
    """TCP port on the driver's host; 0 takes a free port, which is logged."""

    address: str = Field(default="0.0.0.0", min_length=1)
    """Address to listen at; `127.0.0.1` accepts this host only."""
