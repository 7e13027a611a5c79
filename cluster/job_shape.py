"""How many nodes a job has, and how its workers are spread over them."""

from __future__ import annotations

import math

from cluster.job import ClusterError, ClusterJob


class JobShape:
    """How many nodes a job has, and what each gives it. ``nodes`` is as sbatch takes it: ``4``, or ``2-4``. Where
    servers run next to the workers, ``workers_per_node`` counts the places that they take, too."""

    def __init__(self, nodes: str, workers_per_node: int, job: ClusterJob) -> None:
        self.nodes, self.workers_per_node = nodes, workers_per_node
        self.gpus_per_node = workers_per_node * job.gpus_per_worker
        self.cpus_per_node = workers_per_node * job.cpus_per_worker

    @classmethod
    def of(cls, job: ClusterJob, section: str) -> JobShape:
        """Workers are spread evenly over as few nodes as hold them; a worker without a GPU has a node of its own.
        Replicas are not divided between nodes, or have complete nodes, where GPUs and workers allow it. ``section``:
        where the recipe has the job's settings."""
        least, most = job.places
        asked: int | None = job.settings.get("nodes")
        per_node = math.ceil(most / asked) if asked else _workers_per_node(job, most, section)
        while asked and job.servers > asked * (per_node // job.places_per_server):
            per_node += 1
        nodes = [asked] if asked else [nodes_for(job, count, per_node) for count in (least, most)]
        return cls("-".join(map(str, dict.fromkeys(nodes))), per_node, job)


def nodes_for(job: ClusterJob, places: int, per_node: int) -> int:
    """Returns the fewest nodes of ``per_node`` places that hold ``places``, the servers' among them; no server is split
    over two nodes."""
    nodes = math.ceil(places / per_node)
    return max(nodes, math.ceil(job.servers / (per_node // job.places_per_server))) if job.servers else nodes


def refuse_servers(job: ClusterJob, what: str) -> None:
    """Raises ClusterError for servers that Ray has to place, on ``what`` runs without it."""
    if job.servers:
        raise ClusterError(
            f"rollout.vllm.servers is {job.servers}: Ray places them, and {what} runs torchrun; set it to null for a "
            "server on each node's training GPUs, or use a cluster with Ray"
        )


def _workers_per_node(job: ClusterJob, workers: int, section: str) -> int:
    gpus: int = job.settings["gpus_per_node"]
    if not job.gpus_per_worker:
        return 1
    fit = gpus // job.gpus_per_worker
    if fit == 0:
        raise ClusterError(
            f"a worker takes {job.gpus_per_worker} GPUs (resources.gpus_per_worker), and a node has {gpus} "
            f"({section}.gpus_per_node): correct one of them"
        )
    if job.servers:
        if job.places_per_server > fit:
            raise ClusterError(
                f"a vLLM server takes {job.gpus_per_server} GPUs (rollout.vllm.tensor_parallel), and a node has {gpus} "
                f"({section}.gpus_per_node): correct one of them"
            )
        return min(fit, workers)  # whole nodes, so that servers fill them without gaps
    if job.replicas > 1:
        each = workers // job.replicas
        if each <= fit:  # a node has complete replicas
            return math.ceil(job.replicas / math.ceil(job.replicas / (fit // each))) * each
        nodes = math.ceil(each / fit)
        if each % nodes == 0:  # a replica has complete nodes
            return each // nodes
    return math.ceil(workers / math.ceil(workers / fit))
