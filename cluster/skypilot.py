"""SkyPilot: a run is a task, whose nodes run torchrun. The task is rendered only; `sky` submits it.

The resolved recipe is inside the task's commands, so that the task is complete in one file.

Fields of a task: https://docs.skypilot.co/en/latest/reference/yaml-spec.html
"""

from __future__ import annotations

import importlib.metadata
import re
import shlex
from dataclasses import replace
from typing import Any

from cluster.job import ClusterError, ClusterJob
from cluster.job_shape import JobShape, refuse_servers
from cluster.shell import written
from cluster.yaml_text import to_yaml

DISTRIBUTION = "muster-train"
RENDEZVOUS_PORT = 29400
COMPUTED = ("name", "num_nodes", "resources", "setup", "run")
"""The fields of a task that `cluster.skypilot.options` cannot set."""

# Runs on every node. An installed muster keeps its packages in one folder.
RUN = """\
set -eu
recipe=$HOME/{name}.yaml
{recipe}
if [ ! -f trainer/__main__.py ]; then
  root=$(python -c '
import importlib.util as u, os
print(os.path.dirname(list(u.find_spec("muster.trainer").submodule_search_locations)[0]))')
  export PYTHONPATH="$root${{PYTHONPATH:+:$PYTHONPATH}}"
fi
exec torchrun --nnodes="$SKYPILOT_NUM_NODES" --node-rank="$SKYPILOT_NODE_RANK" --nproc-per-node={workers} \\
  --master-addr="$(echo "$SKYPILOT_NODE_IPS" | head -n 1)" --master-port={port} --max-restarts=0 \\
  -m trainer "$recipe"
"""


class SkyPilot:
    """A task that is launched by hand (`cluster.Kind.by_hand`)."""

    def render(self, job: ClusterJob) -> str:
        return to_yaml(task(job))

    def address(self, job: ClusterJob) -> str | None:
        return None


def task(job: ClusterJob) -> dict[str, Any]:
    """Returns the job as a task of SkyPilot, of the largest size that the recipe allows. Raises ClusterError for
    settings that exclude each other."""
    refuse_servers(job, "SkyPilot's task")
    settings, most, shape = job.settings, job.workers[1], _shape(job)
    if int(shape.nodes) * shape.workers_per_node != most:
        raise ClusterError(
            f"{most} workers do not fill {shape.nodes} nodes of {shape.workers_per_node}, and torchrun starts the same "
            "number on each: change resources.workers or cluster.skypilot.gpus_per_node"
        )
    if taken := [name for name in settings["options"] if name in COMPUTED]:
        raise ClusterError(
            f"cluster.skypilot.options cannot set {', '.join(taken)}: muster computes it, or it has a key of its own"
        )
    commands = RUN.format(
        name=shlex.quote(job.name),
        recipe=written('"$recipe"', job.recipe),
        workers=shape.workers_per_node,
        port=RENDEZVOUS_PORT,
    )
    return {
        "name": re.sub(r"[^a-z0-9-]+", "-", job.name.lower()),
        "num_nodes": int(shape.nodes),
        "resources": _resources(job, shape),
        **settings["options"],
        "setup": settings["setup"] or f"python -m pip install {_requirement()}",
        "run": commands,
    }


def workers_per_node(job: ClusterJob) -> int:
    return _shape(job).workers_per_node


def _shape(job: ClusterJob) -> JobShape:
    most = job.workers[1]
    return JobShape.of(replace(job, workers=(most, most)), "cluster.skypilot")


def _resources(job: ClusterJob, shape: JobShape) -> dict[str, Any]:
    """Returns what each node has; the recipe's own mapping replaces what is computed."""
    settings = job.settings
    computed: dict[str, Any] = {"cpus": f"{shape.cpus_per_node}+"}
    if shape.gpus_per_node:
        names = {"accelerators", "any_of", "ordered", "instance_type"}
        if settings["accelerators"]:
            computed["accelerators"] = f"{settings['accelerators']}:{shape.gpus_per_node}"
        elif not names & set(settings["resources"]):
            raise ClusterError(
                f"the nodes have {shape.gpus_per_node} GPUs of no kind: name one in cluster.skypilot.accelerators, "
                "e.g. H100 (`sky gpus list` shows the kinds)"
            )
    return {**computed, **settings["resources"]}


def _requirement() -> str:
    try:
        return f"{DISTRIBUTION}=={importlib.metadata.version(DISTRIBUTION)}"
    except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
        return DISTRIBUTION
