"""Checks objects against the CustomResourceDefinitions in a folder, as strictly as `kubectl create` does.

The definitions are those of the projects (KubeRay, JobSet, Kubeflow Trainer), and none are kept here:

    MUSTER_CRDS=FOLDER pytest tests/unit/cluster

with the YAML files of `kubectl get crd NAME -o yaml`, or of the projects' releases, in FOLDER.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

VARIABLE = "MUSTER_CRDS"
TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,), "array": (list,), "string": (str,), "boolean": (bool,), "integer": (int,),
    "number": (int, float),
}  # fmt: skip


def crds() -> dict[tuple[str, str], dict[str, Any]]:
    """Returns the schemas by (apiVersion, kind); none without the variable."""
    found = {}
    for path in sorted(Path(folder).glob("*.y*ml")) if (folder := os.environ.get(VARIABLE)) else ():
        for made in yaml.load_all(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            if made and made.get("kind") == "CustomResourceDefinition":
                group, kind = made["spec"]["group"], made["spec"]["names"]["kind"]
                for version in made["spec"]["versions"]:
                    found[f"{group}/{version['name']}", kind] = version["schema"]["openAPIV3Schema"]
    return found


def refused(value: Any, schema: dict[str, Any], where: str = "") -> Iterator[str]:
    """Yields what the schema refuses: unknown fields, missing ones, wrong types and values, and keys given twice."""
    if schema.get("x-kubernetes-int-or-string"):
        if not isinstance(value, int | str):
            yield f"{where}: {value!r} is neither a number nor a text"
        return
    if (kind := schema.get("type")) and (
        not isinstance(value, TYPES[kind]) or (isinstance(value, bool) and kind != "boolean")
    ):
        yield f"{where}: {value!r} is no {kind}"
        return
    if "enum" in schema and value not in schema["enum"]:
        yield f"{where}: {value!r} is not in {schema['enum']}"
    if isinstance(value, int | float) and not schema.get("minimum", value) <= value <= schema.get("maximum", value):
        yield f"{where}: {value!r} is out of bounds"
    if isinstance(value, dict):
        yield from (f"{where}: {key} is missing" for key in schema.get("required", ()) if key not in value)
        # The metadata of the object itself are Kubernetes' own.
        loose = schema.get("x-kubernetes-preserve-unknown-fields") or (where == ".metadata")
        known, others = schema.get("properties", {}), schema.get("additionalProperties")
        for key, item in value.items():
            below = known.get(key, others)
            if below is None and not loose and (where or key not in ("apiVersion", "kind")):
                yield f"{where}.{key}: unknown field"
            elif isinstance(below, dict):
                yield from refused(item, below, f"{where}.{key}")
    if isinstance(value, list):
        keys = schema.get("x-kubernetes-list-map-keys")
        names = [tuple(item.get(key) for key in keys) for item in value] if keys else []
        yield from (f"{where}: {name} is given twice" for name in set(names) if names.count(name) > 1)
        for index, item in enumerate(value):
            yield from refused(item, schema.get("items", {}), f"{where}[{index}]")
