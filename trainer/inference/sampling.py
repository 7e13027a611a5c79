"""What a server is asked for a text, and what is read from its answer.

The tokens have to be exactly those that were sampled, with the token that ended the text, and each log-probability that
of the distribution that its token was drawn from: after temperature and top-p. In vLLM that is
``--logprobs-mode processed_logprobs``; by default it gives those of the model's own distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from trainer.errors import EngineFailed, InputError
from trainer.parsing import JsonReader, Malformed
from trainer.records import Count, read_record

NEVER_DRAWN = -9999.0
"""vLLM's log-probability of a token that cannot be drawn: JSON has no infinity."""
_ROUNDING = 1e-4


@dataclass(frozen=True)
class SamplingSettings:
    """``max_tokens``: of a text, without its prompt. ``temperature`` 0 takes the most likely token. ``stop``: strings
    that end a text; ``stop_token_ids``: tokens that end it, in addition to the end of text of the server's model."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()

    def request(self, prompt: Sequence[int], seed: int, model: str) -> dict[str, Any]:
        """Returns the body of ``/v1/completions``."""
        return {
            "model": model,
            "prompt": list(prompt),
            "seed": seed,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "stop": list(self.stop),
            "stop_token_ids": list(self.stop_token_ids),
            "logprobs": 1,
            "return_token_ids": True,
            # These two change the text only: the tokens contain what ended it in any case.
            "skip_special_tokens": True,
            "include_stop_str_in_output": False,
            # Without a value, the server takes the one in the model's generation_config.json.
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        }


@dataclass(frozen=True)
class EngineText:
    """A sampled text. ``tokens``: with the one that ended it; ``logps``: log-probability of each, of the distribution
    that it was drawn from; ``finished``: ended by a token or a stop string, not by its length; ``text``: without
    special tokens and without the stop string; ``adapter``: the model that the answer names; ``server``: its
    address."""

    tokens: list[int]
    logps: list[float]
    finished: bool
    text: str
    adapter: str
    server: str


class _Logprobs(TypedDict):
    token_logprobs: list[float]


class _Choice(TypedDict, total=False):
    text: str
    finish_reason: str | None
    token_ids: list[Count] | None
    prompt_token_ids: list[Count] | None
    logprobs: _Logprobs | None


class _Completion(TypedDict):
    model: str
    choices: list[_Choice]


class Aborted(Exception):
    """The server ended the text before its end, as it does when it shuts down: it has to be written again."""


def read_text(body: bytes, asked: dict[str, Any], adapter: str, server: str) -> EngineText:
    """Returns the text of an answer. Raises EngineFailed for an answer that does not fit what was ``asked``, InputError
    for a server that cannot give what is needed, and Aborted."""
    try:
        found = read_record(_Completion, JsonReader(finite=False, unique=False).read(body))
        if len(found["choices"]) != 1:
            raise Malformed(f"it has {len(found['choices'])} texts, and 1 was asked for")
    except Malformed as error:
        raise EngineFailed(f"{server} answered a completion of {adapter} that cannot be read: {error}") from error
    if found["model"] != asked["model"]:
        wrong = f"was asked for a text of {asked['model']} and answered with one of {found['model']}"
        raise EngineFailed(f"{server} {wrong}")
    choice = found["choices"][0]
    return _checked(choice, asked, adapter, server)


def _checked(choice: _Choice, asked: dict[str, Any], adapter: str, server: str) -> EngineText:
    tokens, logprobs, ended = choice.get("token_ids"), choice.get("logprobs"), choice.get("finish_reason")
    if ended not in ("stop", "length"):
        raise Aborted(f"a text that was ended for the reason {ended!r}")
    if tokens is None:
        raise InputError(f"{server} returns no token ids: it does not know return_token_ids (vLLM does from 0.10.2 on)")
    if logprobs is None:
        raise InputError(f"{server} returns no log-probabilities, which the loss needs")
    logps = logprobs["token_logprobs"]
    if not tokens or len(logps) != len(tokens):
        raise EngineFailed(f"{server} answered {len(tokens)} tokens with {len(logps)} log-probabilities")
    if wrong := [logp for logp in logps if not NEVER_DRAWN < logp <= _ROUNDING]:
        raise EngineFailed(f"{server} answered the log-probability {wrong[0]} of a token that it drew")
    if choice.get("prompt_token_ids") not in (None, asked["prompt"]):
        raise EngineFailed(f"{server} continued another prompt than the one that it was sent")
    if len(tokens) > asked["max_tokens"] or (ended == "length" and len(tokens) < asked["max_tokens"]):
        raise InputError(
            f"{server} ended a text after {len(tokens)} tokens for its length, and {asked['max_tokens']} were asked "
            f"for after a prompt of {len(asked['prompt'])}; give it room for both (--max-model-len), and start it with "
            "--generation-config vllm"
        )
    return EngineText(tokens, logps, ended == "stop", choice.get("text", ""), adapter, server)
