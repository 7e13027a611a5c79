"""Each tracker as it is: what stands in its own store after a run that failed, and went on."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import struct
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.storage.doubles import faulty
from tests.support.training import run_of, small_recipe, train_here, write_pairs
from trainer.errors import InputError
from trainer.recipe import Recipe
from trainer.recipe.trackers import TRACKERS
from trainer.run import layout
from trainer.run.jsonl import JsonLinesWriter, read_rows
from trainer.storage import Storage, open_storage
from trainer.tracking import Mirror, Point, TrackedRun, Watermark, check_trackers, tracked

STEPS = 8


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith(("WANDB_", "MLFLOW_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def recipe_of(folder: Path, tracker: str, **changes: Any) -> Recipe:
    return small_recipe("tracked", folder / "model", folder, **{"tracking": [tracker], **changes})


def write_steps(run: Storage, attempt: int, steps: range, loss: float) -> None:
    lines = JsonLinesWriter(run, layout.metrics_part(attempt))
    for step in steps:
        lines.add({"attempt": attempt, "step": step, "total_steps": STEPS, "loss": loss, "tokens": 10})
        if step % 4 == 0:
            lines.add({"attempt": attempt, "step": step, "eval_loss": loss + 1})
    lines.close()


def killed_and_resumed(recipe: Recipe, run: Storage) -> None:
    """An attempt that dies after step 6, with step 4 as its newest commit, and a second driver's that goes on from
    there."""
    write_steps(run, 1, range(1, 7), 2.0)
    Mirror(recipe.tracking[0], recipe, run).pump()
    write_steps(run, 2, range(5, STEPS + 1), 1.0)
    with tracked(recipe, run):
        pass


EXPECTED = {("train/loss", step): 2.0 if step <= 6 else 1.0 for step in range(1, STEPS + 1)} | {
    ("eval/loss", 4): 3.0,
    ("eval/loss", 8): 2.0,
}


def once(points: list[tuple[str, int, float]]) -> dict[tuple[str, int], float]:
    """{(name, step): value} of the losses, each of which stands there once."""
    found = [point for point in points if point[0].endswith("/loss")]
    assert [key for key, count in Counter((name, step) for name, step, _ in found).items() if count > 1] == []
    return {(name, step): value for name, step, value in found}


def tensorboard_points(folder: Storage) -> list[tuple[str, int, float]]:
    pytest.importorskip("tensorboardX")
    from trainer.tracking.tensorboard import scalars

    return [(tag, step, value) for info in folder.list() for step, tag, value in scalars(folder.read(info.key))]


def test_tensorboard_goes_on_in_a_new_file_without_doubled_steps(tmp_path: Path) -> None:
    recipe, (run, _) = recipe_of(tmp_path, "tensorboard"), faulty()
    killed_and_resumed(recipe, run)
    assert once(tensorboard_points(run.child(layout.TENSORBOARD))) == EXPECTED
    assert len(run.list(layout.TENSORBOARD)) == 2


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    recipe = recipe_of(tmp_path, "tensorboard", **{"tensorboard.folder": str(tmp_path / "board")})
    killed_and_resumed(recipe, faulty()[0])
    shown = accumulators.EventAccumulator(str(tmp_path / "board" / "tracked")).Reload()
    assert once([("train/loss", e.step, e.value) for e in shown.Scalars("train/loss")]) == {
        key: value for key, value in EXPECTED.items() if key[0] == "train/loss"
    }
    assert "recipe/text_summary" in shown.Tags()["tensors"]


def test_tensorboard_parts_are_bounded_and_a_cut_one_is_read_as_far_as_it_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboardX")
    from trainer.tracking import tensorboard

    monkeypatch.setattr(tensorboard, "_ROLL_BYTES", 300)
    run, _ = faulty()
    curve = TrackedRun("c", True, recipe_of(tmp_path, "tensorboard"), run)
    board = tensorboard.TensorBoard(curve)
    board.write([Point(s, 99, "train", 1.0, {"loss": float(s)}) for s in range(1, 41)])
    parts = run.list(layout.TENSORBOARD)
    assert len(parts) > 5
    assert [p[1] for p in tensorboard_points(run.child(layout.TENSORBOARD))] == list(range(1, 41))
    newest = run.read(parts[-1].key)
    run.write(parts[-1].key, newest[:-3])
    assert [p[1] for p in tensorboard_points(run.child(layout.TENSORBOARD))] == list(range(1, 40))
    assert tensorboard.TensorBoard(TrackedRun("c", False, curve.recipe, run)).last_mark() == Watermark(39, 0)
    tensorboard.TensorBoard(curve)
    assert run.list(layout.TENSORBOARD) == [], "a new curve keeps points of the one that a mended recipe replaced"


def wandb_records(data: bytes) -> Iterator[bytes]:
    """Of a ``.wandb`` file: after 7 bytes of header a LevelDB log, which is blocks of 32 KiB, in them pieces of records
    with a checksum (4 bytes), length (2) and kind (1: whole, 2: first, 3: middle, 4: last)."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        whole, at = whole + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""


