"""Replicas and context parallelism: every shape of the mesh trains like one process, and a run moves between shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from safetensors import safe_open
from torch.multiprocessing import ProcessRaisedException

from tests.support.models import SMALL_SHAPE, random_model
from tests.support.nights import few_by_day
from tests.support.ranks import run_ranks
from tests.support.traffic import CountedTraffic
from tests.support.training import ledger, losses, run_of, small_recipe, train_in_processes, train_rank, write_pairs
from trainer.recipe import Recipe
from trainer.run import layout
from trainer.run.events import TextsEvent
from trainer.run.jsonl import read_rows

SHAPES: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "replicas": (4, {"strategy": {"kind": "fsdp", "replicas": 2}}),
    "context-ddp": (2, {"strategy": {"kind": "ddp", "context_parallel": 2}}),
    "context-fsdp": (2, {"strategy": {"kind": "fsdp", "context_parallel": 2}}),
    "replicas-context": (4, {"strategy": {"kind": "fsdp", "replicas": 2, "context_parallel": 2}}),
    # More ranks than heads of keys and values, of which the model has two.
    "context-of-four": (4, {"strategy": {"kind": "ddp", "context_parallel": 4}}),
}
MODELS: dict[str, dict[str, Any]] = {
    "lora": {},
    "qlora": {"model.quantization": "nf4"},
    "checkpointing": {"training.gradient_checkpointing": True},
    "full": {"adapter": {"method": "none"}, "optimizer.lr": 1e-3},
}
TOLERANCE = 1e-5
EVERY = [(model, shape) for model in MODELS for shape in SHAPES if shape != "one"]
"""All of them for the night; by day every shape once, and every model once."""
BY_DAY = [
    ("lora", "replicas"),
    ("lora", "replicas-context"),
    ("lora", "context-of-four"),
    ("qlora", "replicas-context"),
    ("checkpointing", "context-fsdp"),
    ("full", "context-ddp"),
]
CELLS = [pytest.param(*cell, marks=[] if cell in BY_DAY else [pytest.mark.night]) for cell in EVERY]


def _recipe(model: str, shape: str, tiny_model: Path, folder: Path, **more: Any) -> Recipe:
    ranks, changes = SHAPES[shape]
    dropout = {} if model == "full" else {"adapter.dropout": 0.0}
    return small_recipe(
        f"{shape}-{model}",
        tiny_model,
        folder,
        **dropout,
        **MODELS[model],
        **changes,
        **{"resources.workers": ranks},
        **more,
    )


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Recipe]:
    folder = tmp_path_factory.mktemp("mesh")
    write_pairs(folder / "data" / "a.jsonl", 90)
    by_night = any(item.get_closest_marker("night") for item in request.session.items)
    cells = [*((model, "one") for model in MODELS), *(EVERY if by_night else BY_DAY)]
    made = {cell: _recipe(*cell, tiny_model, folder) for cell in cells}
    for ranks in (1, 2, 4):
        train_in_processes([made[m, s] for m, s in made if SHAPES[s][0] == ranks], ranks)
    return made


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("model", "shape"), CELLS)
def test_trains_like_one_process(runs: dict[tuple[str, str], Recipe], model: str, shape: str) -> None:
    one, many = runs[model, "one"], runs[model, shape]
    want, got = losses(one), losses(many)
    assert list(want) == list(got) == list(range(1, 11))
    assert want[10] < want[1], "it learns"
    worst = max(abs(got[s] - want[s]) / want[s] for s in want)
    assert worst <= TOLERANCE, f"{worst:.1e}"
    assert ledger(many) == ledger(one)


@pytest.mark.parametrize("task", few_by_day(["dpo", "reward", "kto", "orpo", "simpo"], 1))
def test_preferences_are_learned_from_parts_of_the_texts(task: str, tiny_model: Path, tmp_path: Path) -> None:
    """With an odd number of pairs and rows that are no multiple of two tokens long."""
    rows = [
        {
            "prompt": f"Q{i}: what now?",
            "chosen": f" it rains, and {i} ferries wait" * (1 + i % 3),
            "rejected": f" {i} no",
        }
        for i in range(40)
    ]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [{"path": f"{tmp_path}/data/*.jsonl", "format": "preference"}]
    found = []
    for shape in ("one", "context-ddp", "replicas-context"):
        changes = {"task": task, "data.train": sources, "data.packing": False, "training.global_batch": 5}
        recipe = _recipe("lora", shape, tiny_model, tmp_path, **changes)
        train_in_processes([recipe], SHAPES[shape][0])
        found.append((losses(recipe), ledger(recipe), _metrics(recipe)))
    for got, samples, metrics in found[1:]:
        assert samples == found[0][1]
        assert got == pytest.approx(found[0][0], rel=TOLERANCE)
        assert metrics == pytest.approx(found[0][2], rel=1e-3)


@pytest.mark.night
@pytest.mark.parametrize("shape", ["context-ddp", "context-fsdp"])
def test_noise_on_parts_of_texts_repeats(shape: str, tiny_model: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path / "data" / "a.jsonl", 90)
    runs = [
        _recipe("lora", shape, tiny_model, tmp_path, **{"sft.neftune_alpha": alpha}).model_copy(update={"name": name})
        for name, alpha in (("noisy", 5.0), ("again", 5.0), ("plain", None))
    ]
    train_in_processes(runs, SHAPES[shape][0])
    noisy, again, plain = (losses(run) for run in runs)
    assert noisy == again
    assert noisy != plain
    assert noisy == pytest.approx(plain, rel=0.05)


def _metrics(recipe: Recipe) -> list[float]:
    return [row["reward_margin"] for row in read_rows(run_of(recipe), layout.METRICS) if "loss" in row]


def test_evaluations_and_samples_are_those_of_one_process(tiny_model: Path, tmp_path: Path) -> None:
    """The parts of a group count once; texts are generated with the model's own attention, and training goes on."""
    write_pairs(tmp_path / "data" / "a.jsonl", 90)
    held_out = [{"path": f"{tmp_path}/data/*.jsonl", "format": "completion"}]
    found = []
    for shape in ("one", "context-fsdp"):
        changes = {"data.eval": held_out, "training.eval_every": 4, "samples": {"count": 2, "max_new_tokens": 8}}
        recipe = _recipe("lora", shape, tiny_model, tmp_path, **changes)
        train_in_processes([recipe], SHAPES[shape][0])
        rows = read_rows(run_of(recipe), layout.METRICS)
        texts = [e["texts"] for e in read_rows(run_of(recipe), layout.EVENTS) if e["event"] == TextsEvent.kind]
        found.append((losses(recipe), [r for r in rows if "eval_loss" in r], texts))
    (want, evaluated, texts), (got, evaluated_together, texts_together) = found
    assert got == pytest.approx(want, rel=TOLERANCE)
    assert [r["step"] for r in evaluated] == [r["step"] for r in evaluated_together] == [4, 8, 10]
    for one, many in zip(evaluated, evaluated_together, strict=True):
        assert many["eval_loss"] == pytest.approx(one["eval_loss"], rel=TOLERANCE)
        assert many["eval_target_tokens"] == one["eval_target_tokens"]
    assert texts
    assert texts_together == texts


