"""Finds the packages; everything else about the project stands in pyproject.toml.

pyproject.toml can map folders to packages but cannot find sub-packages under a prefix, and a list kept by hand would
lose a new one from the wheel without a word.
"""

from setuptools import find_namespace_packages, setup

SHIPPED = ["launcher", "launcher.*", "cluster", "cluster.*", "trainer", "trainer.*", "recipes", "deepspeed", "slurm"]

found = find_namespace_packages(include=SHIPPED, exclude=["*__pycache__*"])
# `import muster`, and `pytest --pyargs muster.testing` for authors of plug-ins.
short = {"launcher.muster": "muster", "launcher.testing": "muster.testing"}
setup(packages=[short.get(package, f"muster.{package}") for package in found])
