"""Runs that start on another machine: submitted and followed.

The job gets the recipe as it was resolved here; the user's file is not read after that.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import KINDS, ClusterError, ClusterJob, cluster_of
from cluster.job import Say
from launcher.terminal.console import stderr
from trainer.errors import Interrupted, MusterError, UsageError, WorkerFailed
from trainer.interruption import Terminated
from trainer.recipe.trust import FLAG, code_of, submitting_code_of
from trainer.redact import credential_in
from trainer.run import layout
from trainer.run.recipe_url import digest_of
from trainer.run.submission import Submission
from trainer.storage import open_storage

if TYPE_CHECKING:
    from trainer.recipe import Recipe

FIRST_LOOK_S = 30.0


def job_of(
    recipe: Recipe, kind: str, command: Sequence[str] = ("run",), arguments: Sequence[str] = (), **settings: Any
) -> ClusterJob:
    """The recipe's job for this kind of cluster, in plain values; ``settings`` replace those of the recipe."""
    from trainer.recipe import dump

    resources = recipe.resources
    return ClusterJob(
        name=recipe.name,
        run_uri=recipe.run_uri,
        recipe=dump(recipe),
        workers=(resources.min_workers, resources.max_workers),
        gpus_per_worker=resources.gpus_per_worker,
        cpus_per_worker=resources.cpus_per_worker,
        settings={**getattr(recipe.cluster, kind).model_dump(mode="json"), **settings},
        command=tuple(command),
        arguments=tuple(arguments),
    )


def submit(job: ClusterJob, kind: str, recipe: Recipe, say: Say) -> Submission:
    """Freezes the recipe in the run's storage and submits its job. Raises UsageError for what the user can fix."""
    from trainer.run.frozen import check_same_recipe
    from trainer.run.lease import withdraw_end

    check_places(recipe, kind)
    check_address(job, kind)
    storage = open_storage(recipe.storage, deadline_s=FIRST_LOOK_S)
    run = storage.child(recipe.name)
    trains = job.command[0] == "run"
    if trains:
        check_same_recipe(run, recipe)
        withdraw_end(run)
    # A recipe in the storage is not trusted, so the option that trusts it must be in the command.
    if KINDS[kind].stores_recipe and (code_of(recipe) or submitting_code_of(recipe)):
        job = replace(job, command=(*job.command, FLAG))
    unique = f"{time.strftime('%Y%m%dT%H%M%S')}-{secrets.token_hex(4)}"
    key = f"{layout.SUBMITTED}/{unique}-{digest_of(job.recipe.encode())}.yaml"
    run.write(key, job.recipe.encode())
    with cluster_errors():
        made = Submission(kind, cluster_of(kind).submit(job, run.uri(key)), time.time(), run.uri(key))
    if trains:
        run.write_json(layout.SUBMISSION, vars(made))
    say(f"submitted as {made.job}")
    return made


def follow(made: Submission, run_uri: str, say: Say) -> int:
    """Passes on the job's output until it ends; returns its exit code. An interruption here does not stop the job."""
    try:
        with cluster_errors():
            return cluster_of(made.kind).follow(made.id, say)
    except (KeyboardInterrupt, Terminated):
        raise Interrupted(
            f"{made.job} goes on; `muster status {run_uri}` looks at it, `muster cancel {run_uri}` ends it"
        ) from None


def run_elsewhere(recipe: Recipe, kind: str, flags: Sequence[str], address: str | None, *, detach: bool) -> None:
    """Submits a run and follows it; raises what its exit code means."""

    def say(text: str) -> None:
        stderr().print(text, soft_wrap=True)

    if flags and kind == "kubernetes":  # the manifest starts the job again and again, which may take over only once
        raise UsageError(f"{' '.join(flags)} cannot go along to Kubernetes; end the other with `muster cancel` first")
    made = submit(job_of(recipe, kind, ("run", *flags), **_at(address)), kind, recipe, say)
    if detach:
        return
    if code := follow(made, recipe.run_uri, say):
        errors: dict[int, type[MusterError]] = {2: UsageError, 3: Interrupted}
        raise errors.get(code, WorkerFailed)(f"{made.job} ended with exit code {code}; see what it said above")


def doctor_elsewhere(recipe: Recipe, kind: str, *, as_json: bool) -> int:
    """``muster doctor`` inside a job like the run's, once; its tables, or its JSON object alone, go to stdout."""

    def pass_on(line: str) -> None:
        if as_json and not line.startswith("{"):
            tell(line)
        else:
            print(line, flush=True)

    def tell(text: str) -> None:
        stderr().print(text, soft_wrap=True)

    once: dict[str, Any] = {"retries": 0} if kind == "kubernetes" else {}
    job = job_of(recipe, kind, ("doctor", "--json") if as_json else ("doctor",), **once)
    made = submit(replace(job, name=f"{job.name}-doctor"), kind, recipe, tell)
    return follow(made, recipe.run_uri, pass_on)


def _at(address: str | None) -> dict[str, Any]:
    return {"address": address} if address else {}


def check_places(recipe: Recipe, kind: str) -> None:
    """Raises UsageError for a relative path if the cluster does not share this machine's working folder."""
    if KINDS[kind].shares_folder:
        return
    sources = [*recipe.data.train, *recipe.data.eval]
    places = {"storage": recipe.storage, **{f"data: {source.path}": source.path for source in sources}}
    if Path(recipe.model.path).is_dir():  # else it is the Hub's
        places["model.path"] = recipe.model.path
    relative = [name for name, place in places.items() if "://" not in place and not place.startswith("/")]
    if relative:
        raise UsageError(
            f"{', '.join(relative)}: a relative path lies elsewhere on the machines of --on {kind}; give a URL, or the "
            "absolute path of a folder that all of them share"
        )


def check_address(job: ClusterJob, kind: str) -> None:
    """Raises UsageError for a Ray cluster's address with credentials: it becomes a part of the job's id, which is
    stored and printed."""
    from cluster.ray import api_address

    address = api_address(job.settings, os.environ) if kind == "ray" else None
    if address and (what := credential_in(address)):
        raise UsageError(
            f"the address of the Ray cluster holds credentials ({what}), and it is stored and printed as a part of the "
            "job's name; take them out, and give a token by RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
        )


@contextmanager
def cluster_errors() -> Iterator[None]:
    """The cluster's errors as this program's own."""
    try:
        yield
    except ClusterError as error:
        raise (UsageError if error.usage else WorkerFailed)(str(error)) from error
