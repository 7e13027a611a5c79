"""Ray clusters: a job is submitted through the job API of the cluster's head, and followed there.

The job's working directory has the frozen recipe in it (`cluster.ray_package`), so that the entrypoint, which Ray gives
to a shell, is made of constant words.

API: https://docs.ray.io/en/latest/cluster/running-applications/job-submission/rest.html
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from cluster.job import ClusterError, ClusterJob, Say
from cluster.ray_package import RECIPE, runtime_env, shell_commands

CALL_S = 30.0
POLL_S = 1.0
SLOWEST_POLL_S = 10.0
PATIENCE_S = 120.0
"""How long a head may not answer before following is given up; the job itself goes on."""
ENDED = {"SUCCEEDED": 0, "FAILED": 1, "STOPPED": 3}
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


class Ray:
    """A cluster's head at ``cluster.ray.address``, else at ``RAY_API_SERVER_ADDRESS``. A job's id is its submission id,
    behind the address if that was given: ``http://head:8265/muster-…``."""

    def __init__(
        self, environment: Mapping[str, str] = os.environ, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._environment, self._clock = environment, clock

    def render(self, job: ClusterJob) -> str:
        """Returns the commands that submit the same by hand, in any folder of this machine: for a shell."""
        commands, environment = shell_commands(job.settings, job.recipe)
        submit = shlex.join(["ray", "job", "submit", "--address", self.address(job) or "http://HEAD:8265"])
        options = {
            "submission-id": named_id(job),
            "runtime-env-json": json.dumps(environment) if environment else None,
            "metadata-json": json.dumps(metadata(job)),
            **{k.replace("_", "-"): json.dumps(v) for k, v in entrypoint_resources(job.settings).items()},
        }
        words = [word for name, value in options.items() if value is not None for word in (f"--{name}", value)]
        return f'{commands}{submit} --working-dir "$job" {shlex.join(words)} -- {self._entrypoint(job)}\n'

    def address(self, job: ClusterJob) -> str | None:
        return api_address(job.settings, self._environment)

    def submit(self, job: ClusterJob, recipe_path: str) -> str:
        api = Api(self._address(job.settings), self._environment)
        name = named_id(job)
        if name is not None:
            self._make_room(api, name, job.run_uri)
        body = {
            "entrypoint": self._entrypoint(job),
            "submission_id": name or f"muster-{re.sub(r'[^A-Za-z0-9_-]+', '-', job.name)}-{secrets.token_hex(4)}",
            "runtime_env": runtime_env(job.settings, job.recipe, api.upload),
            "metadata": metadata(job),
            **entrypoint_resources(job.settings),
        }
        request = json.dumps(body).encode()
        answer = self._patiently(lambda: api.call("POST", "/api/jobs/", request), of=Busy)
        return f"{api.address}/{json.loads(answer)['submission_id']}"

    def follow(self, job_id: str, say: Say) -> int:
        api, name = self._split(job_id)
        lines, pause_s = NewLogLines(), POLL_S
        while True:
            try:
                details = self._patiently(lambda: json.loads(api.call("GET", f"/api/jobs/{name}")))
                logs = self._patiently(lambda: json.loads(api.call("GET", f"/api/jobs/{name}/logs")))
            except Unknown:
                say(f"the Ray cluster at {api.address} has forgotten the job: its head was started again")
                return ENDED["STOPPED"]
            ended, quiet = details["status"] in ENDED, True
            for line in lines.new(logs.get("logs") or "", whole=ended):
                quiet = False
                say(line)
            if ended:
                return self._code(details, say)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, SLOWEST_POLL_S) if quiet else POLL_S  # each time the log comes as a whole

    def state(self, job_id: str) -> str | None:
        api, name = self._split(job_id)
        try:
            return str(json.loads(api.call("GET", f"/api/jobs/{name}"))["status"])
        except Unknown:
            return None

    def cancel(self, job_id: str, run_uri: str) -> None:
        api, name = self._split(job_id)
        if self.state(job_id) not in (None, *ENDED):
            api.call("POST", f"/api/jobs/{name}/stop")

    def _make_room(self, api: Api, name: str, run_uri: str) -> None:
        """Removes the job of this name if it is the run's own and has ended: Ray takes each name once."""
        try:
            found = json.loads(api.call("GET", f"/api/jobs/{name}"))
        except Unknown:
            return
        if (found.get("metadata") or {}).get("run") != run_uri:
            raise ClusterError(f"the Ray cluster has a job {name} of something else: change cluster.ray.submission_id")
        if found["status"] not in ENDED:
            raise ClusterError(f"job {name} is {found['status']}; `muster cancel {run_uri}` ends it")
        api.call("DELETE", f"/api/jobs/{name}")

    def _entrypoint(self, job: ClusterJob) -> str:
        return shlex.join(["python", "-m", "launcher", *job.command, RECIPE])

    def _code(self, details: Mapping[str, Any], say: Say) -> int:
        """Returns the driver's own exit code if Ray knows it, else one for what Ray reports of a job that never
        started."""
        code = details.get("driver_exit_code")
        if code is None and details["status"] == "FAILED":
            say(f"Ray: {details.get('message') or 'the job failed'}")
        return ENDED[details["status"]] if code is None or code < 0 else int(code)

    def _patiently(self, ask: Callable[[], Any], of: type[ClusterError] = ClusterError) -> Any:
        """Calls again while the head is unreachable for a moment (the job continues), or has just started and takes no
        jobs yet."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                return ask()
            except of as error:
                if isinstance(error, Unknown) or time.monotonic() >= deadline:
                    raise
                time.sleep(POLL_S)

    def _address(self, settings: Mapping[str, Any]) -> str:
        address = api_address(settings, self._environment)
        if address is None:
            raise ClusterError(
                "no Ray cluster is named to submit to: give --address http://HEAD:8265, set cluster.ray.address in the "
                "recipe, or RAY_API_SERVER_ADDRESS"
            )
        return address

    def _split(self, job_id: str) -> tuple[Api, str]:
        address, _, name = job_id.rpartition("/")
        return Api(address or self._address({}), self._environment), name


class Unknown(ClusterError):
    """The head does not know this job."""


class Busy(ClusterError):
    """The head answers, and cannot do it now (HTTP 5xx)."""


class Api:
    """The HTTP API of a cluster's head. Raises ClusterError, with what to do, when it does not answer or refuses."""

    def __init__(self, address: str, environment: Mapping[str, str]) -> None:
        self.address = address.rstrip("/")
        self._headers = {"Content-Type": "application/json"}
        if environment.get("RAY_AUTH_MODE") == "token" and environment.get("RAY_AUTH_TOKEN"):
            self._headers["Authorization"] = f"Bearer {environment['RAY_AUTH_TOKEN']}"

    def upload(self, name: str, package: bytes) -> str:
        """Stores a package in the cluster and returns its URI."""
        self.call("PUT", f"/api/packages/gcs/{name}", package)
        return f"gcs://{name}"

    def call(self, method: str, path: str, body: bytes | None = None) -> bytes:
        request = urllib.request.Request(self.address + path, body, self._headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=CALL_S) as answer:
                return bytes(answer.read())
        except urllib.error.HTTPError as error:
            raise self._refused(method, path, error) from error
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise ClusterError(
                f"no Ray head answers at {self.address} ({reason}): give the address of its dashboard, which "
                "`ray start --head --dashboard-host 0.0.0.0` serves at port 8265",
                usage=method != "GET",
            ) from error

    def _refused(self, method: str, path: str, error: urllib.error.HTTPError) -> ClusterError:
        told = " ".join(error.read().decode(errors="replace").split())[-500:]
        if error.code == 404 and method == "GET":
            return Unknown(f"the Ray cluster at {self.address} does not know {path.rsplit('/', 1)[-1]}")
        if error.code in (401, 403):
            return ClusterError(
                f"the Ray cluster at {self.address} wants another token (HTTP {error.code}): set RAY_AUTH_MODE=token "
                "and RAY_AUTH_TOKEN as on its nodes"
            )
        kind = Busy if error.code >= 500 else ClusterError
        return kind(f"the Ray cluster at {self.address} refused {method} {path}: HTTP {error.code} {told}")


