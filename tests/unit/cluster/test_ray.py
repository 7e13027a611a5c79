"""Submitting to a Ray cluster's job API, played by a small HTTP server."""

from __future__ import annotations

import io
import json
import os
import shlex
import subprocess
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cluster import ClusterError, ClusterJob
from cluster.ray import Ray, api_address
from cluster.ray_package import PARTS, RECIPE, ROOT, working_directory
from cluster.shell import END
from trainer.recipe.sections.cluster import RaySection

ODD = 'name: it\'s $(touch x) `id` "q" ünï\n'


def job_with(**settings: Any) -> ClusterJob:
    section = RaySection.model_validate(settings).model_dump(mode="json")
    return ClusterJob("a.run", "s3://runs/a.run", ODD, (1, 1), 0, 1, section, arguments=("r.yaml",))


JOB = job_with()


class Head(BaseHTTPRequestHandler):
    server: Server  # type: ignore[assignment]

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.calls.append((self.command, self.path, body, self.headers.get("Authorization")))
        status, answer = self.server.play(self.command, self.path, body)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    do_GET = do_PUT = do_POST = do_DELETE = _answer

    def log_message(self, *arguments: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    """Plays a job: one answer after another for its details and its logs."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Head)
        self.calls: list[tuple[str, str, bytes, str | None]] = []
        self.details: list[dict[str, Any]] = []
        self.logs: list[str] = []
        self.refuse: tuple[int, str] | None = None
        self.busy = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def play(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        if self.busy and method == "POST":
            self.busy -= 1
            return 500, "No available agent to submit job, please try again later."
        if self.refuse:
            return self.refuse
        if path == "/api/jobs/taken" and method == "GET" and not self.details:
            return 404, "unknown"
        if path.endswith("/logs"):
            return 200, {"logs": self.logs.pop(0) if len(self.logs) > 1 else self.logs[0]}
        if method == "POST" and path == "/api/jobs/":
            return 200, {"submission_id": json.loads(body)["submission_id"]}
        if method == "GET":
            return 200, self.details.pop(0) if len(self.details) > 1 else self.details[0]
        return 200, {}


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr("cluster.ray.POLL_S", 0.01)
    monkeypatch.setattr("cluster.ray.PATIENCE_S", 0.5)
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def ray(head: Server, **environment: str) -> Ray:
    return Ray({"RAY_API_SERVER_ADDRESS": head.url, **environment})


def test_the_frozen_recipe_travels_inside_and_no_shell_reads_it(head: Server) -> None:
    job_id = ray(head).submit(replace(JOB, command=("run", "--takeover")), "s3://runs/frozen.yaml")
    (_, path, package, _), (_, _, body, _) = head.calls
    sent = json.loads(body)
    assert sent["entrypoint"] == f"python -m launcher run --takeover {RECIPE}"
    assert "$" not in sent["entrypoint"]
    assert sent["runtime_env"] == {"working_dir": f"gcs://{path.rsplit('/', 1)[1]}"}
    assert job_id == f"{head.url}/{sent['submission_id']}"
    with zipfile.ZipFile(io.BytesIO(package)) as files:
        assert files.read(RECIPE).decode() == ODD
        assert {"launcher/__main__.py", "cluster/ray.py", "trainer/worker/attempt.py", "slurm/train.sbatch"} < set(
            files.namelist()
        )
        assert not [name for name in files.namelist() if "__pycache__" in name or name.startswith(("tests", "docs"))]


def test_the_same_files_are_the_same_package() -> None:
    assert working_directory("a") == working_directory("a")
    assert working_directory("a") != working_directory("b")


def test_the_log_is_passed_on_in_whole_lines_and_the_exit_code_too(head: Server) -> None:
    head.details = [{"status": s} for s in ("PENDING", "RUNNING", "RUNNING")]
    head.details.append({"status": "FAILED", "driver_exit_code": 3})
    head.logs = ["", "one\ntw", "one\ntwo\nth", "one\ntwo\nthree"]
    said = list[str]()
    assert ray(head).follow(f"{head.url}/j", said.append) == 3
    assert said == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("details", "code"),
    [
        ({"status": "SUCCEEDED", "driver_exit_code": 0}, 0),
        ({"status": "FAILED", "driver_exit_code": 2}, 2),
        ({"status": "FAILED", "driver_exit_code": None, "message": "no such file"}, 1),
        ({"status": "FAILED", "driver_exit_code": -9}, 1),
        ({"status": "STOPPED", "driver_exit_code": None}, 3),
    ],
)
def test_exit_codes(head: Server, details: dict[str, Any], code: int) -> None:
    head.details, head.logs, said = [details], ["x\n"], list[str]()
    assert ray(head).follow("j", said.append) == code
    assert ("Ray: no such file" in said) == ("message" in details)


def test_a_head_that_does_not_answer(head: Server) -> None:
    gone = Ray({"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:1"})
    with pytest.raises(ClusterError, match=r"no Ray head answers at http://127.0.0.1:1 .*8265"):
        gone.submit(JOB, "r")
    with pytest.raises(ClusterError, match="no Ray head answers"):
        gone.follow("http://127.0.0.1:1/j", print)
    with pytest.raises(ClusterError, match=r"give --address .*cluster.ray.address"):
        Ray({}).submit(JOB, "r")


def test_a_head_that_refuses(head: Server) -> None:
    head.refuse = (500, "no room\nat all")
    with pytest.raises(ClusterError, match=r"refused PUT .*HTTP 500 .*no room"):
        ray(head).submit(JOB, "r")
    head.refuse = (401, "no")
    with pytest.raises(ClusterError, match=r"wants another token .*RAY_AUTH_TOKEN"):
        ray(head).submit(JOB, "r")
    head.refuse = (404, "unknown")
    assert ray(head).state("j") is None
    said = list[str]()
    assert ray(head).follow("j", said.append) == 3
    assert "has forgotten the job" in said[0]
    ray(head).cancel("j", "s3://runs/r")
    assert [method for method, *_ in head.calls].count("POST") == 0


def test_a_head_that_has_just_started_is_given_a_moment(head: Server) -> None:
    head.busy = 2
    assert ray(head).submit(JOB, "r")
    assert [method for method, *_ in head.calls] == ["PUT", "POST", "POST", "POST"]
    assert len({body for method, _, body, _ in head.calls if method == "POST"}) == 1, "the same job each time"
    head.busy = 10**6
    with pytest.raises(ClusterError, match="No available agent"):
        ray(head).submit(JOB, "r")


def test_the_token_goes_along_when_the_cluster_has_one(head: Server) -> None:
    head.details = [{"status": "RUNNING"}]
    assert ray(head, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="secret").state("j") == "RUNNING"
    assert head.calls[-1][3] == "Bearer secret"
    ray(head, RAY_AUTH_MODE="disabled", RAY_AUTH_TOKEN="secret").state("j")
    assert head.calls[-1][3] is None


def test_a_running_job_is_stopped(head: Server) -> None:
    head.details = [{"status": "RUNNING"}]
    ray(head).cancel(f"{head.url}/j", "s3://runs/r")
    assert head.calls[-1][:2] == ("POST", "/api/jobs/j/stop")


def test_where_the_head_is() -> None:
    environment = {"RAY_ADDRESS": "10.0.0.1:6379"}
    assert api_address({}, environment) is None
    assert api_address({}, {"RAY_ADDRESS": "http://h:8265"}) == "http://h:8265"
    assert api_address({}, {**environment, "RAY_API_SERVER_ADDRESS": "https://h"}) == "https://h"
    assert api_address({"address": "http://recipe:1"}, {"RAY_API_SERVER_ADDRESS": "https://h"}) == "http://recipe:1"


def test_the_address_is_a_part_of_the_jobs_id(head: Server) -> None:
    assert Ray({}).address(JOB) is None
    assert ray(head).address(JOB) == head.url
    assert ray(head).submit(JOB, "r").startswith(head.url)


def test_the_printed_commands_submit_the_same_from_any_folder(tmp_path: Path) -> None:
    fake = tmp_path / "ray"
    fake.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/words\nmv "$6" {tmp_path}/sent\n')
    fake.chmod(0o755)
    odd = replace(JOB, recipe=f"{ODD}{END}\n", command=("run", "--takeover"))
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TMPDIR": str(tmp_path)}
    subprocess.run(["sh", "-eu"], input=Ray({}).render(odd).encode(), env=environment, cwd=tmp_path, check=True)
    words = (tmp_path / "words").read_text().splitlines()
    assert words[:5] == ["job", "submit", "--address", "http://HEAD:8265", "--working-dir"]
    assert words[6:8] == ["--metadata-json", '{"run": "s3://runs/a.run"}']
    assert words[8:] == ["--", "python", "-m", "launcher", "run", "--takeover", RECIPE]
    assert (tmp_path / "sent" / RECIPE).read_text() == odd.recipe
    with zipfile.ZipFile(io.BytesIO(working_directory(odd.recipe))) as package:
        assert all((tmp_path / "sent" / name).read_bytes() == package.read(name) for name in package.namelist())


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with code of the user's own, and a module beside it."""
    (tmp_path / "site" / "mine").mkdir(parents=True)
    (tmp_path / "site" / "mine" / "rewards.py").write_text("def length(): ...\n")
    (tmp_path / "site" / ".git").mkdir()
    (tmp_path / "site" / ".git" / "config").write_text("")
    (tmp_path / "helpers").mkdir()
    (tmp_path / "helpers" / "__init__.py").write_text("")
    return tmp_path


def test_what_the_recipe_says_of_rays_job_is_sent(head: Server, site: Path) -> None:
    environment = {
        "pip": ["sentencepiece"],
        "env_vars": {"A": "1"},
        "working_dir": str(site / "site"),
        "py_modules": [str(site / "helpers"), "s3://bucket/other.zip"],
    }
    made = job_with(
        runtime_env=environment,
        metadata={"team": "nlp", "run": "another"},
        entrypoint_num_cpus=0.5,
        entrypoint_memory=2_000_000_000,
        entrypoint_resources={"head_node": 0.01},
    )
    ray(head).submit(made, "r")
    *uploads, (_, _, body, _) = head.calls
    sent = json.loads(body)
    packages = {f"gcs://{path.rsplit('/', 1)[1]}": package for _, path, package, _ in uploads}
    files = {uri: set(zipfile.ZipFile(io.BytesIO(package)).namelist()) for uri, package in packages.items()}
    assert {"mine/rewards.py", "launcher/__main__.py", RECIPE} < files[sent["runtime_env"]["working_dir"]]
    assert not [name for name in files[sent["runtime_env"]["working_dir"]] if name.startswith(".git")]
    mine, other = sent["runtime_env"]["py_modules"]
    assert (files[mine], other) == ({"helpers/__init__.py"}, "s3://bucket/other.zip")
    assert (sent["runtime_env"]["pip"], sent["runtime_env"]["env_vars"]) == (["sentencepiece"], {"A": "1"})
    assert sent["metadata"] == {"team": "nlp", "run": "s3://runs/a.run"}
    assert (sent["entrypoint_num_cpus"], sent["entrypoint_memory"]) == (0.5, 2_000_000_000)
    assert sent["entrypoint_resources"] == {"head_node": 0.01}
    assert "entrypoint_num_gpus" not in sent


def test_a_working_directory_of_the_users_keeps_musters_files(site: Path) -> None:
    assert working_directory("a", str(ROOT)).count(b"launcher/__main__.py") == 2, "in the zip, and in its directory"
    (site / "site" / "trainer").mkdir()
    with pytest.raises(ClusterError, match=r"working_dir .* has trainer, where the job has muster's own files"):
        working_directory("a", str(site / "site"))
    with pytest.raises(ClusterError, match="is no folder of this machine"):
        working_directory("a", str(site / "absent"))


def test_a_package_that_ray_refuses_is_not_uploaded(head: Server, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ClusterError, match="is no folder and no wheel"):
        ray(head).submit(job_with(runtime_env={"py_modules": [str(site / "absent.whl")]}), "r")
    head.calls.clear()
    monkeypatch.setattr("cluster.ray_package.LARGEST_PACKAGE", 1000)
    with pytest.raises(ClusterError, match="Ray takes at most"):
        ray(head).submit(job_with(runtime_env={"working_dir": str(site / "site")}), "r")
    assert not head.calls


@pytest.mark.parametrize(
    ("details", "told"),
    [
        ([], None),
        ([{"status": "FAILED", "metadata": {"run": "s3://runs/a.run"}}], None),
        ([{"status": "RUNNING", "metadata": {"run": "s3://runs/a.run"}}], r"taken is RUNNING; `muster cancel s3"),
        ([{"status": "FAILED", "metadata": {"run": "s3://runs/b"}}], "a job taken of something else"),
    ],
)
def test_a_named_job_replaces_only_its_own_run(head: Server, details: list[dict[str, Any]], told: str | None) -> None:
    head.details = details
    made = job_with(submission_id="taken")
    if told:
        with pytest.raises(ClusterError, match=told):
            ray(head).submit(made, "r")
        assert [method for method, *_ in head.calls] == ["GET"]
        return
    assert ray(head).submit(made, "r") == f"{head.url}/taken"
    methods = [method for method, *_ in head.calls]
    assert methods == (["GET", "DELETE", "PUT", "POST"] if details else ["GET", "PUT", "POST"])
    assert "taken" not in ray(head).submit(replace(made, command=("doctor",)), "r"), "another job than the run"


def test_the_printed_commands_have_the_settings_too(site: Path) -> None:
    environment = {"pip": ["x y"], "working_dir": str(site / "site"), "py_modules": [str(site / "helpers")]}
    made = job_with(runtime_env=environment, submission_id="mine", entrypoint_num_gpus=1, entrypoint_memory=2 * 10**9)
    commands = Ray({}).render(made)
    assert f"cp -R {site}/site/mine {ROOT}/{PARTS[0]}" in commands
    words = shlex.split(commands.splitlines()[-1])
    options = dict(zip(words[5:-6:2], words[6:-6:2], strict=True))
    assert words[-6:] == ["--", "python", "-m", "launcher", "run", RECIPE]
    assert json.loads(options["--runtime-env-json"]) == {"pip": ["x y"], "py_modules": [str(site / "helpers")]}
    assert (options["--submission-id"], options["--working-dir"]) == ("mine", "$job")
    assert (options["--entrypoint-num-gpus"], options["--entrypoint-memory"]) == ("1.0", "2000000000")
