"""What all manifests share: loading, metadata, and writing as YAML. Pure, data in, data out.

The manifests next to this file (`rayjob.yaml`, `jobset.yaml`) are loaded, changed as data and dumped.
"""

from __future__ import annotations

import re
import sys
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


class ManifestDumper(yaml.SafeDumper):
    """Writes a text of several lines as a block, and quotes a text that some reader of YAML takes for another type."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    text.encode()  # raises for half of a surrogate pair, which PyYAML writes and kubectl does not read
    block = "\n" in text.rstrip("\n") and text.replace("\n", "").isprintable()
    style = "|" if block else None if text.isprintable() else '"'  # only double quotes keep other line breaks
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


ManifestDumper.add_representer(str, _text)
# PyYAML quotes what it would not read as text itself; to kubectl, `y` is a truth value and `1e3` a number as well.
ManifestDumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\.?[0-9]|[yYnN]$"), list("-+.0123456789yYnN")
)


def to_yaml(made: Fields) -> str:
    """Returns the manifest as one YAML document. Raises ClusterError for a text that YAML cannot hold."""
    try:
        text: str = yaml.dump(made, Dumper=ManifestDumper, sort_keys=False, allow_unicode=True, width=sys.maxsize)
    except UnicodeEncodeError as error:
        raise ClusterError(f"the manifest cannot hold the text {error.object[:60]!r}: {error.reason}") from None
    return text
