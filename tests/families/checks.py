"""The checks of one architecture, each of which runs in a process that may crash or hang: what was found is written to
``row.json`` as soon as it is known."""

from __future__ import annotations

import json
import logging
import math
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tests.families import plain
from tests.families.bases import NotMade, make_base, write_texts
from tests.support.looping import Bench, bench
from tests.support.training import small_recipe
from trainer.errors import CorruptObject, InputError, UsageError
from trainer.recipe import Recipe

STEPS = 3
TOLERANCE, SHARDED_TOLERANCE, GRADIENT_TOLERANCE = 2e-4, 1e-5, 1e-4
"""The largest difference of losses from the plain loop's; relative, from one rank's with the same code; the norm of the
difference of a gradient, relative to its norm."""
CPU_S = 300
"""Limit of processor time of a process; a few seconds are usual."""
LONGEST_REASON = 500
ALONE = ("plain", "gradients", "reload", "merge", "nf4")
SHARDED = ("fsdp", "nf4_fsdp")
OK, ENDED = "ok", "fault: the process ended in it"


@dataclass
class Trained:
    """What a short training gave. ``lacking``: trained parameters that never had a gradient; ``learned``: the loss of
    the trained model; ``gradients``: those of the first step, by their saved names."""

    losses: list[float]
    learned: float
    attention: str
    lacking: list[str]
    gradients: dict[str, torch.Tensor]
    texts: list[plain.Text]
    warnings: list[str]
    bytes_read: list[int]


class Difference(Exception):
    """Two ways to the same numbers gave different ones."""


def alone(rank: int, model_type: str, folder: Path) -> None:
    """Makes the base, and makes the checks that take one process."""
    _bounded()
    row = Row(folder)
    row.set(model_type=model_type)
    try:
        row.set(**asdict(make_base(model_type, folder / "base")))
    except NotMade as error:
        row.set(not_made=_short(str(error), folder))
        return
    write_texts(folder)
    state: dict[str, Any] = {}
    with row.check("plain"):
        state["trained"] = trained = _train_packed(row, folder)
        row.set(packing=row["packing"], kernel=trained.attention, warnings=trained.warnings, losses=trained.losses)
        model = plain.load(folder / "base", folder / "first", trained=True)
        plain.set_adapter(model, folder / "first")
        row.set(**plain.coverage(model)._asdict())
        want, gradients = plain.train(model, trained.texts, STEPS, _recipe(folder, "x", packing=True).optimizer)
        if _distance(trained.losses, want) > TOLERANCE:
            row.set(choices_differ=_distance(trained.losses, want))
            _compare_first_step(trained, want[0], gradients)
    if "trained" not in state:
        return
    with row.check("gradients"):
        if trained.lacking:
            kinds = sorted({re.sub(r"\d+", "#", name) for name in trained.lacking})
            raise Difference(f"{len(trained.lacking)} trained parameters have no gradient: {', '.join(kinds[:3])}")
    with row.check("reload"):
        if told := next((text for text in trained.warnings if "leaves out" in text), None):
            raise InputError(told)
        got = plain.evaluated(plain.load(folder / "base", folder / "last"), trained.texts)
        _near(got, trained.learned, TOLERANCE, "the loss of plain peft with the saved adapter", "the trained model's")
        state["reloaded"] = got
    with row.check("merge"):
        _merge(folder)
        got = plain.evaluated(plain.load(folder / "merged"), trained.texts)
        _near(got, state.get("reloaded", got), TOLERANCE, "the merged model's loss", "that of base and adapter")
    with row.check("nf4"):
        quantised = _train(folder, "nf4", packing=row["packing"], quantization="nf4")
        row.set(nf4_losses=quantised.losses)
        if abs(quantised.losses[0] - trained.losses[0]) < 1e-6:
            raise Difference("the loss does not move: nothing is quantised")


def sharded(rank: int, folder: Path, name: str) -> None:
    """Makes a check that takes two ranks; both of them call it."""
    _bounded()
    row = Row(folder, writes=rank == 0)
    quantization = {"fsdp": "none", "nf4_fsdp": "nf4"}[name]
    with row.check(name):
        trained = _train(folder, name, packing=row["packing"], quantization=quantization, kind="fsdp")
        size = sum(file.stat().st_size for file in (folder / "base").glob("*.safetensors"))
        whole = max(trained.bytes_read) > 0.9 * size
        row.set(**{f"{name}_load": "whole" if whole else "by shard", f"{name}_warnings": trained.warnings})
        want = row["losses" if quantization == "none" else "nf4_losses"]
        for got, one in zip(trained.losses, want, strict=True):
            _near(got / one, 1.0, SHARDED_TOLERANCE, "the loss of fsdp on two ranks", "that of ddp on one")


class Row:
    """The row of an architecture, in a file that a process which dies leaves behind."""

    def __init__(self, folder: Path, *, writes: bool = True) -> None:
        self.folder, self.path, self.writes = folder, folder / "row.json", writes
        self.values: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def set(self, **values: Any) -> None:
        self.values.update(values)
        if self.writes:
            part = self.path.with_suffix(".part")
            part.write_text(json.dumps(self.values))
            part.replace(self.path)  # at once: another rank may read it

    @contextmanager
    def check(self, name: str) -> Iterator[None]:
        """Records how the block ended."""
        self.set(**{name: ENDED})
        try:
            yield
            found = OK
        except (UsageError, InputError) as error:
            found = f"refused: {_short(str(error), self.folder)}"
        except (Difference, CorruptObject) as error:
            found = f"fault: {_short(str(error), self.folder)}"
        except Exception as error:
            found = f"fault: {type(error).__name__}: {_short(str(error), self.folder)}"
        self.set(**{name: found})


