"""A run as a TrainJob of Kubeflow Trainer v2: torchrun over fixed nodes, as in a JobSet, which its operator makes.

The TrainJob refers to a TrainingRuntime of its own, created before it. A runtime of the cluster would not do: what a
TrainJob may change of its runtime has other names in each version, and neither volumes for the recipe with the patches
of a whole pod nor the rules for restarts are among them.

The operator's rules for a runtime: the job that trains has the label below, and its main container is called `node`.
"""

from __future__ import annotations

from copy import deepcopy

from cluster.job import ClusterError, ClusterJob
from cluster.kubernetes.jobset import fill_spec, selectors
from cluster.kubernetes.kind import JobKind
from cluster.kubernetes.manifests import loaded, set_metadata
from cluster.kubernetes.names import JOBSET_LENGTH
from cluster.kubernetes.patch import Fields
from cluster.kubernetes.reading import Reading, of_conditions

GROUP = "trainer.kubeflow.org"
CONTAINER = "node"


def manifests(job: ClusterJob) -> list[Fields]:
    """Returns the TrainingRuntime and the TrainJob."""
    made: Fields = {
        "apiVersion": f"{GROUP}/v1alpha1",
        "kind": "TrainJob",
        "metadata": {"name": "", "labels": {"app.kubernetes.io/name": "muster"}},
        "spec": {},
    }
    name = set_metadata(made, job, JOBSET_LENGTH)
    made["spec"] = {"runtimeRef": {"apiGroup": GROUP, "kind": "TrainingRuntime", "name": name}} | made["spec"]
    if job.settings.get("deadline_s"):
        made["spec"]["activeDeadlineSeconds"] = job.settings["deadline_s"]
    spec = loaded("jobset.yaml")["spec"]
    nodes = fill_spec(spec, job, name)
    group = spec["replicatedJobs"][0]
    group["template"] = {"metadata": {"labels": {f"{GROUP}/trainjob-ancestor-step": "trainer"}}} | group["template"]
    main, *others = group["template"]["spec"]["template"]["spec"]["containers"]
    if any(other["name"] == CONTAINER for other in others):
        raise ClusterError(
            f"cluster.kubernetes.pod.containers: a TrainJob calls muster's own container {CONTAINER!r}; give yours "
            "another name, or patch `muster`"
        )
    main["name"] = CONTAINER
    runtime = {
        "apiVersion": made["apiVersion"],
        "kind": "TrainingRuntime",
        "metadata": deepcopy(made["metadata"]) | {"labels": {f"{GROUP}/framework": "torch"}},
        "spec": {"mlPolicy": {"numNodes": nodes}, "template": {"spec": spec}},
    }
    return [runtime, made]


def read(made: Fields) -> Reading:
    return of_conditions(made, "Complete", "DeadlineExceeded", "jobsStatus")


# The operator gives the JobSet the TrainJob's name.
TRAINJOB = JobKind(manifests, read, selectors, CONTAINER, beside=("trainingruntime",))
