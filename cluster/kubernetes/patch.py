"""Merges a user's patch over a manifest as Kubernetes' strategic merge patch does. Pure: data in, data out.

A mapping is merged key by key; null deletes a key. A list of objects that has a merge key is merged entry by entry, any
other list is replaced. ``$patch: replace`` in a mapping, or as an entry of its own in a list, drops what was there;
``$patch: delete`` deletes its mapping, or the entry with its merge key.
https://github.com/kubernetes/community/blob/master/contributors/devel/sig-api-machinery/strategic-merge-patch.md

One difference: entries that are new come after those that were there, in every list, because KubeRay takes the first
container of a pod for Ray's. Kubernetes puts them first.

A strategic merge is not defined for custom resources, so the tables below have the facts about a pod's template: merge
keys are the ``x-kubernetes-patch-merge-key`` of Kubernetes' OpenAPI document, shapes are the types of the same fields,
both read from Kubernetes 1.36 (k8s.io/api v0.36.3). A field that is not in a table is merged or replaced by its shape
in the patch, and checked by the cluster.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from difflib import get_close_matches
from typing import Any

from cluster.job import ClusterError

Fields = dict[str, Any]

_CONTAINERS = ("spec.containers", "spec.initContainers")
MERGE_KEYS = {
    "metadata.ownerReferences": "uid",
    "spec.hostAliases": "ip",
    "spec.imagePullSecrets": "name",
    "spec.resourceClaims": "name",
    "spec.schedulingGates": "name",
    "spec.topologySpreadConstraints": "topologyKey",
    "spec.volumes": "name",
} | {
    path: key
    for containers in _CONTAINERS
    for path, key in {
        containers: "name",
        f"{containers}[].env": "name",
        f"{containers}[].ports": "containerPort",
        f"{containers}[].volumeDevices": "devicePath",
        f"{containers}[].volumeMounts": "mountPath",
    }.items()
}
"""The merge keys of lists, by their paths in a pod's template. All other lists are atomic."""


def _shapes(**names: str) -> dict[str, str]:
    return {name: shape for shape, listed in names.items() for name in listed.split()}


_POD = _shapes(
    number="activeDeadlineSeconds priority terminationGracePeriodSeconds",
    mapping="affinity dnsConfig nodeSelector os overhead resources schedulingGroup securityContext",
    flag="automountServiceAccountToken enableServiceLinks hostIPC hostNetwork hostPID hostUsers setHostnameAsFQDN "
    "shareProcessNamespace",
    list="containers ephemeralContainers hostAliases imagePullSecrets initContainers readinessGates resourceClaims "
    "schedulingGates tolerations topologySpreadConstraints volumes",
    text="dnsPolicy hostname hostnameOverride nodeName preemptionPolicy priorityClassName restartPolicy "
    "runtimeClassName schedulerName serviceAccount serviceAccountName subdomain",
)
_CONTAINER = _shapes(
    list="args command env envFrom ports resizePolicy restartPolicyRules volumeDevices volumeMounts",
    text="image imagePullPolicy name restartPolicy terminationMessagePath terminationMessagePolicy workingDir",
    mapping="lifecycle livenessProbe readinessProbe resources securityContext startupProbe",
    flag="stdin stdinOnce tty",
)
_METADATA = _shapes(mapping="annotations labels", list="finalizers ownerReferences", text="generateName name namespace")
_ANY_KEY = {"*": "text"}
SHAPES: dict[str, dict[str, str]] = {
    "": _shapes(mapping="metadata spec"),
    "metadata": _METADATA,
    "metadata.annotations": _ANY_KEY,
    "metadata.labels": _ANY_KEY,
    "spec": _POD,
    "spec.nodeSelector": _ANY_KEY,
} | {
    path: shapes
    for containers in _CONTAINERS
    for path, shapes in {
        f"{containers}[]": _CONTAINER,
        f"{containers}[].env[]": _shapes(text="name value", mapping="valueFrom"),
    }.items()
}
"""The shapes of fields, by the path of their mapping in a pod's template."""


def merged(old: Mapping[str, Any], patch: Mapping[str, Any], where: str, at: str) -> Fields:
    """Returns ``old`` with ``patch`` over it; neither is changed. ``at``: the path of both in a pod's template, such as
    ``spec.containers[]``; empty for the template itself. ``where``: the path of the patch in the recipe, for messages.
    Raises ClusterError."""
    made = {} if _directive(patch, where) == "replace" else deepcopy(dict(old))
    for key, value in patch.items():
        if key == "$patch":
            continue
        path, below = f"{where}.{key}", f"{at}.{key}" if at else key
        _check_shape(key, value, made.get(key), path, at)
        if value is None or (isinstance(value, Mapping) and _directive(value, path) == "delete"):
            made.pop(key, None)
        elif isinstance(value, Mapping):
            made[key] = merged(made.get(key) or {}, value, path, below)
        elif isinstance(value, list | tuple):
            made[key] = _merged_list(made.get(key) or [], value, path, below)
        else:
            made[key] = value
    return made


