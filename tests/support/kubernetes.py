"""Jobs for Kubernetes, and strict schemas of what muster writes for it: a field that is not here is a mistake.

Written by hand after KubeRay 1.7.0, JobSet 0.12.0, Kubeflow Trainer 2.3.0 and Kubernetes 1.36. The real schemas know
far more fields; `tests.support.crds` checks against them where they are at hand.
The schemas also have those rules of KubeRay's operator that concern these fields. A job that breaks one is accepted by
a cluster without the operator's webhook, and then stays `ValidationFailed`.
"""

from __future__ import annotations

from typing import Any

import jsonschema

from cluster.job import ClusterJob
from cluster.kubernetes.kinds import manifests
from trainer.recipe.sections.cluster import KubernetesSection

RECIPE = "name: gsm8k\nmodel: {path: 'Qwen/Qwen2.5-7B-Instruct'}\n"
QUANTITY = r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$"
DNS_LABEL = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"


def job(
    name: str = "gsm8k", workers: tuple[int, int] = (2, 2), gpus: int = 1, cpus: int = 4, **given: Any
) -> ClusterJob:
    """``recipe``, ``command`` and ``run_uri`` are the job's; everything else is a setting of cluster.kubernetes."""
    own = {key: given.pop(key) for key in ("recipe", "command", "run_uri") if key in given}
    settings = KubernetesSection.model_validate(given).model_dump(mode="json")
    return ClusterJob(
        name, own.pop("run_uri", f"s3://runs/{name}"), own.pop("recipe", RECIPE), workers, gpus, cpus, settings, **own
    )


def manifest(wanted: ClusterJob) -> dict[str, Any]:
    """Returns the job's own manifest, without what is created before it."""
    return manifests(wanted)[-1]


def fields(required: str = "", **properties: Any) -> dict[str, Any]:
    made = {"type": "object", "additionalProperties": False, "properties": properties}
    return made | ({"required": required.split()} if required else {})


def many(items: dict[str, Any], least: int = 1) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": least}


