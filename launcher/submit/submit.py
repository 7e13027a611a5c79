"""Submits a run as a job on other machines, and follows it.

The job gets the recipe as it was resolved here; the user's file is not read after that.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import KINDS, ClusterError, ClusterJob, cluster_of, renderer_of
from cluster.job import Say
from launcher.replica_warnings import job_shape, replica_warnings
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
    """Returns the recipe as a job for this kind of cluster, in plain values; ``settings`` replace the recipe's own."""
    from trainer.recipe import dump

    shape = job_shape(recipe, kind, **settings)
    return replace(shape, recipe=dump(recipe), command=tuple(command), arguments=tuple(arguments))


def submit(job: ClusterJob, kind: str, recipe: Recipe, say: Say, together: Sequence[Recipe] = ()) -> Submission:
    """Freezes the recipe in the run's storage and submits its job. ``together``: the runs of a recipe with `adapters`,
    each of which records the job. Raises UsageError for what the user can fix."""
    from trainer.run.frozen import check_same_recipe
    from trainer.run.lease import withdraw_end
    from trainer.run.sweep import folder_of

    with cluster_errors():
        cluster = cluster_of(kind)
    check_places(recipe, kind)
    check_address(job, kind)
    for text in (*replica_warnings(recipe, kind), *plugin_warnings(recipe, kind)):
        say(f"warning: {text}")
    storage, command = open_storage(recipe.storage, deadline_s=FIRST_LOOK_S), job.command[0]
    recipes = together or [recipe]
    runs = [folder_of(storage, one.name) if command == "sweep" else storage.child(one.name) for one in recipes]
    if command == "run":
        for run, one in zip(runs, recipes, strict=True):
            check_same_recipe(run, one)
    if command in ("run", "sweep"):
        for run in runs:
            withdraw_end(run)
    # A recipe in the storage is not trusted, so the option that trusts it must be in the command.
    if KINDS[kind].stores_recipe and any(code_of(one) or submitting_code_of(one) for one in (recipe, *recipes)):
        job = replace(job, command=(*job.command, FLAG))
    unique = f"{time.strftime('%Y%m%dT%H%M%S')}-{secrets.token_hex(4)}"
    key = f"{layout.SUBMITTED}/{unique}-{digest_of(job.recipe.encode())}.yaml"
    stored_at = runs[0].uri(key)
    runs[0].write(key, job.recipe.encode())
    with cluster_errors():
        made = Submission(kind, cluster.submit(job, stored_at), time.time(), stored_at, shared=len(runs) > 1)
    if command in ("run", "sweep"):
        for run in runs:
            run.write_json(layout.SUBMISSION, vars(made))
    say(f"submitted as {made.job}")
    return made


def follow(made: Submission, uris: Sequence[str], say: Say) -> int:
    """Calls ``say`` with each line of the job's output until it ends, and returns its exit code. An interruption here
    does not stop the job. ``uris``: of its runs, or of its sweep."""
    try:
        with cluster_errors():
            return cluster_of(made.kind).follow(made.id, say)
    except (KeyboardInterrupt, Terminated):
        commands = f"`muster status {uris[0]}` shows it, `muster cancel {uris[0]}` ends it"
        if made.shared:
            commands = f"`muster status` shows one of its runs, `muster cancel` ends one: {', '.join(uris)}"
        raise Interrupted(f"{made.job} continues; {commands}") from None


def run_elsewhere(
    recipe: Recipe,
    kind: str,
    flags: Sequence[str],
    address: str | None,
    *,
    detach: bool,
    together: Sequence[Recipe] = (),
    text: str | None = None,
) -> None:
    """Submits a run and follows it. ``together``: the runs of a recipe with `adapters`, which is submitted as the user
    gave it (``text``). Raises the error that belongs to the job's exit code."""
    job = _job_with(recipe, kind, "run", flags, address)
    made = submit(job if text is None else replace(job, recipe=text), kind, recipe, _report, together)
    _follow_to_end(made, [one.run_uri for one in together or [recipe]], detach)


