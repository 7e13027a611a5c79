"""A run as a RayJob (KubeRay, elastic), a JobSet or a TrainJob (torchrun, fixed size).

See docs/clusters/kubernetes.md."""

from cluster.kubernetes.jobs import Kubernetes

__all__ = ["Kubernetes"]
