"""The servers that write the texts of a run, and their adapter: each step's weights go to all of them.

Servers of muster's own run on each node, started by the first rank there, which the others of the node share. Servers
that are given by their addresses are shared by all ranks.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from trainer.errors import InputError
from trainer.inference.client import EngineClient
from trainer.inference.http_server import Bounds
from trainer.inference.sampling import SamplingSettings
from trainer.inference.server import BASE, VLLMServer
from trainer.storage import Storage
from trainer.tasks.rollouts.ranks import Peers
from trainer.tasks.rollouts.store import RolloutStore
from trainer.tasks.rollouts.task import RolloutTask
from trainer.tasks.sampling import Completion, max_positions
from trainer.worker.build import Parts

log = logging.getLogger(__name__)

API_KEY = "MUSTER_ROLLOUT_API_KEY"
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
        given, hosts = parts.recipe.rollout.addresses, self._ranks.joined([parts.world.host])
        leader = 0 if given else hosts.index(parts.world.host)
        self._leads = leader == parts.world.rank
        self._temporary = tempfile.TemporaryDirectory(prefix="muster-adapters-")
        self._server: VLLMServer | None = None
        self._names: dict[int, str] = {}
        self._on_leader("start", self._start_server if not given else lambda: None)
        self._place = self._ranks.joined([self._own_place()])[leader]
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
            # On every rank: each meets a server that was started again, and has lost the adapter.
            self._ranks.together(lambda: self._client.load(name, str(folder)), f"load {name}")
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
        recipe, section = self._parts.recipe, self._parts.recipe.rollout.vllm
        assert section.python is not None
        longest = recipe.data.sequence_length + self._task.section.longest
        on_gpu = self._parts.world.device.type != "cpu"
        self._server = VLLMServer(
            section.python,
            self._parts.files.folder,
            lora_rank=(recipe.adapter.rank or 0) * recipe.adapter.row.plain_lora,
            dtype=recipe.model.dtype,
            max_model_len=min(longest, max_positions(self._parts.strategy.model) or longest),
            log=Path(self._temporary.name, "vllm.log"),
            device="cuda" if on_gpu else "cpu",
            gpu_memory_utilization=section.gpu_memory_utilization,
            tensor_parallel=section.tensor_parallel,
            adapters=recipe.rollout.max_staleness + 2,
            arguments=section.arguments,
        )
        log.info("starting vLLM for the rollouts; its log is %s", self._server.log)
        self._server.start()
        self._server.wait_ready(READY_S)

    def _own_place(self) -> ServersOfNode:
        section = self._parts.recipe.rollout
        if self._server is not None:
            return ServersOfNode((self._server.address,), self._server.api_key, self._temporary.name)
        return ServersOfNode(section.addresses, os.environ.get(API_KEY), section.adapter_folder or self._temporary.name)

    def _connected(self) -> EngineClient:
        recipe, sampler = self._parts.recipe, self._task.sampler
        settings = SamplingSettings(
            sampler.max_new_tokens, sampler.temperature, sampler.top_p, tuple(sampler.stop), tuple(sorted(sampler.ends))
        )
        own = not recipe.rollout.addresses
        return EngineClient(
            self._place.addresses,
            settings,
            base=BASE if own else None,
            api_key=self._place.api_key,
            engine=recipe.rollout.row.dialect,
            bounds=Bounds(answer_s=recipe.rollout.timeout_s),
            watch=self._server.revive if self._server is not None else lambda: False,
        )

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
        """Removes the adapters that no text is written with any more, versions before ``oldest``."""
        for version in [version for version in self._names if version < oldest]:
            name = self._names.pop(version)
            if self._leads:
                self._client.unload(name)
                shutil.rmtree(Path(self._place.folder, name), ignore_errors=True)
