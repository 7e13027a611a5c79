"""One server of an inference engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import TypedDict

from trainer.errors import EngineFailed, InputError
from trainer.inference.dialects import EngineDialect
from trainer.inference.patience import Bounds, PatientRequests
from trainer.inference.sampling import Aborted, EngineText, SamplingSettings, read_text
from trainer.parsing import JsonReader, Malformed
from trainer.records import read_record

COMPLETIONS, MODELS = "/v1/completions", "/v1/models"


class _Card(TypedDict, total=False):
    id: str
    root: str | None
    parent: str | None


class _Models(TypedDict):
    data: list[_Card]


class InferenceServer:
    """One server. Thread-safe. ``base``: the name that the server gives to the base model; None takes the only one that
    it has. ``watch``: see `PatientRequests`."""

    def __init__(
        self,
        address: str,
        settings: SamplingSettings,
        *,
        base: str | None,
        dialect: EngineDialect,
        bounds: Bounds,
        api_key: str | None,
        watch: Callable[[], bool],
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._requests = PatientRequests(address, bounds, api_key, watch=watch, sleep=sleep, clock=clock)
        self._ask, self._refused = self._requests.ask, self._requests.refused
        self._settings, self._dialect, self._bounds, self._base = settings, dialect, bounds, base
        self._sleep, self._clock = sleep, clock
        self._folders: dict[str, str] = {}
        self._loading = threading.Lock()

    def __str__(self) -> str:
        return str(self._requests.address)

    def base(self) -> str:
        """Returns the base model's name. Raises InputError for a server that does not have it."""
        cards = self._cards()
        names = [card["id"] for card in cards if not card.get("parent")]
        if self._base is None and len(names) == 1:
            self._base = names[0]
        if self._base not in names:
            wanted = "one base model" if self._base is None else f"the base model {self._base!r}"
            raise InputError(f"{self} serves {', '.join(names) or 'nothing'}, and {wanted} is needed")
        return self._base

    def adapters(self) -> dict[str, str]:
        """Returns the adapters that the server has: name and folder."""
        return {card["id"]: card.get("root") or "" for card in self._cards() if card.get("parent")}

    def check_updates(self) -> None:
        """Raises InputError for a server that does not take adapters while it runs."""
        # 405: the path is known, and takes POST only.
        answer = self._ask("say if it takes adapters", "GET", self._dialect.load)
        if answer.status == 404:
            raise InputError(f"{self} does not take adapters while it runs; start it with {self._dialect.updates}")
        if answer.status != 405:
            raise self._refused("say if it takes adapters", answer)

    def check_texts(self) -> None:
        """Raises InputError for a server whose answers lack token ids or log-probabilities, or have those of another
        distribution than the one that tokens are drawn from."""
        base, prompt = self.base(), [1, 2, 3]
        self.write(prompt, 0, base, SamplingSettings(1))
        if (self._settings.temperature, self._settings.top_p) == (1.0, 1.0) or self._settings.temperature == 0.0:
            return
        # Far apart, so that even the flat distribution of an untrained model shows a difference; vLLM takes up to 2.
        cold, hot = (self._highest(prompt, base, temperature) for temperature in (0.2, 2.0))
        if abs(cold - hot) < 1e-3:
            raise InputError(
                f"{self} returns log-probabilities that do not depend on the temperature; start it with "
                f"{self._dialect.drawn}"
            )

    def load(self, adapter: str, folder: str) -> None:
        """Loads an adapter, unless the server has it, and from now on again when the server has lost it. Raises
        InputError for one that it cannot use, and where it has the name from another folder: texts of one name must
        come from one adapter."""
        self._folders[adapter] = folder
        with self._loading:
            self._load(adapter, folder)

    def unload(self, adapter: str) -> None:
        """Removes an adapter, if the server has it."""
        self._folders.pop(adapter, None)
        what = f"remove the adapter {adapter}"
        answer = self._ask(what, "POST", self._dialect.unload, {"lora_name": adapter})
        if answer.status != 200 and adapter in self.adapters():
            raise self._refused(what, answer)

    def write(
        self, prompt: Sequence[int], seed: int, adapter: str, settings: SamplingSettings | None = None
    ) -> EngineText:
        """Returns a text. An adapter that `load` was called for, and that the server has lost, is loaded again."""
        settings = settings or self._settings
        asked = settings.request(prompt, seed, self._dialect.model(self._base or self.base(), adapter))
        what, came = f"write a text with {adapter}", ""
        for _ in range(self._bounds.loads + 1):
            answer = self._ask(what, "POST", COMPLETIONS, asked)
            if answer.status == 200:
                try:
                    return read_text(answer.body, asked, adapter, str(self))
                except Aborted as aborted:
                    came = str(aborted)
            # After 404 the list may have it again: another thread was faster. SGLang answers 400, as to any mistake.
            elif adapter in self._folders and (answer.status == 404 or adapter not in self.adapters()):
                came = answer.words
                self.load(adapter, self._folders[adapter])
            else:
                raise self._refused(what, answer)
        raise EngineFailed(f"{self} could not {what}: {self._bounds.loads + 1} times it answered with {came}")

    def _highest(self, prompt: Sequence[int], base: str, temperature: float) -> float:
        """Returns the log-probability of the most likely first token."""
        asked = SamplingSettings(1, temperature).request(prompt, 0, base)
        answer = self._ask("write a text", "POST", COMPLETIONS, asked)
        if answer.status != 200:
            raise self._refused("write a text", answer)
        try:
            value = JsonReader(unique=False).read(answer.body)
            return max(value["choices"][0]["logprobs"]["top_logprobs"][0].values())  # type: ignore[no-any-return]
        except (Malformed, LookupError, TypeError, AttributeError, ValueError) as error:
            raise InputError(f"{self} returns no log-probabilities of the most likely tokens") from error

    def _load(self, adapter: str, folder: str) -> None:
        what, started = f"load the adapter {adapter} from {folder}", self._clock()
        for wait_s in self._requests.waits():
            if self._has(adapter, folder):
                return
            # 500: vLLM's answer to an adapter that it cannot use, as of a rank for which it has no room.
            answer = self._ask(what, "POST", self._dialect.load, {"lora_name": adapter, "lora_path": folder}, final=500)
            # Another client may have loaded it meanwhile.
            if answer.status == 200 or self._has(adapter, folder):
                return
            if self._clock() - started + wait_s > self._bounds.files_s:
                if self._ask("say how it is", "GET", "/health", final=503).status != 200:
                    raise EngineFailed(f"{self} did not {what}: {answer.status}: {answer.words}")
                raise self._refused(what, answer)
            self._sleep(wait_s)

    def _has(self, adapter: str, folder: str) -> bool:
        other = self.adapters().get(adapter)
        if other and other.rstrip("/") != folder.rstrip("/"):
            raise InputError(
                f"{self} has an adapter {adapter} from {other}, and {folder} is another; give it a name of its own, or "
                "remove the other one"
            )
        return other is not None

    def _cards(self) -> list[_Card]:
        answer = self._ask("list its models", "GET", MODELS)
        if answer.status != 200:
            raise self._refused("list its models", answer)
        try:
            cards = read_record(_Models, JsonReader(unique=False).read(answer.body))["data"]
        except Malformed as error:
            raise EngineFailed(f"{self} answered a list of models that cannot be read: {error}") from error
        return [card for card in cards if "id" in card]