def sweep_elsewhere(
    recipe: Recipe, text: str, kind: str, flags: Sequence[str], address: str | None, *, detach: bool
) -> None:
    """Submits a sweep and follows it, as `run_elsewhere` does. ``text``: its recipe as the user gave it. The job has
    room for `sweep.parallel` trials."""
    job = _job_with(recipe, kind, "sweep", flags, address)
    parallel = (recipe.sweep and recipe.sweep.parallel) or 1
    workers = job.workers[0], job.workers[1] * parallel
    job = replace(job, name=f"{job.name}-sweep", recipe=text, workers=workers)
    _follow_to_end(submit(job, kind, recipe, _report), [recipe.run_uri], detach)


def _job_with(recipe: Recipe, kind: str, command: str, flags: Sequence[str], address: str | None) -> ClusterJob:
    if flags and KINDS[kind].restarts:  # a job that is started again would take over again
        raise UsageError(
            f"{' '.join(flags)} is not possible with --on {kind}, which starts a failed job again with the same "
            "options; end the other driver with `muster cancel` first"
        )
    return job_of(recipe, kind, (command, *flags), **({"address": address} if address else {}))


def _follow_to_end(made: Submission, uris: Sequence[str], detach: bool) -> None:
    if detach:
        return
    if code := follow(made, uris, _report):
        errors: dict[int, type[MusterError]] = {2: UsageError, 3: Interrupted}
        raise errors.get(code, WorkerFailed)(f"{made.job} ended with exit code {code}; its output is above")


def doctor_elsewhere(recipe: Recipe, kind: str, *, as_json: bool) -> int:
    """Runs ``muster doctor`` once, in a job like the run's. Prints its tables, or its JSON object alone, to stdout, and
    returns its exit code."""

    def print_line(line: str) -> None:
        if as_json and not line.startswith("{"):
            _report(line)
        else:
            print(line, flush=True)

    restarts = KINDS[kind].restarts
    once: dict[str, Any] = {restarts: 0} if restarts else {}
    job = job_of(recipe, kind, ("doctor", "--json") if as_json else ("doctor",), **once)
    made = submit(replace(job, name=f"{job.name}-doctor"), kind, recipe, _report)
    return follow(made, [recipe.run_uri], print_line)


def _report(text: str) -> None:
    stderr().print(text, soft_wrap=True)


def check_places(recipe: Recipe, kind: str) -> None:
    """Raises UsageError for a relative path if the cluster does not share this machine's working folder."""
    if KINDS[kind].shares_folder:
        return
    sources = [*recipe.data.train, *recipe.data.eval]
    places = {"storage": recipe.storage, **{f"data: {source.path}": source.path for source in sources}}
    if Path(recipe.model.path).is_dir():  # otherwise it is a name on the Hub
        places["model.path"] = recipe.model.path
    relative = [name for name, place in places.items() if "://" not in place and not place.startswith("/")]
    if relative:
        raise UsageError(
            f"{', '.join(relative)}: a relative path is another place on the machines of --on {kind}; give a URL, or "
            "the absolute path of a folder that all of them share"
        )


def plugin_warnings(recipe: Recipe, kind: str) -> Iterator[str]:
    """Yields a sentence for each plug-in that is in this machine's working folder, if the cluster does not share it."""
    from trainer.recipe.plugins import providers

    for plugin in providers(recipe) if not KINDS[kind].shares_folder else ():
        if not plugin["package"]:
            yield (
                f"{plugin['key']} {plugin['name']} is in this folder and in no installed package: the machines of "
                f"--on {kind} need a package of it, or the file on their PYTHONPATH"
            )


def check_address(job: ClusterJob, kind: str) -> None:
    """Raises UsageError if the job's id would contain credentials, in the address of the cluster."""
    address = renderer_of(kind).address(job)
    if address and (what := credential_in(address)):
        raise UsageError(
            f"the address of the cluster holds credentials ({what}), and it is stored and printed as a part of the "
            "job's id; remove them (a Ray cluster takes a token by RAY_AUTH_MODE=token and RAY_AUTH_TOKEN)"
        )


@contextmanager
def cluster_errors() -> Iterator[None]:
    """Raises a ClusterError as UsageError or WorkerFailed."""
    try:
        yield
    except ClusterError as error:
        raise (UsageError if error.usage else WorkerFailed)(str(error)) from error
