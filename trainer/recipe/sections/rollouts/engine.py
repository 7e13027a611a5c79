"""The engine that writes texts in training: the model itself, or servers next to it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from trainer.recipe.base import MAY_CHANGE, Conflict, Listed, Location, OneOf, Section
from trainer.recipe.sections.rollouts.engines import ROLLOUT_ENGINES, RolloutEngineRow

SHARED_GPU, OWN_GPU = 0.4, 0.9
"""The share of a GPU's memory that a server takes beside the training, and where it has the GPU alone."""


class VLLMSection(Section):
    """The servers of vLLM that muster starts."""

    python: Location | None = Field(default=None, examples=["/opt/vllm/bin/python"])
    """The Python of an environment of its own in which vLLM is installed, under the same path on every node."""

    servers: int | None = Field(default=None, ge=1)
    """Number of servers that Ray places on GPUs of their own, `tensor_parallel` for each; on a CPU cluster, each has as
    many CPUs as a worker. null: one on each node, on GPUs of the training."""

    gpu_memory_utilization: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Share of the memory of its GPUs that a server takes; null: 0.4 beside the training on the same GPUs, 0.9 on GPUs
    of its own."""

    tensor_parallel: int = Field(default=1, ge=1)
    """GPUs over which a server divides the model."""

    arguments: Listed[str] = Field(default=(), examples=[["--quantization", "bitsandbytes"]])
    """More arguments of `vllm serve`."""

    @property
    def memory_share(self) -> float:
        """The share of its GPUs' memory that a server takes."""
        return self.gpu_memory_utilization or (SHARED_GPU if self.servers is None else OWN_GPU)


class RolloutSection(Section):
    """How the texts of the tasks `ppo` and `grpo` are written. See [rollouts.md](rollouts.md)."""

    engine: Annotated[str, OneOf(ROLLOUT_ENGINES)] = "transformers"
    """`transformers`: the model in training writes them, the same texts on any number of workers. `vllm`: servers of
    vLLM, which muster starts or which are given by their addresses; they get the adapter before each step. `openai`
    and `sglang`: servers that run already, with the interface of vLLM or of SGLang."""

    max_staleness: int = Field(default=0, ge=0)
    """How many updates older than the policy the weights may be that write a text. 0 waits for each step's texts; 1
    writes those of the next step while the policy learns from this one's. For servers only."""

    importance_cap: float | None = Field(default=2.0, gt=0.0)
    """Largest weight of a token by the ratio of its probabilities in training and by the server, which differ
    (truncated importance sampling); null gives every token the weight 1. For servers only."""

    addresses: Annotated[Listed[str], MAY_CHANGE] = Field(default=(), examples=[["http://10.0.0.7:8000"]])
    """Servers that run already, all with the same base model. A key that they want is in the environment variable
    `MUSTER_ROLLOUT_API_KEY`."""

    adapter_folder: Annotated[Location, MAY_CHANGE] | None = Field(default=None, examples=["/shared/adapters"])
    """A folder that the servers at `addresses` and the workers see under the same path, for the adapters; null: a
    temporary folder, for servers on the machine of the first worker. Servers of `trainer.inference.host` need none."""

    timeout_s: Annotated[float, MAY_CHANGE] = Field(default=600.0, gt=0.0)
    """Seconds in which a server has to complete a text, with its wait among the others."""

    vllm: Annotated[VLLMSection, MAY_CHANGE] = VLLMSection()

    @property
    def row(self) -> RolloutEngineRow:
        return ROLLOUT_ENGINES[self.engine]

    @property
    def servers_beside(self) -> int:
        """The number of servers that Ray places next to the workers."""
        return (self.vllm.servers or 0) if self.row.starts and not self.addresses else 0

    def conflicts(self) -> Iterator[Conflict]:
        if not self.row.serves:
            for name in (name for name in self.given() if name != "engine"):
                message = f"has no effect with engine {self.engine}, where the model in training writes; leave it out"
                yield Conflict(((name,), ("engine",)), message)
            return
        if not self.addresses and not (self.row.starts and self.vllm.python):
            started = ", or vllm.python to start some" if self.row.starts else ""
            yield Conflict(
                (("addresses",), ("engine",)), f"engine {self.engine} needs servers: give addresses{started}"
            )
        if self.addresses and any(self.vllm.given()):
            yield Conflict((("vllm",), ("addresses",)), "has no effect on servers that run already; leave one out")
        if self.adapter_folder and not self.addresses:
            yield Conflict((("adapter_folder",), ("addresses",)), "has no effect without addresses; leave it out")
