"""A run as a task of SkyPilot: data in, data out, and what SkyPilot's own parser reads in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import ClusterError, ClusterJob, cluster_of
from cluster.shell import END
from cluster.skypilot import SkyPilot, workers_per_node
from trainer.recipe.sections.cluster import SkyPilotSection

ODD = f'name: it\'s $(touch x) `id` "q" ünï ${{HOME}}\n{END}\nempty:\n\nlast: 1\n'


def job(workers: tuple[int, int] = (16, 16), gpus: int = 1, cpus: int = 8, **settings: Any) -> ClusterJob:
    section = SkyPilotSection.model_validate({"accelerators": "H100", **settings}).model_dump(mode="json")
    return ClusterJob("A.run_1", "s3://runs/A.run_1", ODD, workers, gpus, cpus, section)


def task(made: ClusterJob) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(SkyPilot().render(made))
    return loaded


@pytest.mark.parametrize(
    ("made", "nodes", "workers", "resources"),
    [
        (job(), 2, 8, {"cpus": "64+", "accelerators": "H100:8"}),
        (job((2, 8)), 1, 8, {"cpus": "64+", "accelerators": "H100:8"}),
        (job((4, 4), gpus=2, gpus_per_node=4), 2, 2, {"cpus": "16+", "accelerators": "H100:4"}),
        (job((3, 3), gpus=0), 3, 1, {"cpus": "8+"}),
        (replace(job((24, 24)), replicas=4), 4, 6, {"cpus": "48+", "accelerators": "H100:6"}),
        (
            job(resources={"use_spot": True, "cpus": "128+", "any_of": [{"infra": "aws"}]}),
            2,
            8,
            {"cpus": "128+", "accelerators": "H100:8", "use_spot": True, "any_of": [{"infra": "aws"}]},
        ),
        (job(accelerators=None, resources={"instance_type": "p5"}), 2, 8, {"cpus": "64+", "instance_type": "p5"}),
    ],
)
def test_nodes_have_what_their_workers_need(
    made: ClusterJob, nodes: int, workers: int, resources: dict[str, Any]
) -> None:
    found = task(made)
    assert (found["num_nodes"], found["resources"], workers_per_node(made)) == (nodes, resources, workers)
    assert f"--nproc-per-node={workers} " in found["run"]


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (job((11, 11)), "11 workers do not fill 2 nodes of 6"),
        (job(accelerators=None), "name one in cluster.skypilot.accelerators"),
        (job(gpus=16), r"a node has 8 \(cluster.skypilot.gpus_per_node\)"),
        (job(options={"run": "true"}), "options cannot set run"),
    ],
)
def test_what_is_no_task(made: ClusterJob, told: str) -> None:
    with pytest.raises(ClusterError, match=told):
        task(made)


def test_more_fields_of_the_task_are_the_users() -> None:
    options = {"workdir": ".", "secrets": {"AWS_ACCESS_KEY_ID": None}, "file_mounts": {"/data": "s3://corpus"}}
    found = task(job(options=options, setup="pip install .\npip list"))
    assert {name: found[name] for name in options} == options
    assert (found["name"], found["setup"]) == ("a-run-1", "pip install .\npip list")
    assert task(job())["setup"].startswith("python -m pip install muster-train")


def test_every_node_trains_the_whole_recipe(tmp_path: Path) -> None:
    """The commands of a task, run by a shell as on the second node, with a torchrun that notes its words."""
    (tmp_path / "torchrun").write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >{tmp_path}/words\n')
    (tmp_path / "torchrun").chmod(0o755)
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "__main__.py").touch()
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
    }
    subprocess.run(["bash", "-c", task(job())["run"]], cwd=tmp_path, env=environment, check=True, timeout=30)
    words = (tmp_path / "words").read_text().splitlines()
    assert words[:5] == [
        "--nnodes=2",
        "--node-rank=1",
        "--nproc-per-node=8",
        "--master-addr=10.0.0.1",
        "--master-port=29400",
    ]
    assert words[-3:] == ["-m", "trainer", f"{tmp_path}/A.run_1.yaml"]
    assert (tmp_path / "A.run_1.yaml").read_text() == ODD
    assert not (tmp_path / "x").exists()


def test_it_is_launched_by_hand() -> None:
    with pytest.raises(ClusterError, match=r"launch it with `sky launch task.yaml`, or with `sky jobs launch"):
        cluster_of("skypilot")


@pytest.fixture(scope="session")
def sky(request: pytest.FixtureRequest) -> str:
    """The Python of an environment with SkyPilot, made once in the cache of the tests."""
    assert request.config.cache is not None
    folder = request.config.cache.mkdir("skypilot") / "venv"
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True, timeout=120)
        install = [str(python), "-m", "pip", "install", "--quiet", "skypilot"]
        done = subprocess.run(install, capture_output=True, text=True, timeout=600)
        if done.returncode != 0:
            pytest.skip(f"skypilot cannot be installed: {done.stderr.strip().splitlines()[-1]}")
        (folder / "complete").touch()
    return str(python)


PARSE = """
import json, sys
import sky
task = sky.Task.from_yaml(sys.argv[1])
resources = [{"accelerators": each.accelerators, "spot": each.use_spot} for each in task.resources]
print(json.dumps({"name": task.name, "nodes": task.num_nodes, "run": task.run, "resources": resources}))
"""


@pytest.mark.night
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "made",
    [
        job(
            resources={"use_spot": True, "any_of": [{"infra": "aws"}, {"infra": "gcp"}], "disk_size": 512},
            options={"secrets": {"AWS_ACCESS_KEY_ID": None}, "envs": {"A": "1"}, "workdir": "."},
        ),
        job((3, 3), gpus=0, accelerators=None, resources={"memory": "32+"}),
    ],
    ids=["spot GPUs", "CPUs"],
)
def test_skypilots_own_parser_reads_the_task(made: ClusterJob, sky: str, tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text(SkyPilot().render(made))
    done = subprocess.run(
        [sky, "-c", PARSE, "task.yaml"],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    read, given = json.loads(done.stdout.splitlines()[-1]), task(made)
    assert (read["name"], read["nodes"], read["run"]) == (given["name"], given["num_nodes"], given["run"])
    if made.gpus_per_worker:
        assert [each["accelerators"] for each in read["resources"]] == [{"H100": 8}] * 2
        assert all(each["spot"] for each in read["resources"])


def test_servers_that_ray_places_are_refused() -> None:
    with pytest.raises(ClusterError, match=r"rollout\.vllm\.servers is 2: Ray places them, and SkyPilot's task runs"):
        task(replace(job(), servers=2, gpus_per_server=1))
