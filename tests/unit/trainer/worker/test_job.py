"""A job as plain values, which reach Ray's workers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.recipe import dump, load
from trainer.recipe.loading import shipped
from trainer.worker.job import Job


@pytest.mark.parametrize("path", shipped().values(), ids=shipped())
def test_the_recipe_is_the_same_after_the_way(path: Path) -> None:
    job = Job("s3://runs", 3, load(path), 10, {"host": "a"}, {"data": 1.5}, 2.5)
    there = Job.unpacked(json.loads(json.dumps(job.packed())))
    assert there == job
    assert dump(there.recipe) == dump(job.recipe)
