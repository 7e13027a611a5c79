"""The client of several servers of an inference engine, which hold the same base model and the same adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from trainer.errors import InputError
from trainer.inference.dialects import DIALECTS
from trainer.inference.http_server import InferenceServer
from trainer.inference.patience import Bounds
from trainer.inference.sampling import EngineText, SamplingSettings
from trainer.storage import in_parallel

IN_FLIGHT = 64
"""Requests at a time for each server."""


class EngineClient:
    """Writes texts with the servers at ``addresses``. Thread-safe; several processes may use the same servers.

    The name of an adapter stands for one set of weights: a server keeps what it has computed for a name and a folder,
    so that new weights need a new name and a new folder. The folder of an adapter in use has to stay, since a server
    reads it again.

    ``base``: the name that the servers give to the base model, None for the only one; ``engine``: a key of
    `trainer.inference.dialects.DIALECTS`; ``in_flight``: requests at a time for each server; a slow one may have more
    of them, and queues them. ``watch``: called after each failed attempt, from any thread, as `VLLMServer.revive` of
    a server of our own; True means that a server was started again. ``watches``: those of single servers, by address,
    in place of it."""

    def __init__(
        self,
        addresses: Sequence[str],
        settings: SamplingSettings,
        *,
        base: str | None = None,
        api_key: str | None = None,
        engine: str = "vllm",
        in_flight: int = IN_FLIGHT,
        bounds: Bounds = Bounds(),  # noqa: B008 (frozen: safe to share)
        watch: Callable[[], bool] = lambda: False,
        watches: Mapping[str, Callable[[], bool]] | None = None,
    ) -> None:
        if not addresses:
            raise InputError("no inference server is named; write addresses such as http://host:port")
        dialect, of_address = DIALECTS[engine], watches or {}
        self._engines = {
            address: InferenceServer(
                address,
                settings,
                base=base,
                dialect=dialect,
                bounds=bounds,
                api_key=api_key,
                watch=of_address.get(address, watch),
            )
            for address in addresses
        }
        self._in_flight = in_flight

    @property
    def servers(self) -> list[str]:
        return [str(engine) for engine in self._engines.values()]

    def check(self) -> None:
        """Raises InputError for a server that cannot do what is needed: it lacks the base model, takes no adapters
        while it runs, or returns no token ids or no log-probabilities, or those of another distribution."""
        self._on_all(InferenceServer.base)
        self._on_all(InferenceServer.check_updates)
        self._on_all(InferenceServer.check_texts)

    def load(self, adapter: str, folder: str | Callable[[str], str]) -> None:
        """Loads an adapter on every server that does not have it. Every process that writes texts with it calls this:
        a server that is started again gets it from whoever meets it first. ``folder``: where the servers see it, or the
        folder of the server at an address. Raises InputError for an adapter that a server cannot use."""

        def load(place: tuple[str, InferenceServer]) -> None:
            address, server = place
            server.load(adapter, folder if isinstance(folder, str) else folder(address))

        in_parallel(load, self._engines.items(), len(self._engines))

    def unload(self, adapter: str) -> None:
        """Removes an adapter from every server that has it."""
        self._on_all(lambda server: server.unload(adapter))

    def adapters(self) -> dict[str, dict[str, str]]:
        """Returns the adapters of each server: name and folder."""
        return dict(
            zip(
                self.servers,
                in_parallel(InferenceServer.adapters, self._engines.values(), len(self._engines)),
                strict=True,
            )
        )

    def write(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], adapter: str) -> list[EngineText]:
        """Returns a text for each prompt, in their order. ``adapter``: one that is loaded, or the base model's name.

        Each text is drawn with its own seed, so that it depends on that, the prompt and the adapter, and in its last
        bits on what else the server computes at the time; two texts of the same seed are drawn with the same random
        numbers. Neighbours go to the same server, which computes a prompt that they share once.

        Raises EngineFailed for a server that does not answer or not as it should, and InputError for a refusal."""
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds")
        engines = list(self._engines.values())
        share = -(-len(prompts) // len(engines))
        texts: dict[int, EngineText] = {}

        def write(i: int) -> None:
            texts[i] = engines[i // share].write(prompts[i], seeds[i], adapter)

        # Each server's first prompt, then each one's second, and so on: all of them are busy at all times.
        turns = sorted(range(len(prompts)), key=lambda i: (i % share, i // share))
        in_parallel(write, turns, self._in_flight * len(engines))
        return [texts[i] for i in range(len(prompts))]

    def _on_all(self, task: Callable[[InferenceServer], object]) -> None:
        in_parallel(task, self._engines.values(), len(self._engines))
