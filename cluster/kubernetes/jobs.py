"""The kind of cluster "kubernetes": a RayJob for KubeRay, a JobSet or a TrainJob, through `kubectl`.

A job's id is ``<namespace>/<name>`` or ``<name>`` (the namespace of kubectl's context); for another kind than a RayJob,
``jobset:`` or ``trainjob:`` stands before it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from cluster.job import ClusterError, ClusterJob, Say
from cluster.kubernetes.following import Follower
from cluster.kubernetes.kinds import DEFAULT, KINDS, manifests
from cluster.kubernetes.kubectl import Kubectl
from cluster.kubernetes.manifests import RUN_ANNOTATION
from cluster.kubernetes.patch import Fields
from cluster.yaml_text import to_yaml

DELETE_S = 300
"""Time for the deletion of an ended job with its pods, before the same run is submitted again."""


@dataclass(frozen=True)
class KubernetesRef:
    """The place of a job, as kubectl needs it."""

    resource: str
    namespace: str | None
    name: str

    @staticmethod
    def of(job_id: str) -> KubernetesRef:
        resource, _, place = job_id.rpartition(":")
        namespace, _, name = place.rpartition("/")
        if resource not in ("", *KINDS) or not name:
            raise ClusterError(f"{job_id!r} names no job; write NAMESPACE/NAME or jobset:NAMESPACE/NAME")
        return KubernetesRef(resource or DEFAULT, namespace or None, name)

    def __str__(self) -> str:
        kind = "" if self.resource == DEFAULT else f"{self.resource}:"
        return f"{kind}{self.namespace}/{self.name}" if self.namespace else f"{kind}{self.name}"

    def command(self, verb: str) -> str:
        """Returns the command as a user types it."""
        place = f" --namespace {self.namespace}" if self.namespace else ""
        return f"kubectl{place} {verb} {','.join((self.resource, *KINDS[self.resource].beside))} {self.name}"


_NO_REFUSAL = re.compile(r"exceeded quota|support dry[- ]run|for \"--dry-run\"|must be created before the TrainJob")
"""Errors of a dry run that do not refuse the job: the ended job still counts in a quota, which it leaves when it is
deleted, some admission webhooks and old versions of kubectl know no dry run, and the runtime that a TrainJob refers to
does not exist after its own dry run."""


class Kubernetes:
    """See `cluster.job.Cluster`."""

    def __init__(self, sleep: Callable[[float], None] = time.sleep) -> None:
        self._sleep = sleep

    def render(self, job: ClusterJob) -> str:
        """Returns YAML: one document per object of the job, in the order of their creation. Raises ClusterError."""
        return "---\n".join(map(to_yaml, manifests(job)))

    def address(self, job: ClusterJob) -> str | None:
        return None

    def submit(self, job: ClusterJob, recipe_path: str) -> str:
        """Submits the manifest, which contains the recipe, so ``recipe_path`` is not used. An ended job of this run is
        deleted first, and the run resumes. If a job has not ended, or belongs to another run, or if the cluster refuses
        the new one, nothing is deleted. Raises ClusterError."""
        objects = manifests(job)
        metadata = objects[-1]["metadata"]
        namespace = metadata.get("namespace")
        address = KubernetesRef(objects[-1]["kind"].lower(), namespace, metadata["name"])
        kubectl = Kubectl(namespace)
        self._make_room(kubectl, address, job)
        created = self._create(kubectl, address, objects)
        return str(KubernetesRef(address.resource, created.get("namespace", namespace), created["name"]))

    def _create(self, kubectl: Kubectl, address: KubernetesRef, objects: list[Fields]) -> Fields:
        """Creates the objects, and returns the metadata of the job, which is the last one. If the cluster refuses one,
        deletes those that it has taken; if it does not answer, the job may exist, and nothing is deleted."""
        created: list[Fields] = []
        try:
            for made in objects:
                created.append(kubectl.create(to_yaml(made)))
        except ClusterError as error:
            if error.usage:
                for resource, _ in zip(KINDS[address.resource].beside, created, strict=False):
                    kubectl.delete(resource, address.name, wait_s=0)
            raise
        metadata: Fields = created[-1]["metadata"]
        return metadata

    def _make_room(self, kubectl: Kubectl, address: KubernetesRef, job: ClusterJob) -> None:
        resources = (address.resource, *KINDS[address.resource].beside)
        found = {resource: made for resource in resources if (made := kubectl.get(resource, address.name))}
        for resource, made in found.items():
            other = made["metadata"].get("annotations", {}).get(RUN_ANNOTATION)
            if other != job.run_uri:
                raise ClusterError(
                    f"{resource} {address.name} exists and belongs to another run ({other or 'not of muster'}); give "
                    f"this one another name or namespace, or delete that one: {address.command('delete')}"
                )
        if existing := found.get(address.resource):
            reading = KINDS[address.resource].reading(existing)
            if reading.exit_code is None and reading.state != "Terminating":
                raise ClusterError(
                    f"{address} has not ended ({reading.state}); look at it with `{address.command('describe')}`, "
                    f"end it with `{address.command('delete')}`"
                )
            self._check_accepted(kubectl, job)
        for resource in found:
            kubectl.delete(resource, address.name, wait_s=DELETE_S)

    def _check_accepted(self, kubectl: Kubectl, job: ClusterJob) -> None:
        """Raises ClusterError if the cluster would refuse the job, by a dry run under a name that is not in use."""
        for made in manifests(replace(job, name=f"{job.name} (dry run)")):  # not a Kubernetes name, so it gets a hash
            try:
                kubectl.create(to_yaml(made), dry_run=True)
            except ClusterError as error:
                if not _NO_REFUSAL.search(str(error)):
                    raise

    def follow(self, job_id: str, say: Say) -> int:
        """Prints each change of state, why pods wait, and the driver's lines. Returns the driver's exit code (0, 1, 2,
        3) if the cluster knows it; 1 for another failure; 3 if the job was stopped or is gone."""
        address = KubernetesRef.of(job_id)
        return Follower(Kubectl(address.namespace), address.resource, address.name, say, self._sleep).follow()

    def state(self, job_id: str) -> str | None:
        address = KubernetesRef.of(job_id)
        made = Kubectl(address.namespace).get(address.resource, address.name)
        return KINDS[address.resource].reading(made).state if made else None

    def cancel(self, job_id: str, run_uri: str) -> None:
        """Deletes the job and does not wait: its pods have their grace period to commit a checkpoint."""
        address = KubernetesRef.of(job_id)
        kubectl = Kubectl(address.namespace)
        made = kubectl.get(address.resource, address.name)
        if made is not None and made["metadata"].get("annotations", {}).get(RUN_ANNOTATION) == run_uri:
            for resource in (address.resource, *KINDS[address.resource].beside):
                kubectl.delete(resource, address.name, wait_s=0)