def _merged_list(old: list[Any], patch: list[Any] | tuple[Any, ...], where: str, at: str) -> list[Any]:
    merge_key = MERGE_KEYS.get(at)
    if merge_key is None:
        for index, item in enumerate(patch):
            if isinstance(item, Mapping) and any(str(key).startswith("$") for key in item):
                raise ClusterError(
                    f"{where}.{index}: this list has no merge key, so the patch replaces it; remove $patch"
                )
        return deepcopy(list(patch))
    entries: dict[Any, Fields] = {item[merge_key]: item for item in old}
    if any(isinstance(item, Mapping) and item.get("$patch") == "replace" for item in patch):
        entries = {}
    for index, item in enumerate(patch):
        path = f"{where}.{index}"
        if not isinstance(item, Mapping):
            raise ClusterError(f"{path}: expected a mapping with the key {merge_key}, got {_shown(item)}")
        directive = _directive(item, path)
        if directive == "replace":
            if len(item) > 1:
                raise ClusterError(
                    f"{path}: `$patch: replace` stands alone in an entry of the list; move the rest to another"
                )
        elif item.get(merge_key) is None:
            raise ClusterError(f"{path}: has no {merge_key}, by which the entries of this list are merged")
        elif any(isinstance(other, Mapping) and other.get(merge_key) == item[merge_key] for other in patch[:index]):
            raise ClusterError(
                f"{path}: is the second entry with {merge_key} {item[merge_key]!r}, which names an entry"
            )
        elif directive == "delete":
            entries.pop(item[merge_key], None)
        else:
            entries[item[merge_key]] = merged(entries.get(item[merge_key], {}), item, path, f"{at}[]")
    return list(entries.values())


def _directive(patch: Mapping[str, Any], where: str) -> str:
    """Returns the value of ``$patch``; ``merge`` without it."""
    for key in patch:
        if not isinstance(key, str):
            raise ClusterError(f"{where}: the key {key!r} is no text; put it in quotes")
        if key.startswith("$") and key != "$patch":
            raise ClusterError(f"{where}.{key}: not supported; write `$patch: replace`, `$patch: delete`, or null")
    found = patch.get("$patch", "merge")
    if found not in ("merge", "replace", "delete"):
        raise ClusterError(f"{where}.$patch is {found!r}; it is replace, delete or merge")
    return str(found)


def _check_shape(key: str, value: Any, old: Any, where: str, at: str) -> None:
    """Raises ClusterError for a known field of another shape, and for a name close to that of a known field."""
    if value is None:
        return
    shapes = SHAPES.get(at, {})
    expected = shapes.get(key, shapes.get("*"))
    if expected is None:
        folded = {name.lower(): name for name in shapes}
        if near := get_close_matches(re.sub("[-_]", "", key).lower(), folded, 1, 0.85):
            raise ClusterError(f"{where}: there is no such field; did you mean {folded[near[0]]!r}?")
        if shapes and (home := next((home for at, home in _HOMES.items() if key in SHAPES[at]), None)):
            raise ClusterError(f"{where}: there is no such field here; it belongs to {home}")
        # A quantity may be a number or a text.
        scalars = old is not None and {_shape(old), _shape(value)}.isdisjoint(("mapping", "list"))
        expected = _shape(value) if old is None or scalars else _shape(old)
    if _shape(value) != expected:
        quote = "; put it in quotes" if expected == "text" and _shape(value) in ("number", "flag") else ""
        raise ClusterError(f"{where}: expected {_ARTICLES[expected]}, got {_shown(value)}{quote}")


_HOMES = {"metadata": "`metadata`", "spec": "the pod's `spec`", "spec.containers[]": "an entry of `containers`"}
_ARTICLES = {"text": "a text", "number": "a number", "flag": "true or false", "mapping": "a mapping", "list": "a list"}


def _shape(value: Any) -> str:
    if isinstance(value, Mapping):
        return "mapping"
    if isinstance(value, list | tuple):
        return "list"
    return "flag" if isinstance(value, bool) else "number" if isinstance(value, int | float) else "text"


def _shown(value: Any) -> str:
    shape = _shape(value)
    return _ARTICLES[shape] if shape in ("mapping", "list") else repr(value)