def wandb_points(folder: Path) -> tuple[list[tuple[str, int, float]], set[str]]:
    """(name, step, value) of all offline files, and the ids of their runs. The process that writes them may end after
    the run that it writes of, and its last record is how that ended."""
    deadline = time.monotonic() + 20
    while (found := _wandb_points(folder))[2] == "" and time.monotonic() < deadline:
        time.sleep(0.1)
    return found[0], found[1]


def _wandb_points(folder: Path) -> tuple[list[tuple[str, int, float]], set[str], str]:
    pb = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    points, ids, ended = [], set(), ""
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        ids.add(file.stem.removeprefix("run-"))
        ended = ""
        for data in wandb_records(file.read_bytes()):
            record = pb.Record.FromString(data)
            if record.WhichOneof("record_type") == "history":
                row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
                points += [(name, int(row["_step"]), value) for name, value in row.items()]
            elif record.WhichOneof("record_type") == "exit":
                ended = file.name
    return points, ids, ended


def tell_and_die(recipe: Recipe) -> None:
    Mirror(recipe.tracking[0], recipe, run_of(recipe)).pump()
    os.kill(os.getpid(), signal.SIGKILL)


def test_wandb_offline_is_one_run_without_doubled_steps(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    recipe = recipe_of(tmp_path, "wandb", **{"wandb.mode": "offline"})
    run = run_of(recipe)
    for steps in (range(1, 7), range(5, STEPS + 1)):
        write_steps(run, steps[0], steps, 2.0 if steps[0] == 1 else 1.0)
        with tracked(recipe, run):
            pass
    points, ids = wandb_points(Path(run.url))
    assert once(points) == EXPECTED
    assert ids == {run.read_json(layout.tracker("wandb"))["id"]}


def test_wandb_offline_after_a_killed_driver_doubles_nothing(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    recipe = recipe_of(tmp_path, "wandb", **{"wandb.mode": "offline"})
    run = run_of(recipe)
    write_steps(run, 1, range(1, 7), 2.0)
    killed = multiprocessing.get_context("spawn").Process(target=tell_and_die, args=(recipe,))
    killed.start()
    killed.join(60)
    assert killed.exitcode == -signal.SIGKILL
    write_steps(run, 2, range(5, STEPS + 1), 1.0)
    with tracked(recipe, run):
        pass
    points, ids = wandb_points(Path(run.url))
    assert once(points).items() <= EXPECTED.items()
    assert {("train/loss", 7), ("train/loss", 8), ("eval/loss", 8)} <= once(points).keys()
    assert len(ids) == 1


def test_wandb_online_asks_for_its_key_before_the_run(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    with pytest.raises(InputError, match=r"set WANDB_API_KEY, run `wandb login`, or write wandb.mode: offline"):
        check_trackers(recipe_of(tmp_path, "wandb"))
    check_trackers(recipe_of(tmp_path, "wandb", **{"wandb.mode": "offline"}))


def mlflow_points(uri: str) -> list[tuple[str, int, float]]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    (experiment,) = [e for e in client.search_experiments() if e.name == "muster"]
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.params["optimizer.lr"] == "0.005"
    names = [name for name in found.data.metrics if name.endswith("/loss")]
    return [(name, m.step, m.value) for name in names for m in client.get_metric_history(found.info.run_id, name)]


@pytest.mark.parametrize("store", ["file", "sqlite"])
def test_mlflow_is_one_run_without_doubled_steps(tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    if store == "sqlite":
        pytest.importorskip("alembic")
    uri = f"sqlite:///{tmp_path}/mlflow.db" if store == "sqlite" else f"file:{tmp_path}/mlruns"
    recipe = recipe_of(tmp_path, "mlflow", **{"mlflow.uri": uri})
    killed_and_resumed(recipe, faulty()[0])
    assert once(mlflow_points(uri)) == EXPECTED


def test_mlflow_has_the_parameters_also_when_the_first_try_breaks_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = f"file:{tmp_path}/mlruns"
    recipe, (run, _) = recipe_of(tmp_path, "mlflow", **{"mlflow.uri": uri}), faulty()
    write_steps(run, 1, range(1, 3), 2.0)
    whole, batches = mlflow.MlflowClient.log_batch, []

    def breaks(*args: Any, **more: Any) -> Any:
        batches.append(more)
        if len(batches) == 2:
            raise ConnectionError("the server went away")
        return whole(*args, **more)

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", breaks)
    monkeypatch.setattr("trainer.tracking.mlflow._PARAMETERS_AT_ONCE", 20)
    mirror = Mirror("mlflow", recipe, run)
    mirror._try()
    assert mirror.pump() == 2
    mirror.end("succeeded")
    points = [(step, value) for _, step, value in mlflow_points(uri)]
    assert points == [(1, 2.0), (2, 2.0)]
    told = [param.key for batch in batches for param in batch.get("params", [])]
    assert told[20:40] == told[40:60], "what was refused is logged, and nothing else again"


def test_an_mlflow_server_that_is_away_is_one_warning(
    tmp_path: Path, port: int, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("mlflow")
    recipe, (run, _) = recipe_of(tmp_path, "mlflow", **{"mlflow.uri": f"http://127.0.0.1:{port}"}), faulty()
    write_steps(run, 1, range(1, 3), 2.0)
    with tracked(recipe, run):
        pass
    (said,) = [r.getMessage() for r in caplog.records if r.levelno >= 30]
    assert said.startswith("the tracker mlflow fails, and training continues without it; it is tried again: ")


def test_mlflow_wants_to_know_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    with pytest.raises(InputError, match=r"give mlflow.uri, or set MLFLOW_TRACKING_URI"):
        check_trackers(recipe_of(tmp_path, "mlflow"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:there")
    check_trackers(recipe_of(tmp_path, "mlflow"))
    monkeypatch.setattr("trainer.tracking.mlflow.find_spec", lambda library: None)
    with pytest.raises(InputError, match="pip install sqlalchemy alembic"):
        check_trackers(recipe_of(tmp_path, "mlflow", **{"mlflow.uri": "sqlite:///there.db"}))


@pytest.fixture
def port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        number = taken.getsockname()[1]
    return number


def asked(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        lines = [line for line in answer.read().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_prometheus_is_told_where_the_run_stands(tmp_path: Path, port: int) -> None:
    settings = {"prometheus.port": port, "prometheus.address": "127.0.0.1"}
    recipe, (run, _) = recipe_of(tmp_path, "prometheus", **settings), faulty()
    write_steps(run, 1, range(1, 7), 2.0)
    write_steps(run, 2, range(5, STEPS + 1), 1.0)
    mirror = Mirror("prometheus", recipe, run)
    mirror.pump()
    label = '{run="tracked"}'
    got = asked(port)
    assert {name: got[f"muster_{name}{label}"] for name in ("step", "total_steps", "loss", "eval_loss", "attempt")} == {
        "step": 8.0, "total_steps": 8.0, "loss": 1.0, "eval_loss": 2.0, "attempt": 2.0,
    }  # fmt: skip
    assert got[f"muster_tokens_total{label}"] == 80.0, "steps that were trained twice count once"
    mirror.end("succeeded")
    with pytest.raises(urllib.error.URLError):
        asked(port)


@pytest.mark.parametrize("name", TRACKERS.names())
def test_a_library_that_is_missing_is_found_before_the_run(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda library: None)
    with pytest.raises(InputError, match=f"pip install {TRACKERS[name].package},"):
        check_trackers(recipe_of(tmp_path, name))


@pytest.mark.parametrize("error", [OSError("libssl.so is missing"), AttributeError("no Settings"), SystemExit(1)])
def test_a_library_that_is_broken_is_a_mistake_in_the_recipe(
    tmp_path: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(name: str) -> None:
        raise error

    monkeypatch.setattr(TRACKERS, "load", load)
    with pytest.raises(
        InputError, match=f"tracking names tensorboard, which cannot be used here: {type(error).__name__}"
    ):
        check_trackers(recipe_of(tmp_path, "tensorboard"))


def test_a_tracker_follows_real_training_and_its_resume(tmp_path: Path, tiny_model: Path) -> None:
    pytest.importorskip("tensorboardX")
    write_pairs(tmp_path / "data" / "a.jsonl", 40)
    changes = {"tracking": ["tensorboard"], "training.steps": 6, "checkpoint.every_steps": 2, "data.ledger": False}
    for stop_after in (3, None):
        recipe = small_recipe("real", tiny_model, tmp_path, **changes, **{"training.stop_after": stop_after})
        with tracked(recipe, run_of(recipe)):
            train_here(recipe)
    told = once(tensorboard_points(open_storage(recipe.run_uri).child(layout.TENSORBOARD)))
    rows = {("train/loss", r["step"]): r["loss"] for r in read_rows(run_of(recipe), layout.METRICS) if "loss" in r}
    assert told == pytest.approx(rows)
    assert len(rows) == 6
