"""Runs that are started elsewhere: what is frozen and submitted, what its end means, and how it is cancelled."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import cluster
from cluster import ClusterError
from launcher.cli.app import app
from launcher.monitor.status import read_status
from launcher.submit import cancel, submit
from launcher.submit.cancel import jobs_of
from launcher.submit.place import choose_place
from tests.support.played import Played
from tests.support.plugins import no_plugins
from trainer.checkpoint import claim_attempt
from trainer.errors import InputError, Interrupted, RecipeChanged, UsageError, WorkerFailed
from trainer.recipe import Recipe, dump, loads, parse
from trainer.recipe.sweeps.trials import as_text
from trainer.recipe.sweeps.variants import variants
from trainer.run import layout
from trainer.run.events import EndEvent
from trainer.run.jsonl import Events
from trainer.run.lease import Lease, check_not_cancelled, end_is_requested
from trainer.run.recipe_url import given_at
from trainer.run.submission import Submission
from trainer.run.sweep import TrialRecord, folder_of, write_trial
from trainer.storage import Storage, open_storage

__all__ = ["no_plugins"]
ODD = 'it\'s $(touch owned) & "so" ünï'


@pytest.fixture(autouse=True)
def played(monkeypatch: pytest.MonkeyPatch) -> type[Played]:
    Played.reset()
    for kind in ("ray", "slurm", "kubernetes"):
        monkeypatch.setitem(cluster.KINDS, kind, cluster.KINDS[kind]._replace(code="tests.support.played:Played"))
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(name, raising=False)
    return Played


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return made(str(tmp_path / "runs"), str(tmp_path / "data.jsonl"))


def made(storage: str, data: str, **changes: Any) -> Recipe:
    return parse(
        {
            "name": "r",
            "model": {"path": "m"},
            "data": {"train": [{"path": data, "format": "completion"}], "sequence_length": 8},
            "training": {"steps": 2, "global_batch": 1, "micro_batch": 1},
            "optimizer": {"name": "adamw", "lr": 1e-3},
            "resources": {"workers": [2, 4], "gpus_per_worker": 1, "cpus_per_worker": 3},
            "storage": storage,
            **changes,
        }
    )


def run_of(recipe: Recipe) -> Storage:
    return open_storage(recipe.storage).child(recipe.name)


def test_what_is_submitted_is_the_frozen_recipe(recipe: Recipe, played: type[Played]) -> None:
    submit.run_elsewhere(recipe, "slurm", ["--takeover"], None, detach=True)
    ((job, path),) = played.submitted
    assert loads(Path(path).read_text()) == recipe == loads(job.recipe)
    assert job.command == ("run", "--takeover")
    assert (job.workers, job.gpus_per_worker, job.cpus_per_worker) == ((2, 4), 1, 3)
    assert job.settings["gpus_per_node"] == 8
    status = read_status(run_of(recipe))
    assert (status.job, status.state) == ("slurm:42", "interrupted")


def test_a_sweep_is_one_job_with_room_for_its_trials(recipe: Recipe, played: type[Played]) -> None:
    sweep = {"parameters": {"optimizer.name": ["adamw", "muon"]}, "parallel": 3}
    data = {**recipe.model_dump(mode="json", exclude_defaults=True), "sweep": sweep}
    data["data"]["eval_fraction"] = 0.1
    text, loaded = as_text(data), parse(data)
    submit.sweep_elsewhere(loaded, text, "slurm", ["--takeover"], None, detach=True)
    ((job, path),) = played.submitted
    assert Path(path).read_text() == job.recipe == text  # without defaults that depend on the optimizer
    assert (job.command, job.name, job.workers) == (("sweep", "--takeover"), "r-sweep", (2, 12))
    folder = folder_of(open_storage(loaded.storage), "r")
    assert Path(path).is_relative_to(folder.url)
    assert run_of(loaded).list() == []
    cancel.cancel_run(loaded.run_uri, print)  # before it has started
    with pytest.raises(Interrupted, match="was cancelled"):
        check_not_cancelled(folder, "slurm:42")


@pytest.mark.usefixtures("no_plugins")
def test_a_plug_in_of_the_working_folder_is_warned_about_where_nobody_shares_that(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plugged_here.py").write_text(
        "from trainer.recipe.tasks import TaskRow\nROW = TaskRow('a:B', ('prompted',))"
    )
    monkeypatch.chdir(tmp_path)
    own = made(recipe.storage, recipe.data.train[0].path, task="plugged_here:ROW")
    (said,) = submit.plugin_warnings(own, "ray")
    assert said.startswith(
        "task plugged_here:ROW is in this folder and in no installed package: the machines of --on ray"
    )
    assert not [*submit.plugin_warnings(own, "slurm"), *submit.plugin_warnings(recipe, "ray")]


def test_each_submission_freezes_its_own(recipe: Recipe, played: type[Played]) -> None:
    for _ in range(2):
        submit.run_elsewhere(recipe, "slurm", [], None, detach=True)
    assert len({path for _, path in played.submitted}) == 2


@pytest.mark.parametrize(
    ("code", "error"), [(0, None), (1, WorkerFailed), (2, UsageError), (3, Interrupted), (137, WorkerFailed)]
)
def test_the_jobs_exit_code_is_muster_s(
    code: int, error: type[Exception] | None, recipe: Recipe, played: type[Played], capsys: pytest.CaptureFixture[str]
) -> None:
    played.code, played.lines = code, ["step 1", f"[odd] {ODD}"]
    if error is None:
        submit.run_elsewhere(recipe, "ray", [], "http://h:8265", detach=False)
    else:
        with pytest.raises(error, match=f"ray:42 ended with exit code {code}"):
            submit.run_elsewhere(recipe, "ray", [], "http://h:8265", detach=False)
    assert played.submitted[0][0].settings["address"] == "http://h:8265"
    assert f"[odd] {ODD}" in capsys.readouterr().err


def test_an_interruption_leaves_the_job_and_says_how_to_end_it(recipe: Recipe, played: type[Played]) -> None:
    played.interrupted = True
    with pytest.raises(Interrupted, match=r"slurm:42 continues; .*muster cancel .*/r"):
        submit.run_elsewhere(recipe, "slurm", [], None, detach=False)
    assert not played.cancelled


def test_a_refusal_is_the_users_or_the_clusters(recipe: Recipe, played: type[Played]) -> None:
    for usage, error in ((True, UsageError), (False, WorkerFailed)):
        played.refusal = ClusterError("no such partition", usage)
        with pytest.raises(error, match="no such partition"):
            submit.run_elsewhere(recipe, "slurm", [], None, detach=True)
    assert read_status_job(recipe) is None


def read_status_job(recipe: Recipe) -> str | None:
    found = cancel.read_submission(run_of(recipe))
    return found.job if found else None


def test_a_recipe_that_differs_from_the_runs_is_refused_before_it_is_submitted(
    recipe: Recipe, played: type[Played]
) -> None:
    run = run_of(recipe)
    run.write(layout.RECIPE, dump(recipe).encode())
    run.write(layout.commit(1, 1), b"{}")
    other = recipe.model_copy(update={"seed": 3})
    with pytest.raises(RecipeChanged, match="seed"):
        submit.run_elsewhere(other, "slurm", [], None, detach=True)
    assert not played.submitted


def test_a_new_submission_is_not_the_cancelled_one(recipe: Recipe, played: type[Played]) -> None:
    """On Kubernetes a job of the same name."""
    submit.run_elsewhere(recipe, "kubernetes", [], None, detach=True)
    CliRunner().invoke(app, ["cancel", run_of(recipe).url])
    with pytest.raises(Interrupted):
        check_not_cancelled(run_of(recipe), "kubernetes:42")
    submit.run_elsewhere(recipe, "kubernetes", [], None, detach=True)
    check_not_cancelled(run_of(recipe), "kubernetes:42")
    with pytest.raises(UsageError, match="--takeover is not possible with --on kubernetes"):
        submit.run_elsewhere(recipe, "kubernetes", ["--takeover"], None, detach=True)


def test_a_trial_is_cancelled_without_the_job_of_its_sweep(recipe: Recipe, played: type[Played]) -> None:
    storage = open_storage(recipe.storage)
    write_trial(folder_of(storage, "r"), TrialRecord(7, "r-007"))
    for name, cancelled in (("r-007", []), ("r-008", ["7"])):
        lease = Lease.acquire(storage.child(name), job="slurm:7")
        lease.release("interrupted")
        cancel.cancel_run(storage.child(name).url, print)
        assert played.cancelled == cancelled
        assert end_is_requested(storage.child(name), lease.driver)


def test_runs_together_are_one_job_which_ends_with_none_of_them(
    tmp_path: Path, played: type[Played], capsys: pytest.CaptureFixture[str]
) -> None:
    data = made(str(tmp_path / "runs"), str(tmp_path / "data.jsonl")).model_dump(mode="json", exclude_defaults=True)
    data["adapters"] = {"low": {"optimizer.lr": 1e-4}, "high": {"optimizer.name": "muon"}}
    file = tmp_path / "r.yaml"
    file.write_text(as_text(data))
    started = CliRunner().invoke(app, ["run", str(file), "seed=5", "--on", "slurm", "--detach"])
    assert started.exit_code == 0, started.stderr
    ((job, path),) = played.submitted
    storage = open_storage(str(tmp_path / "runs"))
    assert (job.name, job.command, job.workers) == ("r", ("run",), (2, 4))
    assert Path(path).read_text() == job.recipe
    assert Path(path).is_relative_to(storage.child("r-low").url)
    submitted = variants(given_at(path))
    assert [(one.name, one.seed, one.optimizer.name) for one in submitted] == [
        ("r-low", 5, "adamw"),
        ("r-high", 5, "muon"),
    ]
    assert submitted == variants({**data, "seed": 5})
    runs = [storage.child(one.name) for one in submitted]
    assert [read_status(run).job for run in runs] == ["slurm:42"] * 2
    cancel.cancel_run(runs[0].url, print)  # before the job has begun
    assert "slurm:42 trains other runs too" in capsys.readouterr().out
    assert not played.cancelled
    with pytest.raises(Interrupted, match="was cancelled"):
        check_not_cancelled(runs[0], "slurm:42")
    check_not_cancelled(runs[1], "slurm:42")
    lease = Lease.acquire(runs[1], job="slurm:42", shared=True)
    lease.release("interrupted")
    cancel.cancel_run(runs[1].url, print)
    assert not played.cancelled
    alone = Lease.acquire(runs[1], job="slurm:43")  # later, as the only run of a job
    alone.release("interrupted")
    cancel.cancel_run(runs[1].url, print)
    assert "43" in played.cancelled
    played.interrupted = True
    followed = CliRunner().invoke(app, ["run", str(file), "seed=5", "--on", "slurm"])
    assert isinstance(followed.exception, Interrupted)
    assert f"`muster cancel` ends one: {runs[0].url}, {runs[1].url}" in str(followed.exception)


def test_one_of_several_runs_ends_while_its_driver_holds_it(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cancel, "LOOK_S", 0.05)
    monkeypatch.setattr(cancel, "HELD_S", 0.2)
    run = run_of(recipe)
    lease = Lease.acquire(run)
    claim_attempt(run, lease.driver, {})
    said: list[str] = []
    ended = threading.Timer(0.5, end, (run,))
    ended.start()
    cancel.cancel_run(run.url, said.append)
    ended.join()
    assert said[-1].startswith(f"{run.url} is stopped")
    lease.release("interrupted")


def end(run: Storage) -> None:
    events = Events(run, 1, "rank0")
    events.emit(EndEvent(state="interrupted", step=3))
    events.close()


def test_one_job_is_cancelled_once_by_the_name_that_it_was_submitted_under() -> None:
    def named(job: str) -> Submission:
        kind, _, name = job.partition(":")
        return Submission(kind, name, 0.0, "r")

    assert jobs_of(named("ray:http://h:8265/j1"), "ray:j1") == ["ray:http://h:8265/j1"]
    assert jobs_of(named("kubernetes:ml/r"), "kubernetes:ml/r") == ["kubernetes:ml/r"]
    assert jobs_of(named("slurm:1"), "slurm:2") == ["slurm:1", "slurm:2"]
    assert jobs_of(None, "slurm:2") == ["slurm:2"]
    assert jobs_of(None, "torchrun:x") == jobs_of(None, None) == []


@pytest.mark.parametrize("kind", cluster.KINDS)
def test_what_limits_restarts_is_a_setting_of_the_kind(kind: str, recipe: Recipe) -> None:
    assert cluster.KINDS[kind].restarts in (None, *submit.job_of(recipe, kind).settings)


def test_an_address_of_the_environment_with_credentials_is_refused(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cluster.KINDS, "ray", cluster.KINDS["ray"]._replace(code="cluster.ray:Ray"))
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://me:planted@head:8265")
    with pytest.raises(UsageError, match="the address of the cluster holds credentials") as refused:
        submit.run_elsewhere(recipe, "ray", [], None, detach=True)
    assert "planted" not in str(refused.value)
    assert not Path(recipe.storage).exists()


@pytest.mark.parametrize("kind", ["ray", "kubernetes"])
def test_places_that_mean_something_here_only(kind: str, played: type[Played], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"storage, data: d\.jsonl: a relative path is another place"):
        submit.run_elsewhere(made("runs", "d.jsonl"), kind, [], None, detach=True)
    assert not played.submitted
    submit.run_elsewhere(made(str(tmp_path), "s3://b/d.jsonl"), kind, [], None, detach=True)


def test_doctor_elsewhere_tells_its_object_alone_on_stdout(
    recipe: Recipe, played: type[Played], capsys: pytest.CaptureFixture[str]
) -> None:
    played.code, played.lines = 1, ["starting probes", '{"verdict": "not ready"}']
    assert submit.doctor_elsewhere(recipe, "kubernetes", as_json=True) == 1
    shown = capsys.readouterr()
    assert shown.out == '{"verdict": "not ready"}\n'
    assert "starting probes" in shown.err
    job, _ = played.submitted[0]
    assert (job.name, job.command, job.settings["retries"]) == ("r-doctor", ("doctor", "--json"), 0)
    assert read_status_job(recipe) is None, "no job of the run's"


def test_render_contacts_nothing(recipe: Recipe, played: type[Played], tmp_path: Path) -> None:
    path = tmp_path / f"{ODD}.yaml"
    path.write_text(dump(recipe))
    done = CliRunner().invoke(app, ["render", str(path), "seed=3", "--on", "slurm"])
    assert (done.exit_code, done.stdout) == (0, f"r {path} seed=3\n")
    done = CliRunner().invoke(app, ["render", str(path), "seed=3", "--on", "local"])
    assert loads(done.stdout) == recipe.model_copy(update={"seed": 3})
    assert not Path(recipe.storage).exists()
    with pytest.raises(UsageError, match="'nope' is no kind of cluster; there are: ray, slurm, kubernetes"):
        CliRunner().invoke(app, ["render", str(path), "--on", "nope"], catch_exceptions=False)


@pytest.mark.parametrize(
    ("on", "address", "environment", "place", "joined"),
    [
        (None, None, {}, None, None),
        (None, None, {"RAY_ADDRESS": "10.0.0.1:6379"}, None, "10.0.0.1:6379"),
        ("local", None, {"RAY_ADDRESS": "10.0.0.1:6379"}, None, None),
        ("ray", None, {}, None, "auto"),
        ("ray", None, {"RAY_ADDRESS": "10.0.0.1:6379"}, None, "10.0.0.1:6379"),
        ("ray", None, {"RAY_API_SERVER_ADDRESS": "http://h:8265"}, "ray", None),
        ("ray", None, {"RAY_ADDRESS": "http://h:8265"}, "ray", "http://h:8265"),
        ("ray", "http://h:8265", {}, "ray", None),
        ("ray", "h:6379", {}, None, "h:6379"),
        (None, "http://h:8265", {}, "ray", None),
        ("slurm", None, {}, "slurm", None),
        ("kubernetes", None, {}, "kubernetes", None),
        # A driver in a submitted job joins the cluster that the job runs on, whatever its address is called.
        ("ray", None, {"RAY_ADDRESS": "1.2.3.4:1", "RAY_API_SERVER_ADDRESS": "http://h"}, None, "1.2.3.4:1"),
    ],
)
def test_where_a_run_is_driven_from(
    on: str | None,
    address: str | None,
    environment: dict[str, str],
    place: str | None,
    joined: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import os

    monkeypatch.setenv("RAY_ADDRESS", "")  # put back afterwards, whatever was made of it
    del os.environ["RAY_ADDRESS"]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert choose_place(on, address, None) == place
    assert os.environ.get("RAY_ADDRESS") == joined


def test_places_that_there_are_not() -> None:
    with pytest.raises(UsageError, match="--on 'cloud' is not one of: local, ray, slurm, kubernetes"):
        choose_place("cloud", None, None)
    with pytest.raises(UsageError, match="--address names a Ray cluster, and --on is slurm"):
        choose_place("slurm", "http://h:8265", None)


def driven(run: Storage, job: str | None) -> tuple[threading.Thread, Callable[[], None]]:
    """A driver of the run that ends when it is asked to."""
    run.write(layout.RECIPE, b"name: r\n")
    lease = Lease.acquire(run, job=job, renew_s=0.05)

    def drive() -> None:
        assert lease.asked.wait(20)
        lease.release("interrupted")

    thread = threading.Thread(target=drive)
    thread.start()
    return thread, lambda: thread.join(20)


@pytest.mark.parametrize(("job", "cancelled"), [(None, []), ("slurm:7", ["7"]), ("torchrun:x", [])])
def test_a_driver_is_asked_and_its_job_cancelled(
    job: str | None, cancelled: list[str], tmp_path: Path, played: type[Played]
) -> None:
    run = open_storage(str(tmp_path)).child("r")
    _, ended = driven(run, job)
    assert CliRunner().invoke(app, ["cancel", run.url]).exit_code == 0
    ended()
    assert read_status(run).state == "interrupted"
    assert played.cancelled == cancelled


def test_a_job_that_has_not_begun_is_cancelled(recipe: Recipe, played: type[Played]) -> None:
    submit.run_elsewhere(recipe, "slurm", [], None, detach=True)
    assert CliRunner().invoke(app, ["cancel", run_of(recipe).url]).exit_code == 0
    assert played.cancelled == ["42"]


def test_where_the_jobs_commands_are_missing_the_driver_is_asked_all_the_same(
    tmp_path: Path, played: type[Played]
) -> None:
    run = open_storage(str(tmp_path)).child("r")
    _, ended = driven(run, "slurm:7")
    played.refusal = ClusterError("there is no scontrol on this machine")
    done = CliRunner().invoke(app, ["cancel", run.url])
    ended()
    assert done.exit_code == 0
    assert "if it starts again, it ends at once (there is no scontrol" in done.stderr
    with pytest.raises(Interrupted, match=r"slurm:7 was cancelled; to resume the run, submit it again"):
        check_not_cancelled(run, "slurm:7")
    check_not_cancelled(run, "slurm:8")
    check_not_cancelled(run, None)


def test_a_driver_that_does_not_end_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, played: type[Played]
) -> None:
    monkeypatch.setattr(cancel, "END_WAIT_S", 0.2)
    monkeypatch.setattr(cancel, "LOOK_S", 0.05)
    run = open_storage(str(tmp_path)).child("r")
    lease = Lease.acquire(run)
    with pytest.raises(WorkerFailed, match="did not end within"):
        CliRunner().invoke(app, ["cancel", run.url], catch_exceptions=False)
    lease.release("failed")


def test_cancel_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no run at"):
        CliRunner().invoke(app, ["cancel", str(tmp_path / "nope")], catch_exceptions=False)


def test_a_request_to_end_is_for_one_driver_only(tmp_path: Path) -> None:
    from trainer.run.lease import end_is_requested, request_end

    run = open_storage(str(tmp_path)).child("r")
    first = Lease.acquire(run, renew_s=0.02)
    request_end(run, first.driver)
    assert first.asked.wait(10)
    first.release("interrupted")
    second = Lease.acquire(run, renew_s=0.02)
    assert not end_is_requested(run, second.driver)
    time.sleep(0.1)
    assert not second.asked.is_set()
    second.release("interrupted")


def test_a_kind_that_is_only_rendered_says_how_it_is_launched(recipe: Recipe, tmp_path: Path) -> None:
    for start in (
        lambda: submit.run_elsewhere(recipe, "skypilot", [], None, detach=True),
        lambda: submit.doctor_elsewhere(recipe, "skypilot", as_json=False),
    ):
        with pytest.raises(UsageError, match=r"muster render RECIPE --on skypilot > task.yaml.*sky jobs launch"):
            start()
    assert not (tmp_path / "runs").exists(), "nothing is written for a job that does not come"


def test_a_task_that_is_launched_by_hand_has_a_storage_that_its_machines_reach(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    settings = {"cluster": {"skypilot": {"accelerators": "H100"}}}
    path.write_text(dump(made("runs", "s3://corpus/data.jsonl", **settings)))
    render = ["render", str(path), "--on", "skypilot"]
    refused = CliRunner().invoke(app, render)
    assert isinstance(refused.exception, UsageError)
    assert "storage: a relative path is another place" in str(refused.exception)
    written = CliRunner().invoke(app, [*render, "storage=s3://runs"])
    assert (written.exit_code, written.stdout.splitlines()[0]) == (0, "name: r")
