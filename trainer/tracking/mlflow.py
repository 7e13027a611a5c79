"""MLflow: a server, a database or a folder. All attempts of a run are one MLflow run, found by a tag.

The store reports the curve's last point. A batch is one transaction of a server or a database. In a folder each metric
is a file of its own, so the loss is written first, and the last point is that of the loss.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from trainer.errors import InputError
from trainer.recipe import Recipe
from trainer.redact import clean, redact
from trainer.tracking.base import EVAL, START, TRAIN, Point, TrackedRun, Watermark

_DATABASES = ("sqlite:", "postgresql", "mysql", "mssql")
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # The mirror retries a server that does not answer, and warns once.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}
_LOGGERS = {"mlflow": logging.WARNING, "urllib3.connectionpool": logging.ERROR}
_TAG = "muster.curve"
_METRICS_AT_ONCE = 1000  # the most that MLflow takes in one batch
_PARAMETERS_AT_ONCE = 100
_LONGEST_VALUE = 500
_STATUS = {"succeeded": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}


class Mlflow:
    """The MLflow tracker of one curve; see `trainer.tracking.base.Tracker`."""

    def __init__(self, curve: TrackedRun) -> None:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        for name, level in _LOGGERS.items():
            logging.getLogger(name).setLevel(level)
        section = curve.recipe.mlflow
        self._client: Any = MlflowClient(tracking_uri=section.uri or os.environ.get("MLFLOW_TRACKING_URI"))
        existing = self._client.get_experiment_by_name(section.experiment)
        if existing is not None:
            experiment = str(existing.experiment_id)
        else:
            experiment = str(self._client.create_experiment(section.experiment))
        found = self._client.search_runs([experiment], f"tags.`{_TAG}` = '{curve.id}'", max_results=1)
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
        else:
            tags = {_TAG: curve.id, "muster.run": redact(curve.run.url)}
            self._id = self._client.create_run(experiment, tags=tags, run_name=curve.recipe.name).info.run_id
        self._describe(curve.recipe, found[0].data.params if found else {})

    @staticmethod
    def check(recipe: Recipe) -> None:
        uri = recipe.mlflow.uri or os.environ.get("MLFLOW_TRACKING_URI")
        if uri and uri.startswith(_DATABASES) and not (find_spec("sqlalchemy") and find_spec("alembic")):
            raise InputError(f"mlflow.uri {uri.split(':')[0]}:… is a database: pip install sqlalchemy alembic")
        if not uri:
            raise InputError(
                "tracking names mlflow, and the address of its server is not set: give mlflow.uri, or set "
                "MLFLOW_TRACKING_URI"
            )

    def last_mark(self) -> Watermark:
        lasts = (
            Watermark.of(max(metric.step for metric in history), part)
            for part in (TRAIN, EVAL)
            if (history := self._client.get_metric_history(self._id, f"{part}/loss"))
        )
        return max(lasts, default=START)

    def write(self, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        batch: list[Any] = []
        for point in points:
            named = sorted(point.named().items(), key=lambda item: not item[0].endswith("/loss"))
            metrics = [Metric(name, value, int(point.time * 1000), point.step) for name, value in named]
            if len(batch) + len(metrics) > _METRICS_AT_ONCE:
                self._client.log_batch(self._id, metrics=batch, synchronous=True)
                batch = []
            batch += metrics
        if batch:
            self._client.log_batch(self._id, metrics=batch, synchronous=True)

    def close(self, state: str) -> None:
        self._client.set_terminated(self._id, status=_STATUS[state])

    def _describe(self, recipe: Recipe, known: Mapping[str, str]) -> None:
        """Logs the recipe's fields as parameters, except the ``known`` ones: MLflow refuses to change a parameter."""
        from mlflow.entities import Param

        found = _leaves(clean(recipe.model_dump(mode="json")))
        leaves = [Param(name, str(value)[:_LONGEST_VALUE]) for name, value in found if name not in known]
        for at in range(0, len(leaves), _PARAMETERS_AT_ONCE):
            self._client.log_batch(self._id, params=leaves[at : at + _PARAMETERS_AT_ONCE], synchronous=True)


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield from _leaves(child, f"{path}.{key}" if path else str(key))
    if not isinstance(value, dict | list):
        yield path, value
