"""pyproject.toml, constraints.txt, the image and what is installed agree."""

from __future__ import annotations

import importlib.metadata
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from trainer.recipe.trackers import TRACKERS
from trainer.run.frozen import DISTRIBUTION, code_version

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
LISTED = [Requirement(line) for line in (*PROJECT["dependencies"], *EXTRAS["dev"], *EXTRAS["docs"])]
DIRECT = [requirement for requirement in LISTED if requirement.name != PROJECT["name"]]


def pins() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(r.name): r for r in found}


@pytest.mark.parametrize("requirement", DIRECT, ids=lambda r: r.name)
def test_each_direct_dependency_is_pinned_to_a_version_that_it_allows(requirement: Requirement) -> None:
    (pin,) = pins()[canonicalize_name(requirement.name)].specifier
    assert pin.operator == "=="
    assert requirement.specifier.contains(pin.version, prereleases=True)


@pytest.mark.parametrize("requirement", DIRECT, ids=lambda r: r.name)
def test_each_direct_dependency_is_installed_in_an_allowed_version(requirement: Requirement) -> None:
    version = importlib.metadata.version(requirement.name)
    assert requirement.specifier.contains(version, prereleases=True)


def test_the_distribution_has_one_name() -> None:
    """The code looks its version up by it, and the image is built from the wheel of that name."""
    assert PROJECT["name"] == DISTRIBUTION
    assert code_version().startswith(PROJECT["version"])
    dockerfile = (ROOT / "cluster" / "kubernetes" / "Dockerfile").read_text()
    assert f"{DISTRIBUTION.replace('-', '_')}-{PROJECT['version']}-py3-none-any.whl" in dockerfile
    itself = {r.name for group in EXTRAS.values() for r in map(Requirement, group) if r.extras and "muster" in r.name}
    assert itself == {DISTRIBUTION}


def test_an_extra_is_named_by_its_library() -> None:
    """So that a message which says ``pip install LIBRARY`` and the list of extras say the same."""
    for name in set(EXTRAS) - {"dev", "docs"}:
        (library,) = map(Requirement, EXTRAS[name])
        assert canonicalize_name(name) == canonicalize_name(library.name)
    assert {canonicalize_name(TRACKERS[name].package) for name in TRACKERS.names()} <= {*map(canonicalize_name, EXTRAS)}
