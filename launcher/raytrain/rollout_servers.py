"""The vLLM servers of an attempt (`rollout.vllm.servers`), on CPUs and GPUs of their own.

Each is an actor of Ray with a `ServerHost`. The actors are placed before the workers, where `arrange` leaves room for
the most workers, and end with the attempt: also with the driver, since Ray ends a job's actors with the job, and the
server's guard ends the server with the actor.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from launcher.attempt import AttemptFailed, ResizeRequested
from launcher.capacity import Node, Servers, arrange, suits
from launcher.raytrain.environment import Environment
from launcher.raytrain.failures import first_line
from trainer.errors import MusterError
from trainer.inference.host import ADDRESSES, API_KEY, ServerHost
from trainer.inference.server_of_recipe import vllm_server
from trainer.recipe import Recipe
from trainer.run.failure import Failure, FailureKind
from trainer.worker.job import Job

PLACE_S = 120.0
"""How long Ray may take to start the actors, on nodes that have room for them."""
READY_S = 7200.0
"""How long all servers may take to fetch the model and to load it. Each of them gives up earlier by itself, unless its
process hangs."""
CLOSE_S = 40.0


class ServerActor:
    """Ray calls its methods in threads. The key and the environment come by a call: what an actor is created with is
    kept by the cluster's control store."""

    def __init__(self) -> None:
        self._host: ServerHost | None = None

    def place(self) -> str:
        """Returns the name of the actor's host."""
        return os.uname().nodename

    def serve(self, environment: Environment, variables: Mapping[str, str], job: Mapping[str, Any], key: str) -> str:
        """Fetches the model, starts the server and waits until it is ready; returns the address for the workers."""
        import ray

        from trainer.model import fetch_model

        environment.apply()
        os.environ.update(variables)
        recipe = Job.unpacked(dict(job)).recipe
        files, address = fetch_model(recipe.model), ray.util.get_node_ip_address()
        made = partial(_server, recipe, files.folder, _positions(recipe, files.folder), address)
        self._host = ServerHost(made, host=address, api_key=key)
        try:
            self._host.start()
            self._host.wait_ready()
        except BaseException:
            self._host.close()
            raise
        return self._host.address

    def close(self) -> None:
        if self._host is not None:
            self._host.close()


def _server(recipe: Recipe, model: Path, positions: int | None, address: str, folder: Path, key: str) -> Any:
    return vllm_server(
        recipe,
        model,
        positions,
        log=folder / "vllm.log",
        device="cuda" if recipe.resources.gpus_per_worker else "cpu",
        host=address,
        api_key=key,
        temporary=folder,
    )


def _positions(recipe: Recipe, folder: Path) -> int | None:
    from types import SimpleNamespace

    from transformers import AutoConfig

    from trainer.tasks.sampling import max_positions

    config = AutoConfig.from_pretrained(folder, trust_remote_code=recipe.model.trust_remote_code)
    return max_positions(SimpleNamespace(config=config))


@dataclass(frozen=True)
class PlacedServer:
    """``pending``: the call of the actor that returns the server's address; ``node``: its place, as people know it."""

    actor: Any = field(repr=False)
    pending: Any = field(repr=False)
    node: Node


@dataclass(frozen=True)
class PlacedServers:
    """The servers of an attempt. ``environment``: the workers', with the addresses and the key."""

    environment: Environment
    servers: tuple[PlacedServer, ...] = ()

    @property
    def nodes(self) -> frozenset[str]:
        """The ids of their nodes."""
        return frozenset(server.node.id for server in self.servers)

    def explained(self, outcome: ResizeRequested | AttemptFailed) -> ResizeRequested | AttemptFailed:
        """Returns the outcome of an attempt, with the servers that have ended before what followed from that."""
        if isinstance(outcome, ResizeRequested) or outcome.cause.fatal:
            return outcome
        ended = [
            f"the vLLM server on {server.node} has ended: {how}"
            for server in self.servers
            if (how := _end_of(server.actor))
        ]
        if not ended:
            return outcome
        return AttemptFailed(Failure("; ".join([*ended, outcome.cause.message]), own=True), outcome.starting)