TEXT = {"type": "string"}
FILLED = {"type": "string", "minLength": 1}
COUNT = {"type": "integer", "minimum": 0}
POSITIVE = {"type": "integer", "minimum": 1}
FLAG = {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
LABELS = {
    "type": "object",
    "additionalProperties": {"type": "string", "maxLength": 63, "pattern": r"^[-A-Za-z0-9_.]*$"},
}
AMOUNTS = {"type": "object", "additionalProperties": {"type": "string", "pattern": QUANTITY}}


def metadata(length: int) -> dict[str, Any]:
    name = {"type": "string", "maxLength": length, "pattern": DNS_LABEL}
    return fields("name labels annotations", name=name, namespace=FILLED, labels=LABELS, annotations=TEXTS)


# Variables that KubeRay sets itself, or wants in fields of its own.
VARIABLE = {
    "type": "string",
    "minLength": 1,
    "not": {"pattern": "^(RAY_enable_autoscaler_v2$|RAY_REDIS_|REDIS_|KUBERAY_)"},
}
CAPABILITIES = fields("drop", drop={"const": ["ALL"]})
CONTAINER_SECURITY = fields(
    "allowPrivilegeEscalation capabilities",
    allowPrivilegeEscalation={"const": False},
    capabilities=CAPABILITIES,
)
CONTAINER = fields(
    "name image resources securityContext",
    securityContext=CONTAINER_SECURITY,
    name={"type": "string", "pattern": DNS_LABEL},
    image=FILLED,
    command=many(FILLED),
    args=many(FILLED),
    env=many(
        {
            "oneOf": [
                fields("name value", name=VARIABLE, value=TEXT),
                fields(
                    "name valueFrom",
                    name=VARIABLE,
                    valueFrom=fields(
                        "fieldRef", fieldRef=fields("apiVersion fieldPath", apiVersion=TEXT, fieldPath=TEXT)
                    ),
                ),
            ]
        }
    ),
    envFrom=many(fields("secretRef", secretRef=fields("name", name=FILLED))),
    resources=fields("requests limits", requests=AMOUNTS, limits=AMOUNTS),
    ports=many(
        fields(
            "name containerPort", name={"type": "string", "maxLength": 15, "pattern": DNS_LABEL}, containerPort=COUNT
        )
    ),
    lifecycle=fields("preStop", preStop=fields("exec", exec=fields("command", command=many(FILLED)))),
    volumeMounts=many(fields("name mountPath", name=FILLED, mountPath=FILLED, readOnly=FLAG)),
)
DOWNWARD = fields("path fieldRef", path=FILLED, fieldRef=fields("fieldPath", fieldPath=FILLED))
VOLUME = fields(
    "name",
    persistentVolumeClaim=fields("claimName", claimName=FILLED),
    name=FILLED,
    emptyDir=fields("medium sizeLimit", medium={"const": "Memory"}, sizeLimit={"type": "string", "pattern": QUANTITY}),
    downwardAPI=fields("items", items=many(DOWNWARD)),
)
TOLERATION = fields(
    key=FILLED,
    operator={"enum": ["Exists", "Equal"]},
    value=TEXT,
    effect={"enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"]},
    tolerationSeconds=COUNT,
)
POD_SECURITY = fields(
    "runAsNonRoot seccompProfile",
    runAsNonRoot={"const": True},
    seccompProfile=fields("type", type={"const": "RuntimeDefault"}),
    fsGroup=COUNT,
    fsGroupChangePolicy={"enum": ["OnRootMismatch", "Always"]},
)
POD = fields(
    "spec",
    metadata=fields(annotations=TEXTS),
    spec=fields(
        "containers securityContext",
        securityContext=POD_SECURITY,
        containers=many(CONTAINER),
        volumes=many(VOLUME),
        restartPolicy={"const": "Never"},
        terminationGracePeriodSeconds=COUNT,
        serviceAccountName=FILLED,
        nodeSelector=LABELS,
        tolerations=many(TOLERATION),
    ),
)
RAY_PARAMETERS = {
    **fields("object-store-memory"),
    "properties": {"num-cpus": TEXT, "dashboard-host": TEXT, "object-store-memory": {"pattern": "^[0-9]+$"} | TEXT},
}
RAYJOB = fields(
    "apiVersion kind metadata spec",
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=metadata(47),
    spec=fields(
        "entrypoint submissionMode backoffLimit shutdownAfterJobFinishes rayClusterSpec",
        entrypoint=FILLED,
        submissionMode={"const": "K8sJobMode"},
        submitterConfig=fields("backoffLimit", backoffLimit=COUNT),
        submitterPodTemplate=POD,
        backoffLimit=COUNT,
        suspend=FLAG,
        shutdownAfterJobFinishes={"const": True},  # suspend and ttlSecondsAfterFinished need it
        ttlSecondsAfterFinished=COUNT,
        activeDeadlineSeconds=POSITIVE,
        rayClusterSpec=fields(
            "rayVersion headGroupSpec workerGroupSpecs enableInTreeAutoscaling",
            rayVersion={"type": "string", "pattern": r"^2\.(5[2-9]|[6-9][0-9])\."},  # the token needs 2.52
            authOptions=fields("mode", mode={"enum": ["token", "disabled"]}),
            enableInTreeAutoscaling=FLAG,
            autoscalerOptions=fields(
                "version securityContext",
                version={"enum": ["v1", "v2"]},
                idleTimeoutSeconds=COUNT,
                securityContext=CONTAINER_SECURITY,
            ),
            headGroupSpec=fields("rayStartParams template", rayStartParams=RAY_PARAMETERS, template=POD),
            workerGroupSpecs=many(
                fields(
                    "groupName replicas minReplicas maxReplicas rayStartParams template",
                    groupName=FILLED,
                    replicas=COUNT,
                    minReplicas=COUNT,
                    maxReplicas=COUNT,
                    rayStartParams=RAY_PARAMETERS,
                    template=POD,
                )
            ),
        ),
    ),
)
ON_CONDITION = fields("type status", type=FILLED, status={"enum": ["True", "False", "Unknown"]})
INDEXED = fields(
    "completionMode completions parallelism backoffLimit template",
    completionMode={"const": "Indexed"},
    completions=COUNT,
    parallelism=COUNT,
    backoffLimit=COUNT,
    activeDeadlineSeconds=POSITIVE,
    podFailurePolicy=fields(
        "rules", rules=many(fields("action", action={"const": "FailJob"}, onPodConditions=many(ON_CONDITION)))
    ),
    template=POD,
)
LABELLED = fields("labels", labels=LABELS)
JOBSET_SPEC = fields(
    "failurePolicy network replicatedJobs",
    suspend=FLAG,
    ttlSecondsAfterFinished=COUNT,
    failurePolicy=fields(
        "maxRestarts",
        maxRestarts=COUNT,
        rules=many(
            fields(
                "name action",
                name=FILLED,
                action={"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]},
                onJobFailureReasons=many({"enum": ["PodFailurePolicy", "BackoffLimitExceeded", "DeadlineExceeded"]}),
            )
        ),
    ),
    network=fields(enableDNSHostnames=FLAG, publishNotReadyAddresses=FLAG, subdomain=FILLED),
    replicatedJobs=many(
        fields(
            "name replicas template",
            name=FILLED,
            replicas=COUNT,
            template=fields("spec", metadata=LABELLED, spec=INDEXED),
        )
    ),
)
JOBSET = fields(
    "apiVersion kind metadata spec",
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=metadata(63),
    spec=JOBSET_SPEC,
)
TRAINER = {"const": "trainer.kubeflow.org/v1alpha1"}
TRAINJOB = fields(
    "apiVersion kind metadata spec",
    apiVersion=TRAINER,
    kind={"const": "TrainJob"},
    metadata=metadata(63),
    spec=fields(
        "runtimeRef",
        runtimeRef=fields(
            "name", apiGroup={"const": "trainer.kubeflow.org"}, kind={"const": "TrainingRuntime"}, name=FILLED
        ),
        suspend=FLAG,
        activeDeadlineSeconds=POSITIVE,
    ),
)
TRAINING_RUNTIME = fields(
    "apiVersion kind metadata spec",
    apiVersion=TRAINER,
    kind={"const": "TrainingRuntime"},
    metadata=metadata(63),
    spec=fields(
        "mlPolicy template",
        mlPolicy=fields("numNodes", numNodes=POSITIVE),
        template=fields("spec", spec=JOBSET_SPEC),
    ),
)
SCHEMAS = {"RayJob": RAYJOB, "JobSet": JOBSET, "TrainJob": TRAINJOB, "TrainingRuntime": TRAINING_RUNTIME}


def mistakes(manifest: dict[str, Any]) -> list[str]:
    """Returns what the schema of the manifest's kind refuses, with paths, and worker groups outside their bounds."""
    schema = SCHEMAS[manifest["kind"]]
    errors = jsonschema.Draft202012Validator(schema).iter_errors(manifest)
    found = [f"{error.json_path}: {error.message}" for error in errors]
    for group in manifest["spec"].get("rayClusterSpec", {}).get("workerGroupSpecs", []):
        if not group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
            found.append(f"{group['groupName']}: replicas {group['replicas']} is outside its bounds")
    return found