def test_windows_of_attention_hold_across_the_parts(tiny_model: Path, tmp_path: Path) -> None:
    """Packs of 64 tokens, of which each rank has 32, and windows of 12."""
    config = transformers.MistralConfig(**SMALL_SHAPE, sliding_window=12)
    model = random_model(config, tmp_path / "mistral", tiny_model)
    write_pairs(tmp_path / "data" / "a.jsonl", 90)
    found = []
    for shape in ("one", "context-ddp"):
        recipe = _recipe("lora", shape, model, tmp_path)
        train_in_processes([recipe], SHAPES[shape][0])
        found.append(losses(recipe))
    assert found[1] == pytest.approx(found[0], rel=TOLERANCE)


@pytest.mark.parametrize(
    ("config", "ranks", "words"),
    [
        (transformers.LlamaConfig(**SMALL_SHAPE), 3, "4 attention heads cannot be divided over 3 ranks"),
        (
            transformers.Lfm2Config(
                **SMALL_SHAPE, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False
            ),
            2,
            r"Lfm2ForCausalLM .*: the outputs of its head move by",
        ),
    ],
)
def test_a_model_whose_texts_cannot_be_divided_is_refused(
    config: Any, ranks: int, words: str, tiny_model: Path, tmp_path: Path
) -> None:
    model = random_model(config, tmp_path / "other", tiny_model)
    write_pairs(tmp_path / "data" / "a.jsonl", 90)
    shape = {"strategy": {"kind": "ddp", "context_parallel": ranks}, "resources.workers": ranks}
    recipe = small_recipe("refused", model, tmp_path, **{"data.packing": False, **shape})
    with pytest.raises(ProcessRaisedException, match=rf"context_parallel {ranks} does not work for .*{words}"):
        train_in_processes([recipe], ranks)


