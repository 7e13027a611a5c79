"""What every kind of cluster does: this test picks up a new row of `cluster.KINDS` by itself."""

from __future__ import annotations

import pytest

from cluster import KINDS, ClusterError, cluster_of, renderer_of
from launcher.submit.submit import job_of
from tests.support.training import small_recipe
from trainer.recipe.sections.cluster import ClusterSection


@pytest.mark.parametrize("kind", KINDS)
def test_a_job_is_rendered_from_the_recipes_defaults_and_nothing_is_contacted(kind, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # there is no sbatch, kubectl or ray to call
    recipe = small_recipe("some-run", tiny_model, tmp_path, storage="s3://bucket/runs")
    job = job_of(recipe, kind, arguments=("recipe.yaml",))
    text = renderer_of(kind).render(job)
    assert recipe.name in text or "recipe.yaml" in text
    assert renderer_of(kind).render(job) == text


def test_every_kind_has_a_section_of_settings_and_no_other_is_offered() -> None:
    assert set(ClusterSection.model_fields) - {"env"} == set(KINDS)
    with pytest.raises(ClusterError, match="there are: ray, slurm"):
        cluster_of("lsf")
