"""The strategic merge: every rule of Kubernetes' that a pod's template can meet, and every mistake with its path."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from cluster.job import ClusterError
from cluster.kubernetes.patch import merged

SPEC: dict[str, Any] = {
    "containers": [
        {
            "name": "muster",
            "image": "i",
            "args": ["a", "b"],
            "env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}],
            "ports": [{"name": "x", "containerPort": 1}],
            "resources": {"limits": {"cpu": "4", "memory": "8Gi"}},
            "volumeMounts": [{"name": "s", "mountPath": "/dev/shm"}],
        }
    ],
    "volumes": [{"name": "s", "emptyDir": {"medium": "Memory"}}],
    "tolerations": [{"key": "t"}],
    "nodeSelector": {"a": "b"},
    "terminationGracePeriodSeconds": 120,
}


def patched(patch: dict[str, Any]) -> dict[str, Any]:
    before = deepcopy(SPEC)
    made = merged(SPEC, patch, "pod", "spec")
    assert before == SPEC
    return made


def main(**fields: Any) -> dict[str, Any]:
    made: dict[str, Any] = patched({"containers": [{"name": "muster", **fields}]})["containers"][0]
    return made


def test_mappings_are_merged_and_scalars_replaced() -> None:
    made = patched({"nodeSelector": {"c": "d"}, "terminationGracePeriodSeconds": 1, "priorityClassName": "high"})
    assert made["nodeSelector"] == {"a": "b", "c": "d"}
    assert (made["terminationGracePeriodSeconds"], made["priorityClassName"]) == (1, "high")
    assert made["volumes"] == SPEC["volumes"]
    assert main(resources={"limits": {"cpu": 2}})["resources"] == {"limits": {"cpu": 2, "memory": "8Gi"}}


def test_null_deletes_and_leaves_nothing_behind_in_what_is_new() -> None:
    assert "nodeSelector" not in patched({"nodeSelector": None})
    assert patched({"nodeSelector": {"a": None}})["nodeSelector"] == {}
    assert patched({"affinity": {"nodeAffinity": None, "podAffinity": {}}})["affinity"] == {"podAffinity": {}}
    assert "hostNetwork" not in patched({"hostNetwork": None})


@pytest.mark.parametrize(
    ("field", "key", "old"),
    [("env", "name", ["A", "B"]), ("ports", "containerPort", [1]), ("volumeMounts", "mountPath", ["/dev/shm"])],
)
def test_lists_of_a_container_are_merged_by_their_keys(field: str, key: str, old: list[Any]) -> None:
    new: Any = 2 if key == "containerPort" else "/new"
    made = main(**{field: [{key: new}, {key: old[0], "name": "x"} if key != "name" else {key: old[0], "value": "3"}]})
    assert [item[key] for item in made[field]] == [*old, new], "what was there stays first, in its order"
    assert made["image"] == "i"
    if key == "name":
        assert made[field][0] == {"name": "A", "value": "3"}


@pytest.mark.parametrize(
    ("field", "key"),
    [
        ("volumes", "name"), ("imagePullSecrets", "name"), ("initContainers", "name"), ("hostAliases", "ip"),
        ("resourceClaims", "name"), ("schedulingGates", "name"), ("topologySpreadConstraints", "topologyKey"),
    ],
)  # fmt: skip
def test_lists_of_a_pod_are_merged_by_their_keys(field: str, key: str) -> None:
    first = merged(SPEC, {field: [{key: "a", "x": 1}, {key: "b"}]}, "pod", "spec")
    made = merged(first, {field: [{key: "a", "y": 2}, {key: "c"}, {"$patch": "delete", key: "b"}]}, "pod", "spec")
    assert [item[key] for item in made[field]] == [item[key] for item in SPEC.get(field, [])] + ["a", "c"]
    assert next(item for item in made[field] if item[key] == "a") == {key: "a", "x": 1, "y": 2}


def test_a_sidecar_comes_after_the_container_that_kuberay_takes_for_its_own() -> None:
    made = patched({"containers": [{"name": "sidecar", "image": "j"}]})
    assert [container["name"] for container in made["containers"]] == ["muster", "sidecar"]


def test_other_lists_are_replaced() -> None:
    assert patched({"tolerations": [{"key": "u"}]})["tolerations"] == [{"key": "u"}]
    assert main(args=["c"])["args"] == ["c"]
    assert main(envFrom=[{"configMapRef": {"name": "x"}}])["envFrom"] == [{"configMapRef": {"name": "x"}}]


def test_directives() -> None:
    assert patched({"nodeSelector": {"$patch": "replace", "c": "d"}})["nodeSelector"] == {"c": "d"}
    assert "nodeSelector" not in patched({"nodeSelector": {"$patch": "delete"}})
    assert main(env=[{"$patch": "replace"}, {"name": "C", "value": "3"}])["env"] == [{"name": "C", "value": "3"}]
    assert main(env=[{"name": "A", "$patch": "delete"}])["env"] == [{"name": "B", "value": "2"}]
    assert patched({"nodeSelector": {"$patch": "merge", "c": "d"}})["nodeSelector"] == {"a": "b", "c": "d"}


@pytest.mark.parametrize(
    ("patch", "said"),
    [
        ({"nodeSelector": ["a"]}, r"^pod\.nodeSelector: expected a mapping, got a list$"),
        ({"volumes": {"name": "s"}}, r"^pod\.volumes: expected a list, got a mapping$"),
        ({"containers": ["muster"]}, r"^pod\.containers\.0: expected a mapping with the key name, got 'muster'$"),
        ({"containers": [{"image": "x"}]}, r"^pod\.containers\.0: has no name, by which"),
        ({"containers": [{"name": "muster", "env": {"A": "1"}}]}, r"^pod\.containers\.0\.env: expected a list, got a"),
        (
            {"containers": [{"name": "muster", "env": [{"name": "A", "value": 1}]}]},
            r"^pod\.containers\.0\.env\.0\.value: expected a text, got 1; put it in quotes$",
        ),
        ({"containers": [{"name": "new", "env": [{"value": "x"}]}]}, r"^pod\.containers\.0\.env\.0: has no name"),
        ({"nodeSelector": {"spot": True}}, r"^pod\.nodeSelector\.spot: expected a text, got True; put it in quotes$"),
        ({"hostNetwork": "true"}, r"^pod\.hostNetwork: expected true or false, got 'true'$"),
        ({"imagePullSecret": []}, r"^pod\.imagePullSecret: there is no such field; did you mean 'imagePullSecrets'\?$"),
        ({"image_pull_secrets": []}, r"did you mean 'imagePullSecrets'\?"),
        ({"labels": {"a": "b"}}, r"^pod\.labels: there is no such field here; it belongs to `metadata`$"),
        ({"env": []}, r"^pod\.env: there is no such field here; it belongs to an entry of `containers`$"),
        ({"containers": [{"name": "muster", "tolerations": []}]}, r"0\.tolerations: .* to the pod's `spec`$"),
        ({"nodeselector": {}}, r"did you mean 'nodeSelector'\?"),
        ({"containers": [{"name": "muster", "resource": {}}]}, r"^pod\.containers\.0\.resource: .* 'resources'\?$"),
        ({"containers": [{"name": "muster", "resources": {"limits": 4}}]}, r"limits: expected a mapping, got 4$"),
        ({"nodeSelector": {"$patch": "remove"}}, r"^pod\.nodeSelector\.\$patch is 'remove'; it is replace, delete or"),
        ({"nodeSelector": {"$retainKeys": ["a"]}}, r"^pod\.nodeSelector\.\$retainKeys: not supported"),
        ({"$setElementOrder/volumes": []}, r"^pod\.\$setElementOrder/volumes: not supported"),
        ({"tolerations": [{"$patch": "delete", "key": "t"}]}, r"^pod\.tolerations\.0: this list has no merge key"),
        ({"volumes": [{"$patch": "replace", "name": "x"}]}, r"^pod\.volumes\.0: `\$patch: replace` stands alone"),
        ({"volumes": [{"name": "x"}, {"name": "x"}]}, r"^pod\.volumes\.1: is the second entry with name 'x'"),
        ({"nodeSelector": {1: "x"}}, r"^pod\.nodeSelector: the key 1 is no text"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_with_its_path(patch: dict[str, Any], said: str) -> None:
    with pytest.raises(ClusterError, match=said) as caught:
        patched(patch)
    assert caught.value.usage
    assert "\n" not in str(caught.value)


def test_a_field_that_is_younger_than_the_tables_passes() -> None:
    assert patched({"quantumEntanglement": {"with": ["x"]}})["quantumEntanglement"] == {"with": ["x"]}


def test_labels_and_annotations_are_texts() -> None:
    made = merged({"labels": {"a": "b"}}, {"labels": {"c": "d"}}, "m", "metadata")
    assert made == {"labels": {"a": "b", "c": "d"}}
    with pytest.raises(ClusterError, match=r"^m\.annotations\.inject: expected a text, got False; put it in quotes$"):
        merged({}, {"annotations": {"inject": False}}, "m", "metadata")