@pytest.mark.night
def test_a_run_moves_between_shapes(tiny_model: Path, tmp_path: Path) -> None:
    """With its optimizer state: forgetting the moments would show in the first step after a move."""
    write_pairs(tmp_path / "data" / "a.jsonl", 90)
    moves = ["replicas", "context-fsdp", "replicas-context", "context-ddp", "one"]
    for i, shape in enumerate(moves):
        ranks, changes = SHAPES[shape]
        stop = {} if shape == moves[-1] else {"training.stop_after": 2 * (i + 1)}
        more = {"adapter.dropout": 0.0, "resources.workers": ranks, **changes, **stop}
        train_in_processes([small_recipe("moving", tiny_model, tmp_path, **more)], ranks)
    staying = small_recipe("staying", tiny_model, tmp_path, **{"adapter.dropout": 0.0})
    train_in_processes([staying], 1)
    got = losses(small_recipe("moving", tiny_model, tmp_path))
    assert got == pytest.approx(losses(staying), rel=TOLERANCE)


def test_what_the_start_event_says(runs: dict[tuple[str, str], Recipe]) -> None:
    events = read_rows(run_of(runs["lora", "replicas-context"]), layout.EVENTS)
    start = next(e for e in events if e["event"] == "start")
    assert start["replica_nodes"] == [start["hosts"][:1]] * 2, "both are on this host"
    strategy = start["strategy"]
    assert strategy["mesh"] == {"replicas": 2, "shards": 1, "context": 2}
    shares, total = strategy["sharded_bytes"], strategy["total_bytes"]
    assert shares[:2] == shares[2:]
    assert sum(shares[:2]) == pytest.approx(total, rel=0.03)


def test_across_replicas_only_gradients_of_trained_parameters_are_sent(tiny_model: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path / "data" / "a.jsonl", 90)
    changes = {"training.steps": 3, "checkpoint.every_steps": 3}
    recipe = _recipe("lora", "replicas", tiny_model, tmp_path, **changes)
    run_ranks(_count_traffic, 4, recipe, tmp_path / "counted")
    per_rank = [json.loads((tmp_path / f"counted-{rank}.json").read_text()) for rank in range(4)]
    for counted in per_rank:
        # Each rank has half of a replica's parameters, and sends its gradients once per step.
        assert 0.95 * counted["trainable"] / 2 <= counted["sent"] / 3 <= 1.1 * counted["trainable"] / 2


def _count_traffic(rank: int, recipe: Recipe, counted: Path) -> None:
    """Writes the bytes that this rank sends to the rank of the other replica, and those of the trained parameters."""
    with CountedTraffic() as traffic:
        train_rank(rank, [recipe])
    (file,) = Path(recipe.storage, recipe.name, "adapter").glob("adapter_model.safetensors")
    with safe_open(file, "pt") as tensors:
        trainable = sum(4 * tensors.get_tensor(key).numel() for key in tensors.keys())  # noqa: SIM118
    sent = traffic.sent[rank % 2, rank % 2 + 2]
    Path(f"{counted}-{rank}.json").write_text(json.dumps({"sent": sent, "trainable": trainable}))
