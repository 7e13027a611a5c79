"""The settings of clusters that are refused before a job is made."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.trainer.recipe.test_mistakes import GOOD, changed, mistakes
from trainer.recipe import loads, parse
from trainer.recipe.writing import dump


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"pip": "requirements.txt"}, "pip names a file"),
        ({"uv": {"packages": "requirements.txt"}}, "uv names a file"),
        ({"conda": "environment.yml"}, "conda names a file"),
        ({"working_dir": "s3://bucket/code.zip"}, "working_dir is a folder of this machine"),
        ({"working_dir": ".", "excludes": ["data"]}, "excludes has no effect"),
        ({"py_modules": "mine"}, "py_modules is a list"),
        ({"env_vars": {"A": 1}}, "env_vars is a mapping of names to texts"),
        ({"env_vars": {"WANDB_API_KEY": "0123456789abcdef"}}, "WANDB_API_KEY holds credentials"),
        ({"env_vars": {"A": "hf_abcdefghijklmnopqrstuvwxyz"}}, "holds credentials"),
    ],
)
def test_a_runtime_environment_that_ray_would_not_get(environment: dict[str, Any], told: str) -> None:
    ((path, message),) = mistakes(changed("cluster.ray.runtime_env", environment))
    assert path == "cluster.ray.runtime_env"
    assert told in message
    assert "0123456789abcdef" not in message


def test_a_runtime_environment_is_sent_as_it_is() -> None:
    environment = {"conda": "of-the-nodes", "image_uri": "registry/image", "pip": ["a"], "env_vars": {"B": "1"}}
    assert parse(changed("cluster.ray.runtime_env", environment)).cluster.ray.runtime_env == environment
    recipe = loads(dump(parse(GOOD)), overrides=["cluster.ray.runtime_env.env_vars.C='2'"])
    assert recipe.cluster.ray.runtime_env == {"env_vars": {"C": "2"}}


def test_a_name_that_ray_does_not_take() -> None:
    ((path, message),) = mistakes(changed("cluster.ray.submission_id", "a/b"))
    assert path == "cluster.ray.submission_id"
    assert "cannot name a job of Ray" in message