def _train_packed(row: Row, folder: Path) -> Trained:
    row.set(packing=True)
    try:
        return _train(folder, "packed", keep=True, packing=True)
    except InputError as error:
        if "data.packing" not in str(error):
            raise
        row.set(packing=False, unpacked=_short(str(error), folder))
        return _train(folder, "unpacked", keep=True, packing=False)


def _recipe(folder: Path, name: str, *, packing: bool, quantization: str = "none", kind: str = "ddp") -> Recipe:
    changes: dict[str, Any] = {
        "adapter.dropout": 0.0,
        "data.sequence_length": 128,
        "data.packing": packing,
        "training": {"steps": STEPS, "global_batch": 64, "micro_batch": 2, "max_grad_norm": None},
        "model.quantization": quantization,
        "optimizer.lr": 1e-2,
        "strategy.kind": kind,
    }
    return small_recipe(name.replace("_", "-"), folder / "base", folder, **changes)


def _train(folder: Path, name: str, *, keep: bool = False, **how: Any) -> Trained:
    """Trains with muster's own parts and loop, in this process and those of its group. ``keep``: writes the adapter as
    it was before the first step into ``first``, and as it is after the last into ``last``."""
    recipe = _recipe(folder, name, **how)
    with _warnings(folder) as warnings, bench(recipe) as it:
        if keep:
            _write(it, folder / "first")
        watched = Gradients(it)
        it.run()
        if keep:
            _write(it, folder / "last")
        texts = plain.texts_of([batch for step, batches in it.fed if step == 1 for batch in batches])
        learned = plain.evaluated(it.model, texts) if keep else math.nan
        read = [load["bytes_read"] for load in it.parts.load]
        kernel, found = it.parts.attention, (watched.lacking(), watched.first)
        return Trained(it.losses(), learned, kernel, *found, texts, warnings, read)


class Gradients:
    """Looks at the gradients before each step of the optimizer, on a single rank. ``first``: those of the first."""

    def __init__(self, it: Bench) -> None:
        self.first: dict[str, torch.Tensor] = {}
        self._names = it.adapter.saved_names(it.model)
        self._trained, self._seen = it.strategy.trainable(), set[str]()
        self._alone = it.world.size == 1
        if self._alone:
            it.strategy.optimizer.register_step_pre_hook(self._look)

    def lacking(self) -> list[str]:
        """Returns the trained parameters for which no step had a gradient other than zero."""
        return sorted(self._trained.keys() - self._seen) if self._alone else []

    def _look(self, *_: Any) -> None:
        gradients = {n: p.grad for n, p in self._trained.items() if p.grad is not None and bool(p.grad.any())}
        if not self.first:
            self.first = {self._names[n]: gradient.clone() for n, gradient in gradients.items()}
        self._seen.update(gradients)


def _write(it: Bench, folder: Path) -> None:
    from trainer.checkpoint.artifact_info import ArtifactInfo

    folder.mkdir(exist_ok=True)
    snapshot = it.state.snapshot(0, {}, final=True)
    assert snapshot is not None
    it.state.write(snapshot, folder)
    ArtifactInfo.of(it.recipe).write(folder)


def _merge(folder: Path) -> None:
    from trainer.artifacts.locate import ArtifactRef
    from trainer.artifacts.merge import merge

    merge(ArtifactRef.of(None, [str(folder / "last")], None), folder / "merged")


def _compare_first_step(trained: Trained, loss: float, gradients: dict[str, torch.Tensor]) -> None:
    """Raises Difference when the first loss, or a gradient of the first step, is not that of the plain loop.

    After a step, the rounding of the gradients can decide which expert or which earlier token is chosen. So two loops
    that compute the same can have different losses from the second step on."""
    _near(trained.losses[0], loss, TOLERANCE, "the first loss", "the plain loop's")
    for name, want in gradients.items():
        got = trained.gradients.get(name, torch.zeros_like(want))
        moved = float((got - want).norm() / want.norm().clamp(min=1e-12))
        if not moved <= GRADIENT_TOLERANCE:
            raise Difference(f"the first gradient of {name} differs from the plain loop's by {moved:.1e} of its norm")


def _distance(some: list[float], others: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(some, others, strict=True))


def _near(got: float, want: float, tolerance: float, what: str, other: str) -> None:
    if not abs(got - want) <= tolerance:
        raise Difference(f"{what} differs from {other} by {abs(got - want):.1e}")


@contextmanager
def _warnings(folder: Path) -> Iterator[list[str]]:
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(_short(record.getMessage(), folder))  # type: ignore[method-assign]
    logger = logging.getLogger("trainer")
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)


def _short(text: str, folder: Path) -> str:
    """Returns the text in one line, without the names of temporary folders."""
    text = " ".join(text.replace(f"{folder}/", "").replace(str(folder), "").split())
    return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]}…"


def _bounded() -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S + 5))
