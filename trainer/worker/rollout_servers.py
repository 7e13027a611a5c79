"""The servers that write the texts of a run, and their adapter: each step's weights go to all of them.

Servers of muster's own run on each node, started by the first rank there, which the others of the node share. Servers
next to the training (`rollout.vllm.servers`) and those that are given by their addresses are shared by all ranks.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from trainer.errors import InputError
from trainer.inference.client import EngineClient
from trainer.inference.host import API_KEY
from trainer.inference.host_client import HostClient, find_host
from trainer.inference.patience import Bounds
from trainer.inference.sampling import SamplingSettings
from trainer.inference.server import BASE, VLLMServer
from trainer.inference.server_of_recipe import shared_servers, vllm_server
from trainer.storage import Storage, in_parallel
from trainer.tasks.rollouts.ranks import Peers
from trainer.tasks.rollouts.store import RolloutStore
from trainer.tasks.rollouts.task import RolloutTask
from trainer.tasks.sampling import Completion, max_positions
from trainer.worker.build import Parts

log = logging.getLogger(__name__)

READY_S = 1500.0
"""Less than the time limit of collectives, in which the other ranks wait."""


def use_servers(parts: Parts, run: Storage) -> None:
    """Collective: lets the task's texts be written by servers, if the recipe asks for that."""
    recipe, task = parts.recipe, parts.task
    if not (isinstance(task, RolloutTask) and recipe.rollout.row.serves):
        return
    keep = (recipe.checkpoint.keep_last + 1) * recipe.checkpoint.every_steps
    task.write_with(AdapterServers(parts, task), RolloutStore(run, keep))


class ServersOfNode(NamedTuple):
    """Servers, and the folder from which they read adapters."""

    addresses: tuple[str, ...]
    api_key: str | None
    folder: str


class AdapterServers:
    """See `trainer.tasks.rollouts.engine.TextServers`. The constructor is a collective."""

    def __init__(self, parts: Parts, task: RolloutTask) -> None:
        self._parts, self._task, self._ranks = parts, task, Peers(parts.world)
        given, hosts = shared_servers(parts.recipe), self._ranks.joined([parts.world.host])
        leader = 0 if given else hosts.index(parts.world.host)
        self._leads = leader == parts.world.rank
        self._temporary = tempfile.TemporaryDirectory(prefix="muster-adapters-")
        self._server: VLLMServer | None = None
        self._names: dict[int, str] = {}
        self._on_leader("start", self._start_server if not given else lambda: None)
        self._place = self._ranks.joined([self._own_place(given)])[leader]
        self._hosts = self._ranks.together(self._found_hosts, "look for hosts") if given else {}
        self._addresses = tuple(self._hosts) or self._place.addresses
        # A name stands for one set of weights, also for a server that outlives the run.
        self._unique = self._ranks.decide(lambda: uuid.uuid4().hex[:12])
        self._client = self._connected()
        self._on_leader("check", self._client.check)

    def sync(self, version: int) -> str:
        if version not in self._names:
            name = f"{self._parts.recipe.name}-{self._unique}-{version}"
            folder = Path(self._place.folder, name)
            weights = self._weights()
            self._on_leader(f"save {name}", lambda: self._save(weights, folder))
            self._on_leader(f"send {name}", lambda: self._send(name, folder))
            # On every rank: each meets a server that was started again, and has lost the adapter.
            self._ranks.together(lambda: self._client.load(name, partial(self._folder_on, name)), f"load {name}")
            self._names[version] = name
            self._forget(version - 1 - self._parts.recipe.rollout.max_staleness)
        return self._names[version]

    def write(self, adapter: str, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Completion]:
        texts = self._client.write(prompts, seeds, adapter)
        return [Completion(text.tokens, text.finished, text.text, text.logps) for text in texts]

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
        self._temporary.cleanup()

    def _on_leader(self, what: str, do: Callable[[], None]) -> None:
        """Collective: calls ``do`` on the rank that leads a node's (or all) ranks; its error is raised on all."""
        self._ranks.together(do if self._leads else lambda: None, what)

    def _start_server(self) -> None:
        on_gpu = self._parts.world.device.type != "cpu"
        self._server = vllm_server(
            self._parts.recipe,
            self._parts.files.folder,
            max_positions(self._parts.strategy.model),
            log=Path(self._temporary.name, "vllm.log"),
            device="cuda" if on_gpu else "cpu",
        )
        log.info("starting vLLM for the rollouts; its log is %s", self._server.log)
        self._server.start()
        self._server.wait_ready(READY_S)

    def _own_place(self, given: tuple[str, ...]) -> ServersOfNode:
        section = self._parts.recipe.rollout
        if self._server is not None:
            return ServersOfNode((self._server.address,), self._server.api_key, self._temporary.name)
        return ServersOfNode(given, os.environ.get(API_KEY), section.adapter_folder or self._temporary.name)

    def _found_hosts(self) -> dict[str, HostClient | None]:
        """Returns the servers by their addresses, each with its host; None for one that reads a shared folder."""
        bounds, key, addresses = Bounds(), self._place.api_key, list(dict.fromkeys(self._place.addresses))
        found = in_parallel(lambda address: find_host(address, bounds, key), addresses, len(addresses))
        return {host.server if host else address: host for address, host in zip(addresses, found, strict=True)}

    def _connected(self) -> EngineClient:
        recipe, sampler = self._parts.recipe, self._task.sampler
        settings = SamplingSettings(
            sampler.max_new_tokens, sampler.temperature, sampler.top_p, tuple(sampler.stop), tuple(sorted(sampler.ends))
        )
        return EngineClient(
            self._addresses,
            settings,
            base=None if self._hosts else BASE,
            api_key=self._place.api_key,
            engine=recipe.rollout.row.dialect,
            bounds=Bounds(answer_s=recipe.rollout.timeout_s),
            watch=self._server.revive if self._server is not None else lambda: False,
            watches={address: host.watch for address, host in self._hosts.items() if host is not None},
        )

    def _folder_on(self, name: str, address: str) -> str:
        """Returns the adapter's folder as the server at ``address`` sees it."""
        host = self._hosts.get(address)
        return str(Path(self._place.folder, name)) if host is None else host.folder(name)

    def _send(self, name: str, folder: Path) -> None:
        hosts = [host for host in self._hosts.values() if host is not None]
        in_parallel(lambda host: host.send(name, folder), hosts, len(hosts))

    def _weights(self) -> dict[str, torch.Tensor]:
        """Collective: gathers the adapter on the ranks that save it; empty on the others."""
        kept = {}
        for name, tensor in self._parts.strategy.weights():
            if self._leads and not self._task.owns_parameter(name):
                kept[name] = tensor.clone(memory_format=torch.contiguous_format)
        return kept

    def _save(self, weights: Mapping[str, torch.Tensor], folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._parts.adapter.save(self._parts.strategy.model, weights, folder)
        except OSError as error:
            raise InputError(f"the adapter cannot be written to {folder}: {error}") from error

    def _forget(self, oldest: int) -> None:
        """Collective: removes the adapters that no text is written with any more, versions before ``oldest``."""
        for version in [version for version in self._names if version < oldest]:
            name = self._names.pop(version)
            self._on_leader(f"remove {name}", partial(self._remove, name))

    def _remove(self, name: str) -> None:
        self._client.unload(name)
        for host in filter(None, self._hosts.values()):
            host.remove(name)
        shutil.rmtree(Path(self._place.folder, name), ignore_errors=True)
