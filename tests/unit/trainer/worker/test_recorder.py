"""What a rank writes down, and the card beside the final adapter."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.storage.doubles import faulty
from tests.support.models import packed
from tests.support.training import small_recipe, train_here, write_pairs
from trainer.checkpoint import CommitRecord, commit
from trainer.checkpoint.model_card import model_card
from trainer.distributed.world import World
from trainer.errors import StorageError
from trainer.recipe import Recipe, loads
from trainer.run import layout
from trainer.run.events import BrokenEvent, StartEvent
from trainer.run.jsonl import read_rows
from trainer.run.metrics import EvalMetrics, StepMetrics
from trainer.storage import Storage
from trainer.worker import checkpointer
from trainer.worker.recorder import Recorder

Make = Callable[..., Recipe]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return lambda **changes: small_recipe("noted", Path("org/base"), tmp_path, **changes)


def world(rank: int) -> World:
    return World(rank, 2, rank, torch.device("cpu"))


def trained(step: int, loss: float) -> StepMetrics:
    return StepMetrics.from_row({"step": step, "loss": loss, "stall_s": 0.1, "rank_s": [0.5], "compile_s": 2.0})


def test_rank_0_writes_metrics_and_events_and_every_rank_its_ledger(make: Make) -> None:
    run, _ = faulty()
    for rank in (0, 1):
        recorder = Recorder(run, make(), world(rank), attempt=3)
        recorder.event(StartEvent(step=0))
        recorder.metrics(trained(1, 2.5))
        batch = packed([[9], [12]])
        batch.index = rank
        recorder.log_ledger(1, [batch])
        recorder.close()
    (row,) = read_rows(run, layout.METRICS)
    assert abs(row.pop("time") - time.time()) < 60
    assert {name: value for name, value in row.items() if value is not None} == {
        "attempt": 3, "step": 1, "loss": 2.5, "stall_s": 0.1, "rank_s": [0.5], "compile_s": 2.0,
    }  # fmt: skip
    assert [(e["event"], e["attempt"], e["step"]) for e in read_rows(run, layout.EVENTS)] == [("start", 3, 0)]
    rows = sorted(read_rows(run, layout.LEDGER), key=lambda row: int(row["rank"]))
    assert rows == [
        {
            "attempt": 3, "step": 1, "micro_batch": rank, "rank": rank, "samples": ["0:0/0", "0:0/1"],
            "tokens": 21, "target_tokens": 15,
        }
        for rank in (0, 1)
    ]  # fmt: skip


@pytest.mark.parametrize(("insist", "stored"), [(True, 1), (False, 0)])
def test_an_event_of_another_rank_is_written_again_if_it_may_take_the_time(
    make: Make, insist: bool, stored: int
) -> None:
    run, backend = faulty()
    recorder = Recorder(run, make(), world(1), attempt=3)
    failing = [StorageError("away")]

    def once_away(verb: str, path: str) -> None:
        if verb == "put" and failing:
            raise failing.pop()

    backend.before = once_away
    recorder.event_from_any_rank(BrokenEvent(seen={"0": "step 3, backward"}), insist=insist)
    assert len(read_rows(run, layout.EVENTS)) == stored
    assert not failing


def test_there_is_no_ledger_unless_the_recipe_wants_one(make: Make) -> None:
    run, _ = faulty()
    recorder = Recorder(run, make(**{"data.ledger": False}), world(0), attempt=1)
    recorder.log_ledger(1, [packed([[9]])])
    recorder.settle_ledger()
    recorder.close()
    assert run.list() == []


def test_facts_are_the_newest_of_every_metric(make: Make) -> None:
    run, _ = faulty()
    recorder = Recorder(run, make(), world(1), attempt=1)
    recorder.metrics(trained(1, 2.5))
    recorder.metrics(EvalMetrics.from_row({"step": 1, "eval_loss": 2.0, "eval_accuracy": 0.5, "compile_s": 1.0}))
    recorder.metrics(trained(2, 1.5))
    known = {name: value for name, value in recorder.last_metrics.items() if value is not None}
    assert known == {"step": 2, "loss": 1.5, "eval_loss": 2.0, "eval_accuracy": 0.5}, "nothing of the machines"


def test_a_resumed_run_keeps_the_last_evaluation_until_the_next(make: Make) -> None:
    """A status looks for it in the newest checkpoint."""
    run, _ = faulty()
    recorder = Recorder(run, make(), world(0), attempt=2)
    recorder.resume_from({"step": 8, "loss": 1.0, "eval_loss": 2.0, "eval_s": 0.5})
    recorder.metrics(trained(9, 0.9))
    known = {name: value for name, value in recorder.last_metrics.items() if value is not None}
    assert known == {"step": 9, "loss": 0.9, "eval_loss": 2.0, "eval_s": 0.5}
    recorder.close()


def test_one_record_that_cannot_be_stored_does_not_lose_the_others(make: Make) -> None:
    run, backend = faulty()
    recorder = Recorder(run, make(), world(0), attempt=1)
    refused: list[Any] = []

    def refuse(verb: str, path: str) -> None:
        if verb == "put" and "/metrics/" in path:
            refused.append(path)
            raise StorageError("the metrics are refused")

    backend.before = refuse
    recorder.metrics(trained(1, 2.5))
    recorder.log_ledger(1, [packed([[9]])])
    with pytest.raises(StorageError, match="the metrics are refused"):
        recorder.close()
    assert refused
    assert len(read_rows(run, layout.LEDGER)) == 1


FACTS = {"step": 40, "samples": 12345, "loss": 1.23456, "eval_loss": 2.0, "world_size": 2, "lr": 0.1}
PROVENANCE = {"muster": "1.2", "packages": {"torch": "2.13", "ray": None}}


def card_of(recipe: Recipe) -> tuple[dict[str, Any], str]:
    card = model_card(recipe, {"facts": FACTS}, PROVENANCE)
    _, front, body = card.split("---\n", 2)
    found: dict[str, Any] = yaml.safe_load(front)
    return found, body


def test_the_card_says_what_it_is_how_it_was_made_and_how_to_load_it(make: Make) -> None:
    front, body = card_of(make(**{"model.quantization": "nf4", "adapter.method": "dora"}))
    assert front["base_model"] == "org/base"
    assert front["library_name"] == "peft"
    assert "dora" in front["tags"]
    assert "A dora adapter of rank 4 for `org/base`, trained on the base in nf4." in body
    for line in (
        "| steps | 40 |",
        "| samples | 12,345 |",
        "| loss of the last step | 1.2346 |",
        "| evaluation loss | 2.0000 |",
    ):
        assert line in body
    assert "PeftModel.from_pretrained(base" in body
    assert "Versions: muster 1.2, torch 2.13\n" in body
    dumped = body.split("```yaml\n")[1].split("```")[0]
    assert loads(dumped, "card") == make(**{"model.quantization": "nf4", "adapter.method": "dora"})


def test_the_card_of_a_full_model_speaks_of_no_adapter(make: Make) -> None:
    front, body = card_of(make(**{"adapter.method": "none"}))
    assert front["library_name"] == "transformers"
    assert front["tags"] == ["muster", "sft"]
    assert "Full fine-tuning for `org/base`." in body
    assert "peft" not in body.split("## Recipe")[0]


@pytest.mark.parametrize("method", ["lora", "none"])
def test_the_code_on_the_card_is_python(make: Make, method: str) -> None:
    _, body = card_of(make(**{"adapter.method": method}))
    compile(body.split("```python\n")[1].split("```")[0], "card", "exec")


def test_what_is_committed_has_its_metrics_stored(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver and its workers may be killed right after a commit, whose steps are not trained again."""
    write_pairs(tmp_path / "data" / "a.jsonl", 30)
    changes = {"data.eval_fraction": 0.2, "training.eval_every": 2, "checkpoint.every_steps": 2}
    recipe = small_recipe("stored", tiny_model, tmp_path, **changes)
    seen: list[tuple[int, set[int], set[int]]] = []

    def committed(run: Storage, record: CommitRecord) -> None:
        rows = read_rows(run, layout.METRICS)
        trained, evaluated = ({row["step"] for row in rows if name in row} for name in ("loss", "eval_loss"))
        seen.append((record.step, trained, evaluated))
        commit(run, record)

    monkeypatch.setattr(checkpointer, "commit", committed)
    assert train_here(recipe) == "succeeded"
    assert [step for step, _, _ in seen][-1] == 10
    for step, trained, evaluated in seen:
        assert trained >= set(range(1, step + 1))
        assert evaluated >= set(range(2, step + 1, 2))