class NewLogLines:
    """The new complete lines of a log that is read from its beginning each time."""

    def __init__(self) -> None:
        self._told = 0

    def new(self, log: str, *, whole: bool) -> Iterator[str]:
        end = len(log) if whole else log.rfind("\n") + 1
        yield from log[self._told : end].splitlines()
        self._told = max(self._told, end)


def api_address(settings: Mapping[str, Any], environment: Mapping[str, str]) -> str | None:
    """Returns the head's HTTP address: that of the settings, or else of the environment; None if neither is one."""
    named = [settings.get("address"), *(environment.get(name) for name in ADDRESS_VARIABLES)]
    return next((a for a in named if a and a.startswith(("http://", "https://"))), None)


def named_id(job: ClusterJob) -> str | None:
    """Returns the submission id that the recipe names; None for a job that is not the run itself."""
    return job.settings["submission_id"] if job.command[0] == "run" else None


def metadata(job: ClusterJob) -> dict[str, str]:
    return {**job.settings["metadata"], "run": job.run_uri}


def entrypoint_resources(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the driver's process takes of its node, under the names of Ray's job API."""
    names = ("entrypoint_num_cpus", "entrypoint_num_gpus", "entrypoint_memory", "entrypoint_resources")
    return {name: settings[name] for name in names if settings[name]}
