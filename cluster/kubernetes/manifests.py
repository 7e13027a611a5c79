"""The loading and the metadata of all manifests. Pure, data in, data out.

The manifests next to this file (`rayjob.yaml`, `jobset.yaml`) are loaded, changed as data and dumped.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from cluster.job import ClusterError, ClusterJob
from cluster.kubernetes.names import fitted
from cluster.kubernetes.patch import Fields, merged

HERE = Path(__file__).resolve().parent
RUN_ANNOTATION = "muster/run-uri"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"


def workers_per_pod(job: ClusterJob) -> int:
    return int(job.settings["workers_per_pod"])


def loaded(name: str) -> Fields:
    made: Fields = yaml.safe_load((HERE / name).read_text(encoding="utf-8"))
    return made


def set_metadata(made: Fields, job: ClusterJob, length: int) -> str:
    """Fills in the metadata of a job, with the user's patch over them. Returns the job's name, of at most ``length``
    characters."""
    metadata, settings = made["metadata"], job.settings
    metadata["name"] = name = fitted(job.name, length)
    if settings.get("namespace"):
        metadata["namespace"] = settings["namespace"]
    metadata["annotations"] = {"muster/run": job.name, RUN_ANNOTATION: job.run_uri}
    if settings.get("queue"):
        metadata["labels"][QUEUE_LABEL] = settings["queue"]
        made["spec"]["suspend"] = True
    patch = settings.get("metadata") or {}
    where = "cluster.kubernetes.metadata"
    made["metadata"] = merged(metadata, patch, where, "metadata")
    annotations = made["metadata"].get("annotations") or {}
    kept = {"name": metadata["name"], "namespace": metadata.get("namespace")}
    if any(made["metadata"].get(key) != value for key, value in kept.items()):
        raise ClusterError(f"{where} changes the name or the namespace; set `name` and cluster.kubernetes.namespace")
    if any(annotations.get(key) != value for key, value in metadata["annotations"].items()):
        raise ClusterError(f"{where} changes the annotations muster/…, by which muster knows its jobs; remove that")
    return name
