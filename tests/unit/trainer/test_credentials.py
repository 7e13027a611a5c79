"""Credentials of many shapes, planted wherever a user or a library may put them, are found in no file and no output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import cluster.ray
import launcher.driver.driver
from cluster import cluster_of, renderer_of
from cluster.slurm import Slurm
from launcher.cli.app import main
from launcher.submit.submit import job_of
from tests.support.training import small_recipe, write_pairs
from trainer.errors import InputError, MusterError, RecipeError, WorkerFailed
from trainer.recipe import Recipe, dump, parse
from trainer.run import layout
from trainer.run.frozen import read_recipe
from trainer.storage import open_storage

ROOT = Path(__file__).resolve().parents[3]
MARK = "planted"
"""In each of them, in either case, and nowhere else."""
PEM = "-----BEGIN PRIVATE KEY-----\nMIIEplantedAQEAx4fm7dng\nplantedGAM9Z3a=\n-----END PRIVATE KEY-----"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "AKIAPLANTEDKEY012345",
    "AWS_SECRET_ACCESS_KEY": "wJalr/planted+secret/EXAMPLEKEY01234",
    "AWS_SESSION_TOKEN": "FwoGZXIvYXdz//planted//session==",
    "HF_TOKEN": "hf_plantedplantedplantedplanted0123",
    "WANDB_API_KEY": "0123456789abcdef-planted-0123456789abcdef",
    "MLFLOW_TRACKING_URI": "https://me:planted-basic@host/mlflow",
    "CORPUS": "https://bucket.s3.amazonaws.com/x?X-Amz-Date=1&X-Amz-Signature=planted0123",
    "BLOBS": "https://a.blob.core.windows.net/c/x?sv=2024&sig=planted%2F0123%3D",
    "GOOGLE": "https://storage.googleapis.com/b/x?X-Goog-Signature=planted0123",
    "HEADER": "Authorization: Bearer planted.bearer.0123456789",
    "SERVICE_PRIVATE_KEY": PEM,
    "AWS_ENDPOINT_URL": "me:planted-endpoint@minio:9000",
    "SETTINGS": '{"api_key": "planted-json-field"}',
}
IN_A_RECIPE = [
    "https://me:planted@host/x", "s3://key:pla/planted@bucket/x", ENVIRONMENT["CORPUS"], ENVIRONMENT["BLOBS"],
    ENVIRONMENT["GOOGLE"], "https://host/x?token=planted", "AKIAPLANTEDKEY012345", ENVIRONMENT["HF_TOKEN"],
    "--export=ALL,WANDB_API_KEY=planted0123", "Bearer planted-0123456789abcdef", PEM.replace("\n", "\\n"),
    ENVIRONMENT["AWS_SECRET_ACCESS_KEY"],
]  # fmt: skip
FIELDS = [
    "storage", "model.path", "model.revision", "data.train.0.path", "data.eval.0.path", "data.chat_template",
    "tensorboard.folder", "mlflow.uri", "wandb.folder", "wandb.tags.0", "cluster.ray.address",
    "cluster.slurm.options.0", "cluster.slurm.account", "cluster.kubernetes.image",
    "cluster.kubernetes.node_selector.a", "cluster.kubernetes.pod.a", "ppo.reward.model", "name", "ppo.reward.function",
]  # fmt: skip


def hidden(*texts: str | bytes) -> bool:
    return not any(MARK.encode() in (t.encode() if isinstance(t, str) else t).lower() for t in texts)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


def plain(folder: Path) -> dict[str, Any]:
    recipe = small_recipe("kept", folder / "model", folder).model_dump(mode="json")
    recipe["data"]["eval"] = [dict(recipe["data"]["train"][0])]
    return recipe


def with_value(recipe: dict[str, Any], path: str, value: str) -> dict[str, Any]:
    *parents, last = [int(key) if key.isdecimal() else key for key in path.split(".")]
    node: Any = recipe
    for key in parents:
        node = node[key]
    if isinstance(node, list):
        node[:] = node or [None]
    node[last] = value
    return recipe


@pytest.mark.parametrize("path", FIELDS)
def test_a_recipe_that_holds_any_is_refused(path: str, tmp_path: Path) -> None:
    for value in IN_A_RECIPE:
        with pytest.raises(RecipeError) as caught:
            parse(with_value(plain(tmp_path), path, value))
        said = [mistake for mistake in caught.value.mistakes if path.startswith(mistake.path)]
        assert said, (path, value, caught.value)
        assert hidden(str(caught.value), repr(caught.value.args)), (path, value)


def test_the_refusal_names_the_setting_and_says_how_to_give_access(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(with_value(plain(tmp_path), "data.train.0.path", ENVIRONMENT["BLOBS"]))
    [mistake] = caught.value.mistakes
    assert mistake.path == "data.train.0.path"
    assert "holds credentials (sig=… in a query)" in mistake.message
    assert "AWS_ACCESS_KEY_ID" in mistake.message
    assert "~/.aws/credentials" in mistake.message


Muster = Callable[..., tuple[int, str]]


@pytest.fixture
def muster(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Muster:
    """Calls the program in this process: code, and all that it has printed."""

    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["muster", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), "".join(capsys.readouterr())

    return call


COMMANDS = [
    ["validate"], ["render", "--on", "local"], ["render"], ["render", "--on", "ray"], ["render", "--on", "kubernetes"],
    ["run"], ["run", "--on", "slurm"], ["plan"], ["prepare"], ["doctor"], ["evaluate", "--model", "x"],
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_no_command_prints_or_stores_one_of_a_recipe_or_an_override(
    command: list[str], muster: Muster, tmp_path: Path
) -> None:
    (tmp_path / "good.yaml").write_text(dump(parse(plain(tmp_path))))
    for value in (ENVIRONMENT["BLOBS"], ENVIRONMENT["HF_TOKEN"], "https://me:planted@host/x"):
        bad = json.dumps(with_value(plain(tmp_path), "data.train.0.path", value))
        (tmp_path / "bad.json").write_text(bad)
        asked = [[str(tmp_path / "bad.json")]]
        if command != ["validate"]:
            good = str(tmp_path / "good.yaml")
            asked += [[good, text] for text in (f"data.train.0.path={value}", f"seed={value}", value, f"x={value}")]
        for arguments in asked:
            code, said = muster(*command, *arguments)
            assert code == 2
            assert hidden(said), (arguments, said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.json", "good.yaml"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["status", "https://me:planted@host/x"], ["ls", "s3://b/x?sig=planted"], ["logs", "s3://b/x?token=planted"],
        ["run", "s3://b/r.yaml?sig=planted"], ["generate", "--run", "s3://b/x?sig=planted", "--prompt", "x"],
        ["inspect", "https://me:planted@host/x"], ["--token=planted"], ["logs", "x", "--rank", "password=planted"],
        ["run", "{recipe}", "--on", "ray", "--address", "http://me:planted@head:8265"],
        ["convert", "axolotl", "{theirs}"],
    ],
    ids=lambda arguments: arguments[0],
)  # fmt: skip
def test_what_a_command_line_holds_is_not_repeated(arguments: list[str], muster: Muster, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(dump(parse(plain(tmp_path))))
    lines = ["base_model: https://me:planted@host/x", f"hub_token: {ENVIRONMENT['HF_TOKEN']}", "learning_rate: planted"]
    (tmp_path / "theirs.yml").write_text("\n".join([*lines, "datasets: [{path: 'https://h/x?sig=planted'}]"]))
    given = [argument.format(recipe=tmp_path / "r.yaml", theirs=tmp_path / "theirs.yml") for argument in arguments]
    code, said = muster(*given)
    assert code == 2
    assert hidden(said.replace("learning_rate: 'planted' is no number", "")), said


@pytest.mark.parametrize("kind", [WorkerFailed, RuntimeError, OSError])
def test_what_an_error_holds(
    kind: type[Exception], muster: Muster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drive(*_: object, **__: object) -> list[str]:
        raise kind("\n".join(ENVIRONMENT.values()))

    monkeypatch.setattr(launcher.driver.driver, "run_together", drive)
    (tmp_path / "r.yaml").write_text(dump(parse(plain(tmp_path))))
    code, said = muster("run", str(tmp_path / "r.yaml"))
    assert code == 1
    assert hidden(said), said
    assert "***" in said


def test_an_error_of_our_own_holds_none_from_the_begin() -> None:
    error = MusterError(*ENVIRONMENT.values())
    assert hidden(str(error), repr(error), error.cause, *map(str, error.args))


@pytest.mark.parametrize("kind", ["ray", "slurm", "kubernetes", "jobset"])
def test_what_is_submitted(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The metadata of jobs are seen by everybody who sees the cluster."""
    recipe: Recipe = parse(plain(tmp_path))
    place = "kubernetes" if kind == "jobset" else kind
    if kind == "jobset":
        recipe = parse(with_value(recipe.model_dump(mode="json"), "cluster.kubernetes.kind", "jobset"))
    settings = {"address": "http://head:8265"} if kind == "ray" else {}
    job = job_of(recipe, place, arguments=["r.yaml", "seed=1"], **settings)
    sent: list[str | bytes] = [repr(job), renderer_of(place).render(job)]
    if kind == "ray":

        def call(self: object, method: str, path: str, body: bytes | None = None) -> bytes:
            sent.extend((path, body or b""))
            return b'{"submission_id": "x"}'

        monkeypatch.setattr(cluster.ray.Api, "call", call)
        cluster_of("ray").submit(job, "s3://runs/submitted.yaml")
        sent.append(recipe.model_dump_json())
        assert any(b'"metadata"' in part for part in sent if isinstance(part, bytes))
    if kind == "slurm":

        def run(arguments: Sequence[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
            sent.extend(arguments)
            return subprocess.CompletedProcess(arguments, 0, "4711\n", "")

        assert Slurm(os.environ, run).submit(job, "s3://runs/submitted.yaml") == "4711"
    assert hidden(*sent)


@pytest.mark.parametrize(
    "value",
    ["me:planted@minio:9000", "http://me:planted@minio:9000", "https://planted@minio", "https://minio/?token=planted"],
)
@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_an_endpoint_with_credentials_is_refused_at_once(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for other in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError) as caught:
        open_storage("s3://runs").list()
    assert f"{name} carries a user name, a password" in str(caught.value)
    assert "~/.aws/credentials" in str(caught.value)
    assert hidden(str(caught.value))


@pytest.mark.parametrize("value", ["minio:9000", "http://", "http://host:port", "ftp://host"])
def test_an_endpoint_that_is_none(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", value)
    with pytest.raises(InputError, match="which is no URL"):
        open_storage("s3://runs").list()


def test_a_run_that_version_0_1_has_stored_is_still_read(tmp_path: Path) -> None:
    run = open_storage(str(tmp_path / "run"))
    run.write(
        layout.RECIPE, json.dumps(with_value(plain(tmp_path), "data.train.0.path", "https://h/x?sig=old")).encode()
    )
    assert read_recipe(run, ["checkpoint.every_steps=7"]).checkpoint.every_steps == 7
    with pytest.raises(RecipeError, match="holds credentials"):
        read_recipe(run, [f"mlflow.uri={ENVIRONMENT['MLFLOW_TRACKING_URI']}"])


SPILL = """
import logging, os, sys, warnings
sys.path.insert(0, {root!r})
import trainer.__main__ as program
import trainer.worker.attempt as attempt
real, secrets = attempt.train, {names!r}
def train(job, stop):
    real(job, stop)
    values = [os.environ[name] for name in secrets]
    print(*values, sep="\\n")
    print(dict(os.environ), file=sys.stderr)
    for value in values:
        os.write(2, b"a library: " + value.encode() + b"\\n")
        logging.getLogger("trainer.x").info("told %s", value)
        logging.getLogger("trainer.x").warning("warned of %s", value)
        warnings.warn(value)
    raise RuntimeError("failed of " + " and ".join(values))
attempt.train = train
sys.exit(program.main([{recipe!r}]))
"""


@pytest.fixture(scope="module")
def spilled(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> tuple[Path, str]:
    """A run of two steps that then prints, logs and raises all of them: its folder, and what it has printed."""
    folder = tmp_path_factory.mktemp("spilled")
    write_pairs(folder / "data" / "a.jsonl", 12)
    changes = {"training.steps": 2, "tracking": ["tensorboard"]}
    recipe = small_recipe("spilled", tiny_model, folder, **changes)
    (folder / "r.yaml").write_text(dump(recipe))
    code = SPILL.format(root=str(ROOT), names=list(ENVIRONMENT), recipe=str(folder / "r.yaml"))
    places = {"MUSTER_CACHE": str(folder / "cache"), "TMPDIR": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=240, cwd=folder,
        env={**os.environ, **ENVIRONMENT, **places},
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    return folder, done.stdout + done.stderr


def test_no_file_of_a_run_and_none_of_its_output_has_them(spilled: tuple[Path, str]) -> None:
    folder, printed = spilled
    assert "failed of" in printed
    assert "a library: " in printed
    assert hidden(printed), printed
    files = [path for path in folder.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"recipe.yaml", "provenance.json"} <= names
    for key in (layout.EVENTS, layout.METRICS, layout.LOGS, layout.TENSORBOARD):
        assert list((folder / "runs" / "spilled" / key).rglob("*")), key
    assert "failed of" in "".join(path.read_text() for path in (folder / "runs/spilled" / layout.EVENTS).iterdir())
    assert [str(path) for path in files if not hidden(path.read_bytes(), str(path))] == []


@pytest.mark.parametrize(
    "command",
    [["status"], ["status", "--json"], ["logs"], ["ls"], ["ls", "--json"], ["report", "-o", "{page}"]],
    ids=" ".join,
)
def test_what_is_told_of_such_a_run(command: list[str], muster: Muster, spilled: tuple[Path, str]) -> None:
    folder, _ = spilled
    run = folder / "runs" / "spilled"
    given = [argument.format(page=folder / "page.html") for argument in command]
    code, said = muster(*given, str(run.parent if command[0] == "ls" else run))
    assert code == 0
    assert hidden(said), said
    if command[0] == "report":
        assert hidden((folder / "page.html").read_bytes())


def test_a_failure_that_an_earlier_version_has_stored_is_shown_without_them(
    muster: Muster, spilled: tuple[Path, str], tmp_path: Path
) -> None:
    from tests.support.made_up_run import make_up
    from trainer.run.jsonl import JsonLinesWriter

    run = open_storage(str(tmp_path / "old"))
    make_up(run, ended="failed")
    lines = JsonLinesWriter(run, layout.events_part(3, "driver1"))
    cause = "could not read " + "x" * 60 + ENVIRONMENT["BLOBS"] + " or " + "\n".join(ENVIRONMENT.values())
    lines.add({"event": "failure", "attempt": 3, "time": 1e9, "cause": cause, "trace": cause, "advice": cause})
    lines.close()
    for arguments in (["status"], ["status", "--json"], ["status", "--watch"]):
        code, said = muster(*arguments, run.url)
        assert code == 0
        assert "could not read" in said
        assert hidden(said), said
