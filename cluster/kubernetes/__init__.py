"""A run as a RayJob (KubeRay, elastic) or as a JobSet (torchrun, fixed size). See docs/clusters/kubernetes.md."""

from cluster.kubernetes.jobs import Kubernetes

__all__ = ["Kubernetes"]
