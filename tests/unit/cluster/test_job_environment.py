"""Where a driver stands, by its environment alone."""

from __future__ import annotations

import pytest

from cluster.job_environment import JobEnvironment, job_environment


@pytest.mark.parametrize(
    ("environment", "job", "address"),
    [
        ({}, None, None),
        ({"RAY_ADDRESS": ""}, None, None),
        ({"RAY_ADDRESS": "10.0.0.1:6379"}, None, "10.0.0.1:6379"),
        ({"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}, None, "auto"),
        ({"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}", "RAY_ADDRESS": "10.0.0.1:6379"}, None, "10.0.0.1:6379"),
        ({"RAY_JOB_CONFIG_JSON_ENV_VAR": '{"metadata": {"job_submission_id": "j1"}}'}, "ray:j1", "auto"),
        ({"RAY_JOB_CONFIG_JSON_ENV_VAR": "not json"}, None, "auto"),
        ({"SLURM_JOB_ID": "4711"}, "slurm:4711", None),
        (
            {"SLURM_JOB_ID": "4712", "SLURM_ARRAY_JOB_ID": "4711", "SLURM_ARRAY_TASK_ID": "3"},
            "slurm:4711_3",
            None,
        ),
        ({"MUSTER_RAYJOB": "fine-tune"}, "kubernetes:fine-tune", None),
        ({"MUSTER_RAYJOB": "fine-tune", "MUSTER_NAMESPACE": "ml"}, "kubernetes:ml/fine-tune", None),
        ({"TORCHELASTIC_RUN_ID": "none"}, None, None),
        ({"TORCHELASTIC_RUN_ID": "r1"}, "torchrun:r1", None),
        ({"SLURM_JOB_ID": "4711", "TORCHELASTIC_RUN_ID": "r1"}, "slurm:4711", None),
    ],
)
def test_standing(environment: dict[str, str], job: str | None, address: str | None) -> None:
    assert job_environment(environment) == JobEnvironment(job, address)


def test_the_nodes_of_a_job_are_all_that_it_gets() -> None:
    assert job_environment({"SLURM_JOB_ID": "4711", "SLURM_JOB_NUM_NODES": "2"}).nodes == 2
    assert job_environment({}).nodes == 0
