"""The examination, stage by stage.

Each stage has a time limit, and all of them together have `WHOLE_S`. A probe that does not answer in time is reported,
and the examination continues without it.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from launcher.capacity import NO_SERVERS, Servers
from launcher.doctor.collectives import Calls, measure_groups
from launcher.doctor.nodes import dial, read_nodes
from launcher.doctor.observations import (
    Clock,
    Examination,
    Inputs,
    NodeObservation,
    Pair,
    RankObservation,
    Room,
    Silent,
    Wanted,
)
from launcher.doctor.pairing import Meeting, representatives, rounds
from launcher.doctor.probe_placement import Placed, place
from launcher.doctor.probes import Computed, PairTimes, RoundTrip
from launcher.raytrain.environment import Environment
from launcher.raytrain.nodes import nodes_of_cluster
from trainer.recipe import Recipe
from trainer.recipe.strategies import Mesh

K = TypeVar("K")
WHOLE_S = 52.0
BEGIN_S, CLOCK_S, PAIRS_S, COMPUTE_S, STORAGE_S, INPUTS_S = 25.0, 3.0, 14.0, 12.0, 10.0, 20.0
STORE_S = 6.0
PAIR_S = 6.0
STORAGE_RETRY_S = 4.0
PINGS = 5
FIRST_HOSTS = 2
NO_ANSWER = "no answer"
GIVEN_UP_AFTER = 2
"""A rank with this many failed pairs and no successful one is not paired again: each failure takes seconds."""

Say = Callable[[str], None]


class Time:
    """The time budget of the examination, which starts when this object is created."""

    def __init__(self, whole_s: float = WHOLE_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._begin, self._whole_s = clock, clock(), whole_s

    @property
    def passed_s(self) -> float:
        return self._clock() - self._begin

    def within(self, limit_s: float) -> float:
        """Returns ``limit_s``, or the rest of the budget if that is less."""
        return max(0.0, min(limit_s, self._whole_s - self.passed_s))


class Stages:
    """Runs all stages and writes their results into ``examination``. ``say`` receives a line per stage."""

    def __init__(self, recipe: Recipe | None, examination: Examination, left: Time, say: Say) -> None:
        self.recipe, self.examination, self._left, self._say = recipe, examination, left, say
        self._actors: dict[int, Any] = {}
        self._ranks: dict[int, RankObservation] = {}

    def run(self) -> None:
        self._say("looking at the nodes")
        nodes, ports = read_nodes()
        self.examination.nodes = nodes
        self._say("starting probes")
        servers = Servers.of(self.recipe) if self.recipe else NO_SERVERS
        placed = place(self.recipe.resources if self.recipe else None, nodes, nodes_of_cluster(), servers)
        self.examination.placement_error = placed.error
        try:
            self._begin(placed)
            self._clocks()
            self._say("all-reduce between hosts")
            self._pairs()
            self._compute()
            if self.recipe is not None and not placed.whole:
                self._groups(self.recipe, len(placed.actors))
            if self.recipe is not None:
                self._say("storage, model and data")
                self._storage(self.recipe)
                self._inputs(self.recipe)
            self._last_look(nodes, ports)
        finally:
            placed.remove()
            self.examination.ranks = [self._ranks[rank] for rank in sorted(self._ranks)]

    def _begin(self, placed: Placed) -> None:
        variables = self.recipe.cluster.env if self.recipe else {}
        environment, folders = Environment.current(variables), self._folders()
        calls = {i: actor.begin.remote(environment, folders) for i, actor in enumerate(placed.actors)}
        answers, errors = gather(calls, self._left.within(BEGIN_S))
        for i, (facts, gpu_ids, auth_mode, settings) in sorted(answers.items()):
            node = placed.nodes[i]
            self._actors[i] = placed.actors[i]
            self._ranks[i] = RankObservation(i, node.node_id, node.address, gpu_ids, facts, auth_mode, settings)
        for i, error in errors.items():
            node = placed.nodes[i]
            self.examination.silent.append(Silent(node.host, node.address, "starting a probe", error))

    def _folders(self) -> list[tuple[str, str]]:
        from trainer.model.files.fetch import cache_folder
        from trainer.storage import local_path

        folders = [("model cache", str(cache_folder()))]
        if self.recipe is not None and (local := local_path(self.recipe.storage)) is not None:
            folders.append(("storage", local))
        return folders

    def _clocks(self) -> None:
        deadline_s = self._left.passed_s + self._left.within(CLOCK_S)
        for i, actor in self._actors.items():
            best: Clock | None = None
            for _ in range(PINGS):
                before = time.time()
                answers, _ = gather({0: actor.clock.remote()}, max(0.0, deadline_s - self._left.passed_s))
                after = time.time()
                if not answers:
                    break
                ping = Clock(answers[0] - (before + after) / 2, (after - before) / 2)
                best = ping if best is None or ping.uncertainty_s < best.uncertainty_s else best
            self._ranks[i].clock = best

    def _pairs(self) -> None:
        order = sorted(self._ranks)
        chosen = [order[k] for k in representatives([self._ranks[i].address for i in order])]
        if len(chosen) < 2:
            return
        end_s = self._left.passed_s + self._left.within(PAIRS_S)
        calls = {i: self._actors[i].open_store.remote(self._ranks[i].address) for i in chosen}
        ports, errors = gather(calls, self._left.within(STORE_S))
        for i, error in errors.items():
            found = self._ranks[i]
            self._actors.pop(i, None)  # an actor answers in order, so later calls would wait for this one
            self.examination.silent.append(Silent(found.host, found.address, "opening a port", error))
        for meetings in rounds(chosen):
            left_s = end_s - self._left.passed_s
            fit = [m for m in meetings if left_s > PAIR_S and all(i in ports and not self._given_up(i) for i in m)]
            self.examination.pairs += [Pair(m) for m in meetings if m not in fit]
            self._meet(fit, ports)

    def _meet(self, meetings: Sequence[Meeting], ports: Mapping[int, int]) -> None:
        calls: dict[tuple[Meeting, int], Any] = {}
        gpu = bool(self.recipe and self.recipe.resources.gpus_per_worker)
        for a, b in meetings:
            name, at = f"{a}-{b}", (self._ranks[a].address, ports[a])
            calls[(a, b), 0] = self._actors[a].meet.remote(name, None, gpu, PAIR_S / 2)
            calls[(a, b), 1] = self._actors[b].meet.remote(name, at, gpu, PAIR_S / 2)
        answers, errors = gather(calls, self._left.within(PAIR_S * 1.5))
        for m in meetings:
            sides = [answers.get((m, side)) or PairTimes(error=errors[m, side], stage="answer") for side in (0, 1)]
            self.examination.pairs.append(Pair(m, worse(sides[0], sides[1])))

    def _given_up(self, rank: int) -> bool:
        met = [pair for pair in self.examination.pairs if rank in pair.ranks and pair.times is not None]
        return len(met) >= GIVEN_UP_AFTER and all(pair.failed for pair in met)

    def _groups(self, recipe: Recipe, workers: int) -> None:
        """Measures the groups of the mesh that a run with as many of these workers as possible would have."""
        workers -= workers % recipe.strategy.context_parallel
        if workers < 2:
            return
        self._say("all-reduce and all-gather of the recipe's ranks")
        mesh = self.examination.mesh = Mesh.of(recipe, workers)

        def call(calls: Calls, timeout_s: float) -> tuple[dict[int, Any], dict[int, str]]:
            made = {
                rank: getattr(self._actors[rank], method).remote(*arguments)
                for rank, (method, arguments) in calls.items()
                if rank in self._actors
            }
            answers, errors = gather(made, timeout_s)
            for rank in errors:
                self._actors.pop(rank)  # an actor answers in order, so later calls would wait for this one
            return answers, errors | dict.fromkeys(calls.keys() - made.keys(), NO_ANSWER)

        addresses = {rank: found.address for rank, found in self._ranks.items() if rank < mesh.ranks}
        gpu = recipe.resources.gpus_per_worker > 0
        self.examination.groups = measure_groups(mesh, addresses, call, self._left.within, gpu=gpu)

    def _compute(self) -> None:
        gpus = {i: rank.facts.gpus for i, rank in self._ranks.items() if rank.facts.gpus}
        if not gpus:
            return
        self._say("a matrix product on each GPU")
        calls = {i: self._actors[i].compute.remote(found) for i, found in gpus.items()}
        answers, errors = gather(calls, self._left.within(COMPUTE_S))
        for i, computed in answers.items():
            self._ranks[i].computed = computed
        for i, error in errors.items():
            self._ranks[i].computed = tuple(Computed(gpu.uuid, error=error) for gpu in gpus[i])
            self._actors.pop(i)

    def _storage(self, recipe: Recipe) -> None:
        """Tries the storage on one rank per host: first on one host, then on the others, which look for its beacon.

        If the first host fails, a second one is tried, since a single host may lack credentials or a connection. If
        both fail, the other hosts are not tried.
        """
        left, beacon = self._one_of_each_host(), f".probe-{uuid.uuid4().hex}"
        for _ in range(FIRST_HOSTS):
            if not left:
                return
            first, left = left[0], left[1:]
            if self._round_trips(recipe, beacon, [first], first=True):
                self._round_trips(recipe, beacon, left, first=False)
                put_out = {0: self._actors[first].put_out.remote(recipe.storage, beacon, STORAGE_RETRY_S)}
                gather(put_out, self._left.within(3))
                return

    def _round_trips(self, recipe: Recipe, beacon: str, ranks: Sequence[int], *, first: bool) -> bool:
        """Tries the storage on ``ranks``; returns True if no rank had an error."""
        calls = {
            i: self._actors[i].storage.remote(recipe.storage, beacon, first=first, deadline_s=STORAGE_RETRY_S)
            for i in ranks
        }
        answers, errors = gather(calls, self._left.within(STORAGE_S))
        for i, found in answers.items():
            self._ranks[i].storage = found
        for i, error in errors.items():
            self._ranks[i].storage = RoundTrip(recipe.storage, error=error)
            self._actors.pop(i)  # an actor answers in order, so later calls would wait for this one
        trips = [self._ranks[i].storage for i in ranks]
        return not any(trip is None or trip.error for trip in trips)

    def _inputs(self, recipe: Recipe) -> None:
        """Reads the model on every host, checks the inputs on one rank and plans on one, all in parallel."""
        firsts = self._one_of_each_host()
        if not firsts:
            return
        calls: dict[tuple[str, int], Any] = {
            ("model", i): self._actors[i].read_model.remote(recipe.model) for i in firsts
        }
        # On another host than the inputs, if there is one: both spend seconds on importing libraries.
        count = recipe.resources.min_workers if self.examination.placement_error else len(self._ranks)
        calls["plan", firsts[-1]] = self._actors[firsts[-1]].plan.remote(recipe, count)
        calls["inputs", firsts[0]] = self._actors[firsts[0]].inputs.remote(recipe)
        answers, errors = gather(calls, self._left.within(INPUTS_S))
        self.examination.inputs = Inputs(late=True)
        for (what, i), found in answers.items():
            self._take(what, i, found)
        for (what, i), error in errors.items():
            if what == "model":
                self._ranks[i].model_error = error
            elif what == "plan":
                self.examination.plan_error = error
            elif not error.startswith(NO_ANSWER):
                self.examination.inputs = Inputs(error)

    def _take(self, what: str, rank: int, found: Any) -> None:
        if what == "model":
            self._ranks[rank].model_error = found
        elif what == "inputs":
            self.examination.inputs = found
        elif isinstance(found, Room):
            self.examination.room = found
        else:
            self.examination.plan_error = found

    def _one_of_each_host(self) -> list[int]:
        found: dict[str, int] = {}
        for i in sorted(self._actors):
            found.setdefault(self._ranks[i].address, i)
        return list(found.values())

    def _last_look(self, nodes: Sequence[NodeObservation], ports: Mapping[str, int]) -> None:
        """Dials each node again: a host may have been cut off after its last answer."""
        known = {silent.address for silent in self.examination.silent}
        before = [node for node in nodes if node.answers and node.address not in known]
        for node in dial(before, ports):
            if not node.answers:
                self.examination.silent.append(Silent(node.host, node.address, "being looked at again", node.reason))


def gather(calls: Mapping[K, Any], timeout_s: float) -> tuple[dict[K, Any], dict[K, str]]:
    """Returns answers and errors by the keys of ``calls``; no answer within ``timeout_s`` is an error."""
    import ray

    if not calls:
        return {}, {}
    began = time.monotonic()
    ray.wait(list(calls.values()), num_returns=len(calls), timeout=timeout_s)
    answers: dict[K, Any] = {}
    errors: dict[K, str] = {}
    for key, reference in calls.items():
        try:
            answers[key] = ray.get(reference, timeout=0.05)
        except ray.exceptions.GetTimeoutError:
            errors[key] = f"{NO_ANSWER} within {time.monotonic() - began:.0f} s"
        except ray.exceptions.RayTaskError as error:
            errors[key] = _line(error.cause or error)
        except ray.exceptions.RayError as error:
            errors[key] = _line(error)
    return answers, errors


def _line(error: BaseException) -> str:
    """Returns Ray's explanation in one line, without the traces in it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line and "ray::" not in line]
    text = errors[-1] if errors else lines[0] if lines else ""
    return f"{type(error).__name__}: {text}"[:300]


def worse(first: PairTimes, second: PairTimes) -> PairTimes:
    """Returns the worse of the two ranks' results: a failure rather than none, and the earlier of two failures."""
    order = ("connect", "store", "answer", "gloo", "nccl")
    failed = [times for times in (second, first) if times.error is not None]
    if not failed:
        return first
    earliest = min(failed, key=lambda times: order.index(times.stage or "answer"))
    return replace(earliest, timings=min((first.timings, second.timings), key=len))


def wanted(recipe: Recipe) -> Wanted:
    from trainer.storage import local_path

    return Wanted(
        name=recipe.name,
        storage=recipe.storage,
        local_storage=local_path(recipe.storage) is not None,
        gpus_per_worker=recipe.resources.gpus_per_worker,
        min_workers=recipe.resources.min_workers,
        keep_last=recipe.checkpoint.keep_last,
    )