@contextmanager
def placed_servers(
    job: Job, nodes: Callable[[], Sequence[Node]], environment: Environment, variables: Mapping[str, str]
) -> Iterator[PlacedServers]:
    """Yields the recipe's servers once they are ready; none if it asks for none. Raises AttemptFailed if they cannot be
    placed or started. ``variables``: see `launcher.raytrain.fit.fit`."""
    wanted = Servers.of(job.recipe)
    if not wanted.count:
        yield PlacedServers(environment)
        return
    import ray

    key, placed = secrets.token_hex(16), list[PlacedServer]()
    try:
        shared = [ray.put(value) for value in (environment, dict(variables), job.packed(), key)]
        for node in _nodes_for(job.recipe, wanted, nodes()):
            actor = _actor(job.recipe, wanted, node)
            placed.append(PlacedServer(actor, actor.serve.remote(*shared), node))
        _await_places(placed)
        addresses = _ready(placed)
        told = {ADDRESSES: ",".join(addresses), API_KEY: key}
        yield PlacedServers(replace(environment, variables={**environment.variables, **told}), tuple(placed))
    finally:
        _close([server.actor for server in placed])


def _nodes_for(recipe: Recipe, wanted: Servers, nodes: Sequence[Node]) -> Iterator[Node]:
    """Yields the node of each server."""
    suitable = [node for node in nodes if suits(recipe.resources, node)]
    found = arrange(recipe.resources, wanted, [node.free for node in suitable])
    if found is None:
        raise AttemptFailed(Failure(_no_room(wanted)), starting=True)
    for node, count in zip(suitable, found.servers, strict=True):
        yield from [node] * count


def _no_room(wanted: Servers) -> str:
    return (
        f"the cluster did not give {wanted.count} vLLM servers (rollout.vllm.servers) their CPUs and GPUs in time: "
        "other jobs hold them, or no single node has enough; see `ray status`"
    )


def _actor(recipe: Recipe, wanted: Servers, node: Node) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return (
        ray.remote(ServerActor)
        .options(
            num_cpus=wanted.each.get("CPU", 0.0),
            num_gpus=wanted.each.get("GPU", 0.0),
            max_restarts=0,
            max_concurrency=4,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False),
        )
        .remote()
    )


def _await_places(placed: Sequence[PlacedServer]) -> None:
    """Waits until each actor runs."""
    import ray

    calls = [server.actor.place.remote() for server in placed]
    started, _ = ray.wait(calls, num_returns=len(calls), timeout=PLACE_S)
    if len(started) < len(calls):
        raise AttemptFailed(Failure(_no_room(Servers(len(placed)))), starting=True)


def _ready(placed: Sequence[PlacedServer]) -> list[str]:
    """Waits until each server is ready; returns the addresses."""
    import ray

    left, of = [server.pending for server in placed], {server.pending: server.node for server in placed}
    deadline = time.monotonic() + READY_S
    while left:
        done, left = ray.wait(left, timeout=max(0.0, deadline - time.monotonic()))
        if not done:
            why = f"the vLLM server on {of[left[0]]} was not ready within {READY_S / 3600:g} hours"
            raise AttemptFailed(Failure(why), starting=True)
        try:
            ray.get(done)
        except Exception as error:
            raise AttemptFailed(_not_started(of[done[0]], error), starting=True) from error
    return [ray.get(server.pending) for server in placed]


def _not_started(node: Node, error: BaseException) -> Failure:
    import ray

    cause = getattr(error, "cause", None) if isinstance(error, ray.exceptions.RayTaskError) else None
    if not isinstance(cause, MusterError):
        return Failure(f"the vLLM server on {node} did not start: {first_line(cause or error)}")
    return Failure(f"the vLLM server on {node} did not start: {cause}", **FailureKind.of(cause)._asdict())


def _end_of(actor: Any) -> str | None:
    """Returns how an actor has ended; None while it runs."""
    import ray

    try:
        ray.get(actor.place.remote(), timeout=5.0)
    except ray.exceptions.GetTimeoutError:
        return "its process does not answer"
    except ray.exceptions.RayError as error:
        return first_line(error)
    return None


def _close(actors: Sequence[Any]) -> None:
    """Ends the servers, and returns once Ray has their CPUs and GPUs again, or knows that they are gone."""
    import ray

    with suppress(Exception):  # Ray itself may be gone, and its actors with it
        ray.wait([actor.close.remote() for actor in actors], num_returns=len(actors), timeout=CLOSE_S)
    for actor in actors:
        with suppress(Exception):
            ray.kill(actor)
